# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`python -m loopmdm`: the `loopmdm` command."""

from loopmdm_cli import main

main()
