# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A looped model written as a plain one: its loops as layers, in the format of a family of checkpoints."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from ..configuration_loopmdm import LoopMDMConfig, check_num_loops
from ..data import write_json
from ..hub import write_export_card
from ..weight_files import read_json
from .families import FAMILIES
from .family import MODEL_FIELDS, TOKEN_FIELDS, Family, Recipe, copy, zeros
from .plan import Result, in_words, result_dtype, saved_tensors
from .source import Source, StoredTensor, open_source
from .tokenizer import SpecialTokens, TokenizerFiles, load_tokenizer, token_ids, write_tokenizer
from .verify import verify_export
from .write import check_output, check_shard_size, check_space, new_folder, write_weights

BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "lm_head_bias")


@dataclass
class Export(Result):
    """
    Everything about an export that can be known before it is done.

    Args:
        num_loops (`int`): How many loops become layers.
        origins (`list[int]`): For every layer of the result that of the looped model.
        stored_config (`dict`): config.json of the result.
    """

    num_loops: int
    origins: list[int]
    stored_config: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """What `export.json` keeps."""
        return {
            "format": self.family.name,
            "num_loops": self.num_loops,
            "layers": len(self.origins),
            "layers_from": self.origins,
            "parameters": sum(tensor.numel() for tensor in self.shapes.values()),
            **super().record(),
        }


def formats() -> dict[str, Family]:
    """The families whose format can be written, by name."""
    return {family.name: family for family in FAMILIES if family.stored is not None}


