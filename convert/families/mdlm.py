# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
MDLM, which conditions on a noise level of 0, and UDLM, which conditions on the actual level, and is converted at one
level on request.

The checkpoints of the training repository hold the raw weights by name, and the averaged ones (EMA), with which the
published results were measured, as a list without names in the same order.
"""

from ..dit_format import DiTFormat
from ..source import StoredTensor, stub_value


class MDLM(DiTFormat):
    name = "mdlm"
    models = "MDLM (Hub format, and the training repository's .ckpt with its averaged weights); UDLM at one --sigma"

    def matches(self, source):
        is_bd3lm = "BD3LM" in source.architectures or "block_size" in source.config
        return self.is_modulated(source) and not is_bd3lm

    def prepare(self, source):
        """Replaces the raw weights of a training checkpoint by the EMA weights."""
        if not source.extras.get("ema"):
            return source
        shadow = source.extras["ema"]["shadow_params"]
        parameters = [name for name in source.tensors if not name.endswith("inv_freq")]
        if [tuple(average.shape) for average in shadow] != [source.shape(name) for name in parameters]:
            raise ValueError(
                f"{source.name} has {len(shadow)} averaged (EMA) weights that do not fit its {len(parameters)} "
                "parameters in order, so nothing tells which is which."
            )
        source.tensors |= {
            name: StoredTensor(tuple(average.shape), average.dtype, average.detach)
            for name, average in zip(parameters, shadow, strict=True)
        }
        return source

    def settings(self, source):
        """From config.json, or from the hyper-parameters of a training checkpoint."""
        if source.config:
            return super().settings(source)
        try:
            hyper = stub_value(source.extras["hyper_parameters"])["config"]
            model = hyper["model"]
            return {
                "n_heads": int(model["n_heads"]),
                "length": int(model["length"]),
                "time_conditioning": bool(hyper["time_conditioning"]),
                "n_blocks": model.get("n_blocks"),
                "diffusion": hyper.get("diffusion"),
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source.name} has neither a config.json nor hyper-parameters that can be read; put a config.json "
                "with `n_heads`, `model_length` and `time_conditioning` beside it."
            ) from error

    def config(self, source):
        if source.config.get("cfg"):
            raise ValueError(f"{source.name} is conditioned on classes (`cfg`), which is not supported.")
        config = super().config(source)
        if "UDLM" in source.architectures or self.settings(source).get("diffusion") == "uniform":
            del config["mask_token_id"]  # it corrupts by uniform noise, so its vocabulary has no mask token
        return config


FAMILIES = [MDLM()]
