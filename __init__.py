# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""LoopMDM: looped masked diffusion language models for Hugging Face transformers."""

# The repository root is both a Hub model repo and this package, so tools that walk the folder (pytest above all)
# meet this file under another name; only the package itself registers classes.
if __name__ == "loopmdm":
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from .configuration_loopmdm import LoopMDMConfig
    from .generation_utils import LoopMDMGenerationConfig
    from .modeling_loopmdm import LoopMDMForMaskedLM, LoopMDMModel

    AutoConfig.register("loopmdm", LoopMDMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        auto_class.register(LoopMDMConfig, LoopMDMForMaskedLM, exist_ok=True)
    # `save_pretrained` copies the code beside the weights, so that the folder loads without this package.
    LoopMDMConfig.register_for_auto_class()
    LoopMDMForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

    __all__ = ["LoopMDMConfig", "LoopMDMForMaskedLM", "LoopMDMGenerationConfig", "LoopMDMModel"]