def export_checkpoint(
    model: str | Path,
    output: str | Path,
    *,
    num_loops: int | None,
    format: str | None = None,
    verify: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> dict[str, Any]:
    """
    Writes a LoopMDM as a plain model in a published format, with the loops as layers. It computes what the looped
    model does at `num_loops`, for engines that know nothing of loops, and has as many parameters as layers are
    executed.

    Args:
        model: A folder, or an id on the Hugging Face Hub.
        output: The folder to write, which must not exist. It appears complete or not at all.
        num_loops (`int`): How many loops become layers.
        format (`str`, *optional*): A name of [`formats`]; by default the family that the model was converted from, or
            else the first whose layers are the model's.
        verify (`bool`): Convert the result back and compare logits in float64, and, where transformers has a class of
            its own for the format, with that in float32. Both models are then in memory.
        dtype (`"float32"`, `"bfloat16"`, `"float16"`, *optional*): By default the model's.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): Largest file of weights, and the memory that is used.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        trust_remote_code (`bool`): Run the code that the tokenizer brings along, to check that it loads.
        progress (`Callable`): Called with what is being done, and how much is done of how much.

    Returns:
        `dict`: What is also written to `export.json`.

    Raises:
        `ValueError`: For damped loops, adapters, and whatever the format cannot express. Nothing is left then.
    """
    output = Path(output).expanduser()
    check_output(output)
    check_shard_size(max_shard_size)
    plan = plan_export(model, num_loops, format, dtype, revision, trust_remote_code)
    check_space(plan, output)
    with new_folder(output) as folder:
        write_weights(plan, folder, max_shard_size, lambda done, total: progress("writing", done, total))
        write_tokenizer(plan.tokenizer, plan.tokens, folder)
        GenerationConfig(**plan.tokens.ids()).save_pretrained(folder)
        found = verify_export(plan, plan.stored_config, plan.num_loops, folder) if verify else []
        record = {**plan.record(), "verification": found}
        write_json(folder / "export.json", record)
        write_export_card(folder, output.name, record, plan.config, plan.source.card)
        # Last of all: a folder without it does not load.
        write_json(folder / "config.json", plan.stored_config)
    return record


def plan_export(
    model: str | Path,
    num_loops: int | None,
    format: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """Plans an export, without reading weights. As [`export_checkpoint`]."""
    if num_loops is None:
        raise ValueError("The number of loops to write out is missing; give `num_loops`.")
    check_num_loops(num_loops)
    if format is not None and format not in formats():
        raise ValueError(f"There is no format {format!r} to write; there are {', '.join(formats())}.")
    source = open_source(model, revision)
    config = _read_config(source)
    with in_words(source):
        for name in set(TOKEN_FIELDS) - {"mask_token_id"}:  # training records learnt turn ends there
            if source.generation_config.get(name) not in (None, []):
                setattr(config, name, source.generation_config[name])
    if config.loop_update == "damped" and num_loops > 1:
        raise ValueError(
            f'The loops of {model} are damped (`loop_update` "damped"): they add a part of what mid changes, which no '
            "plain layer does. Export one loop (--num-loops 1), or train the model with `loop_update` "
            '"replace".'
        )
    loop = list(range(config.loop_start, config.loop_end))
    origins = [*range(config.loop_start), *loop * num_loops, *range(config.loop_end, config.num_hidden_layers)]
    unrolled = _unrolled(config, len(origins))
    family = formats()[format] if format is not None else _nearest(source, unrolled)
    unrolled = _fitted(unrolled, family)
    tokenizer = TokenizerFiles(source.folder)
    mask_token = tokenizer.token_of(config.mask_token_id)
    tokens = SpecialTokens(mask_token=mask_token, mask_found="config.json", **_ids(config))
    loaded = load_tokenizer(source, tokenizer, tokens, trust_remote_code)
    token_ids(source, tokenizer, loaded, config.vocab_size)  # checks them
    recipes, shapes, same = _recipes(source, config, unrolled, family, origins)
    unrolled.dtype = getattr(torch, result_dtype(source, recipes, dtype))
    return Export(
        source=source,
        config=unrolled,
        recipes=recipes,
        copies=same,
        shapes={name: tensor.to(unrolled.dtype) for name, tensor in shapes.items()},
        family=family,
        num_loops=num_loops,
        origins=origins,
        stored_config=_stored_config(unrolled, family),
        tokens=tokens,
        tokenizer=tokenizer,
    )


def _read_config(source: Source) -> LoopMDMConfig:
    if "LoopMDMForMaskedLM" not in source.architectures:
        found = ", ".join(source.architectures) or "no architecture named in a config.json"
        raise ValueError(f"{source.name} ({found}) is not a LoopMDM; only its loops can be written as layers.")
    with in_words(source):
        return LoopMDMConfig.from_dict(source.config)


def _unrolled(config: LoopMDMConfig, num_layers: int, **changes: Any) -> LoopMDMConfig:
    """The configuration of the plain model: one loop, of all layers."""
    loop = {"loop_start": 0, "loop_end": num_layers, "num_loops": 1, "max_train_loops": 1, "loop_update": "replace"}
    try:
        return LoopMDMConfig.from_dict(config.to_dict() | {"num_hidden_layers": num_layers} | loop | changes)
    except StrictDataclassError as error:
        reason = error.__cause__ or error
        raise ValueError(f"With its loops as layers the model has {num_layers}: {reason} Take fewer loops.") from error


def _ids(config: LoopMDMConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TOKEN_FIELDS}


def _stored_config(config: LoopMDMConfig, family: Family) -> dict[str, Any]:
    return {
        **(family.stored or {}),
        **family.stored_config(config),
        **_ids(config),
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


class _Inexpressible(ValueError):
    """Says `what` of a model a format cannot express, and why."""

    def __init__(self, family: Family, what: str, why: object):
        self.what = what
        super().__init__(f"The format {family.name} cannot express {what}: {why}")


def _fitted(config: LoopMDMConfig, family: Family) -> LoopMDMConfig:
    """
    The configuration with the biases that the format always has, which will be zero. Raises a ValueError, which names
    the property, where the format cannot express the model: what is written would be read as another one.
    """

    def refuse(name: str, value: Any) -> ValueError:
        others = ", ".join(other for other in formats() if other != family.name)
        why = f"its models have {value!r}. Others are {others}."
        return _Inexpressible(family, f"`{name}` {getattr(config, name)!r}", why)

    changes = {}
    for name, value in family.stored_properties(config).items():
        if getattr(config, name) == value:
            continue
        if name not in BIASES or not value:
            raise refuse(name, value)
        changes[name] = True
    if changes:
        config = _unrolled(config, config.num_hidden_layers, **changes)
    stored = {
        family.stored_name(name): StoredTensor(tuple(tensor.shape), torch.float32, tensor.detach)
        for name, tensor in saved_tensors(config).items()
    }
    written = Source("the result", Path(), Path(), stored, _stored_config(config, family))
    given = {"mask_token_id": config.mask_token_id, "loop_start": 0, "loop_end": config.num_hidden_layers}
    try:
        with in_words(written):
            read = LoopMDMConfig(**family.config(written) | given)
    except ValueError as error:
        raise _Inexpressible(family, "this model", error) from error
    for name in sorted(MODEL_FIELDS - {"initializer_range"}):
        # Rotation in float32 or in the model's dtype is a matter of rounding, but for rounded tables.
        is_rounding = name == "rope_precision" and "bfloat16" not in (read.rope_precision, config.rope_precision)
        if getattr(read, name) != getattr(config, name) and not is_rounding:
            raise refuse(name, getattr(read, name))
    return config


def _nearest(source: Source, config: LoopMDMConfig) -> Family:
    """The format that the model was converted from, or else the one that expresses it with the fewest zeros."""
    came_from = read_json(source.folder / "conversion.json").get("family")
    if came_from in formats():
        return formats()[came_from]
    fitting: dict[str, int] = {}
    lacking: Counter[str] = Counter()
    for family in formats().values():
        try:
            fitted = _fitted(config, family)
        except _Inexpressible as error:
            lacking[error.what] += 1
            continue
        fitting[family.name] = sum(getattr(fitted, name) != getattr(config, name) for name in BIASES)
    if not fitting:
        ((what, count),) = lacking.most_common(1)
        how = "none can" if count == len(formats()) else f"{count} of {len(formats())} cannot"
        raise ValueError(
            f"No format expresses {source.name}: {how} express {what}. Write ONNX graphs instead, which are looped by "
            "who runs them (--format onnx)."
        )
    return formats()[min(fitting, key=lambda name: fitting[name])]


def _recipes(
    source: Source, config: LoopMDMConfig, unrolled: LoopMDMConfig, family: Family, origins: list[int]
) -> tuple[dict[str, Recipe], dict[str, torch.Tensor], dict[str, str]]:
    """How the result's tensors are made, what they look like, and which of the source's are copies of others."""
    needed = {name: tuple(tensor.shape) for name, tensor in saved_tensors(config).items()}
    for name, shape in needed.items():
        if source.shape(name) != shape:
            raise ValueError(f"{name!r} of {source.name} has shape {source.shape(name)}; its config asks for {shape}.")
    same = {}
    if config.tie_word_embeddings and "lm_head.weight" in source:
        same["lm_head.weight"] = "model.embed_tokens.weight"
    surplus = sorted(source.tensors.keys() - needed.keys() - same.keys())
    if surplus:
        raise ValueError(f"{source.name} has the tensor {surplus[0]!r}, which its config has no place for.")
    recipes, shapes = {}, {}
    for name, tensor in saved_tensors(unrolled).items():
        origin = re.sub(r"(?<=^model\.layers\.)\d+", lambda match: str(origins[int(match[0])]), name)
        stored = family.stored_name(name)
        # What the model lacks are the biases that the format always has.
        recipes[stored] = copy(origin) if origin in source else zeros(like=origin.replace(".bias", ".weight"))
        shapes[stored] = tensor
    return recipes, shapes, same
