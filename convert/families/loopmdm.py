# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A LoopMDM that was trained without loops: the result has the same weights with another loop."""

from ...configuration_loopmdm import LoopMDMConfig
from ..family import MODEL_FIELDS, Family, copy


class LoopMDM(Family):
    name = "loopmdm"
    models = "LoopMDM trained with one loop"
    architectures = ("LoopMDMForMaskedLM",)

    def config(self, source):
        config = LoopMDMConfig.from_dict(source.config)
        if config.max_train_loops != 1:
            raise ValueError(
                f"{source.name} is a looped model already (`max_train_loops` is {config.max_train_loops}); only a "
                "model trained without loops (`max_train_loops` 1) can be given another loop."
            )
        return {name: getattr(config, name) for name in MODEL_FIELDS}

    def recipes(self, source, config):
        return {name: copy(name) for name in source.tensors}

    def generation(self, source):
        of_old_loop = {"num_loops", "visible_loops", "loop_tolerance", "loop_policy", "transformers_version"}
        return {name: value for name, value in source.generation_config.items() if name not in of_old_loop}


FAMILIES = [LoopMDM()]
