# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
import torch

# Threads cost tiny matrices more than they give: on a busy machine seven times the run time.
torch.set_num_threads(1)
