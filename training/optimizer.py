# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Muon for the matrices of the layers, AdamW for everything else, as one optimiser."""

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """
    torch's Muon on the weight matrices of the layers and torch's AdamW on embeddings, norms, biases and the head,
    behind one `step`, one list of parameter groups (so that schedulers drive both) and one state dict.

    Args:
        model: A [`LoopMDMForMaskedLM`].
        lr (`float`): Learning rate of both; Muon's updates are scaled to AdamW's root mean square.
        weight_decay (`float`, defaults to 0.0): Decoupled weight decay of the matrices of the layers.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.95)`): AdamW's.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95)
    ):
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in trainable if ".layers." in name and parameter.ndim == 2]
        ids = {id(parameter) for parameter in matrices}
        others = [parameter for _, parameter in trainable if id(parameter) not in ids]
        # Both take an empty group, but not an empty list: of an adapter all parameters may be matrices of the layers.
        self.muon = torch.optim.Muon(
            [{"params": matrices}], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW([{"params": others}], lr=lr, weight_decay=0.0, betas=betas)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        # The three share their groups, so a scheduler's new rate reaches both optimisers.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict):
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
