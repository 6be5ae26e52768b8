# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`python -m loopmdm_cli`, which launchers of several processes (torchrun, accelerate) take."""

from loopmdm_cli import main

main()
