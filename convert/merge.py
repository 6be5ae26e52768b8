# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Adapters merged into their base models, with what generation needs besides the weights."""

from pathlib import Path

from ..data.pretrained import adapter_base, load_tokenizer, locate
from ..evaluation.loading import load_model, read_generation_config
from .write import check_output, new_folder


def merge_adapter(adapter: str | Path, output: str | Path, trust_remote_code: bool = False) -> None:
    """
    Merges a PEFT adapter into its base model and saves the result, a LoopMDM, with the tokenizer and the generation
    config (end tokens, loops) of the adapter's folder, or else those of the base model.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of an adapter of the weights (LoRA, DoRA, IA3).
        output (`str` or `Path`): The new folder.
        trust_remote_code (`bool`, defaults to `False`): Run the tokenizer's own code.

    Raises:
        ValueError: It is not such an adapter, there is no tokenizer, or the output exists.
    """
    from peft import PeftConfig, PeftModel

    output, name = Path(output).expanduser(), str(adapter)
    check_output(output)
    source = locate(name, "an adapter")
    base = adapter_base(source)  # checks it; None where a whole model lies beside it
    settings = PeftConfig.from_pretrained(source)
    if settings.is_prompt_learning:
        raise ValueError(f"{name} holds soft prompts ({settings.peft_type.value}), which no weights take up.")
    tokenizer, generation = load_tokenizer(name, trust_remote_code), read_generation_config(name)
    model = load_model(base or settings.base_model_name_or_path, device="cpu", revision=settings.revision)
    merged = PeftModel.from_pretrained(model, source).merge_and_unload()
    merged.generation_config = generation or merged.generation_config
    with new_folder(output) as folder:
        tokenizer.save_pretrained(folder)
        merged.save_pretrained(folder)
