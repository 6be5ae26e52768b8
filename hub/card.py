# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
The card of a model: README.md, with metadata for the Hub, made from the records in the model's folder. All its figures
were measured.
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..configuration_loopmdm import LoopMDMConfig
from ..data import adapter_base, write_atomically
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..weight_files import read_json
from .sections import BUDGET, how_it_was_made, is_hub_data, limits, most_loops, paragraph, unrolled, what_loops_buy
from .snippet import loading_snippet
from .source import SourceCard, read_metadata

CARD = "README.md"
# The source's card, in the folder of a converted model
SOURCE_CARD = "README.source.md"
# This line identifies a card that was written here. Its checksum tells whether the user has edited the card.
_MARK = re.compile(r"<!-- written by loopmdm, which replaces it while it is as written: ([0-9a-f]{16}) -->")
_TAGS = ["masked-diffusion", "diffusion-language-model", "looped-transformer", "recurrent-depth"]


def is_own_card(folder: str | Path) -> bool:
    """
    Whether [`write_card`] may write the folder's README.md: there is none, or it was written by this function and has
    not been changed since. Changes of the metadata do not count, since they are kept.
    """
    file = Path(folder) / CARD
    if not file.exists():
        return True
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    block = REGEX_YAML_BLOCK.search(text)
    body = text[block.end() :] if block else text
    marks = _MARK.findall(body)
    return len(marks) == 1 and marks[0] == _checksum(_MARK.sub("", body))


def write_card(
    folder: str | Path,
    name: str | None = None,
    *,
    config: LoopMDMConfig | None = None,
    source: SourceCard | None = None,
    training: dict[str, Any] | None = None,
    conversion: dict[str, Any] | None = None,
) -> Path | None:
    """
    Writes the README.md of a model or adapter, from config.json, training.json, conversion.json and loop_budget.json
    in its folder. Metadata of an earlier README.md are kept, except for the results.

    Args:
        folder: The model's folder.
        name (`str`, *optional*, defaults to the folder's name): The model's name in the card and its example.
        config ([`LoopMDMConfig`], *optional*): The model's configuration, if it is not in the folder yet.
        source ([`SourceCard`], *optional*): The card of the model that this one is made from; its licence is kept.
        training, conversion (`dict`, *optional*): The contents of training.json and conversion.json, if they are not
            in the folder yet.

    Returns:
        `Path`: The file; None if README.md is the user's, which is not changed.

    Raises:
        ValueError: The folder does not hold a model, or its records are damaged.
    """
    folder = Path(folder)
    if not is_own_card(folder):
        return None
    base = None if config is not None else adapter_base(str(folder))
    config = config or LoopMDMConfig.from_pretrained(base or folder)
    name = name or folder.absolute().name
    records = {
        "training": training or read_json(folder / "training.json"),
        "conversion": conversion or read_json(folder / "conversion.json"),
        "budget": read_json(folder / BUDGET),
    }
    origin = source or SourceCard()
    _keep(folder, origin, with_text=conversion is not None)
    table, results = what_loops_buy(records, config, name)
    file = folder / CARD
    before = read_metadata(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept = {key: value for key, value in before.items() if key != "model-index"}
    made = kept or _metadata(folder, origin, records["training"])
    data = ModelCardData(**made | ({"model_name": name, "eval_results": results} if results else {}))
    with torch.device("meta"):
        num_parameters = LoopMDMForMaskedLM(config).num_parameters()
    body = "\n".join(
        [
            f"# {name.rpartition('/')[2]}\n",
            _introduction(config, num_parameters, (folder / "adapter_config.json").is_file()),
            loading_snippet(folder, name, config, most_loops(records, config)),
            table,
            how_it_was_made(records, config, data.to_dict().get("base_model"), (folder / SOURCE_CARD).is_file()),
            limits(records, config),
        ]
    )
    return _write(file, data, body)


def write_export_card(
    folder: str | Path, name: str, record: dict[str, Any], config: LoopMDMConfig, source: SourceCard
) -> Path:
    """
    Writes the README.md of a model whose loops have been exported as layers, and returns its path.

    Args:
        folder: The folder of the exported model.
        name (`str`): The model's name in the card.
        record (`dict`): The contents of `export.json`.
        config ([`LoopMDMConfig`]): The configuration of the exported model as a LoopMDM without loops.
        source ([`SourceCard`]): The card of the looped model; its licence is kept.
    """
    folder = Path(folder)
    _keep(folder, source)
    body = "\n".join([f"# {name}\n", *unrolled(record, config, (folder / SOURCE_CARD).is_file())])
    return _write(folder / CARD, ModelCardData(**_metadata(folder, source, {})), body)


def _keep(folder: Path, source: SourceCard, with_text: bool = True) -> None:
    """Copies the licences of a source, and its card under another name."""
    for file in source.license_files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if with_text and source.text is not None:
        (folder / SOURCE_CARD).write_text(source.text, encoding="utf-8")


def _write(file: Path, data: ModelCardData, body: str) -> Path:
    mark = _MARK.pattern.replace("([0-9a-f]{16})", _checksum(body))
    write_atomically(file, f"---\n{data.to_yaml()}\n---\n\n{body}\n{mark}\n")
    return file


def _checksum(body: str) -> str:
    """A checksum of the text without kinds of line ends, and without white space at both ends."""
    return hashlib.sha256("\n".join(body.strip().splitlines()).encode()).hexdigest()[:16]


def _metadata(folder: Path, origin: SourceCard, training: dict[str, Any]) -> dict[str, Any]:
    is_adapter = (folder / "adapter_config.json").is_file()
    run = training.get("run", {})
    data = run.get("data") or []
    names = [one for one in ([data] if isinstance(data, str) else data) if is_hub_data(one)]
    # The Hub's names for relations; it has none for a conversion.
    relation = "adapter" if is_adapter else "finetune" if run else None
    return {
        **origin.metadata,
        "base_model": origin.hub_id,
        "base_model_relation": relation if origin.hub_id else None,
        "datasets": names or None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS,
    }


def _introduction(config: LoopMDMConfig, num_parameters: int, is_adapter: bool) -> str:
    last = config.loop_end - 1
    layers = f"layers {config.loop_start} to {last} are" if last > config.loop_start else f"layer {last} is"
    what, which = ("An adapter of a", "The model") if is_adapter else ("A", "It")
    return paragraph(
        f"{what} looped masked diffusion language model ([LoopMDM](https://arxiv.org/abs/2605.26106)): it writes text "
        f"by filling in `[MASK]` tokens over several denoising steps. {which} has {num_parameters:,} parameters in "
        f"{config.num_hidden_layers} layers. Of these, {layers} looped (the first is 0): applied `num_loops` times "
        "with the same weights in every forward pass. You choose `num_loops` when you run it."
    )
