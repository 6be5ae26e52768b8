# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Adapters merged into their base models, with what generation and publishing need besides the weights."""

import shutil
from pathlib import Path

from transformers.utils import cached_file

from ..data import load_adapter, share_weights
from ..data.pretrained import adapter_base, load_tokenizer, locate
from ..evaluation.loading import load_model, read_generation_config
from ..hub import BUDGET, read_source_card, write_card
from .write import check_output, new_folder

RECORDS = ("training.json", BUDGET)
# A file of a folder or the Hub that may be missing
QUIETLY = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def merge_adapter(adapter: str | Path, output: str | Path, trust_remote_code: bool = False) -> None:
    """
    Merges a PEFT adapter into its base model and saves the result, a LoopMDM, with the tokenizer and the generation
    config (end tokens, loops) of the adapter's folder, or else those of the base model. The licence and the records of
    training and calibration go with it, and a card is written from them.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of an adapter of the weights (LoRA, DoRA, IA3).
        output (`str` or `Path`): The new folder.
        trust_remote_code (`bool`, defaults to `False`): Run the tokenizer's own code.

    Raises:
        ValueError: It is not such an adapter, peft cannot merge it, it adapts a weight that embeddings and head share,
            there is no tokenizer, or the output exists.
    """
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    output, name = Path(output).expanduser(), str(adapter)
    check_output(output)
    source = locate(name, "an adapter")
    base = adapter_base(source)  # checks it; None where a whole model lies beside it
    settings = PeftConfig.from_pretrained(source)
    if settings.is_prompt_learning:
        raise ValueError(f"{name} holds soft prompts ({settings.peft_type.value}), which no weights take up.")
    tokenizer, generation = load_tokenizer(name, trust_remote_code), read_generation_config(name)
    base, card = base or settings.base_model_name_or_path, read_source_card(source)
    if "license" not in card.metadata:  # peft's own cards name none
        card = read_source_card(base)
    if adapter_base(base) is not None:
        raise ValueError(
            f"{base}, the base model of {name}, is an adapter itself; merge it first, and name the result."
        )
    model = load_model(base, device="cpu", revision=settings.revision)
    adapted = load_adapter(model, source)
    ends = [module for path, module in adapted.named_modules() if path.endswith(("embed_tokens", "lm_head"))]
    is_untied = any(isinstance(end, ModulesToSaveWrapper) for end in ends)
    if model.config.tie_word_embeddings and not is_untied and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            f"{name} adapts a weight that embeddings and head share (`tie_word_embeddings`), so a merge would change "
            "both; use it unmerged."
        )
    try:
        merged = adapted.merge_and_unload()
    except (NotImplementedError, RuntimeError) as error:  # kinds that do not fit into the weights
        raise ValueError(f"peft cannot merge {name}: {error}") from error
    merged.generation_config = generation or merged.generation_config
    with new_folder(output) as folder:
        tokenizer.save_pretrained(folder)
        for record in RECORDS:
            file = cached_file(source, record, **QUIETLY)
            if file is not None:
                shutil.copyfile(file, folder / record)
        write_card(folder, output.name, config=merged.config, source=card)
        merged.save_pretrained(folder)
        share_weights(folder)
