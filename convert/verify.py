# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Comparison of the logits of a converted model, at one loop, with the source's."""

import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..configuration_loopmdm import LoopMDMConfig
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .family import Family
from .llama_format import rope_parameters
from .plan import Plan, Result, plan_conversion
from .source import Source, open_source
from .write import make_tensor

# The largest difference allowed in float32 and in float64, relative to the largest logit if that is above 1
TOLERANCE, EXACT = 5e-5, 1e-10
# Fields of config.json that are not passed to transformers' class, or not under their own names
REPLACED = {
    *("architectures", "model_type", "auto_map", "torch_dtype", "dtype"),
    *("rope_theta", "rope_scaling", "layer_types"),
}


def verify_with_transformers(model: LoopMDMForMaskedLM, plan: Plan) -> dict[str, Any]:
    """
    Compares with the source's own weights in the transformers class of its family, with attention over the whole
    sequence (or block by block), on random tokens. Both models run in the dtype of `model`. Returns the entry for
    `conversion.json`. Raises a ValueError if the difference exceeds the tolerance.
    """
    config = model.config
    (embedding,) = plan.recipes["model.embed_tokens.weight"].sources
    num_rows = plan.source.matrix(embedding)[0]
    input_ids = _random_ids(config, min(config.vocab_size, num_rows))
    if plan.tokens.mask_found == "new token":  # the source does not have its row
        input_ids = input_ids.masked_fill(input_ids == config.mask_token_id, 0)
    return _compare_with_reference(model, plan.source, plan.family, num_rows, input_ids, plan.config.dtype)


def verify_export(plan: Result, stored_config: dict[str, Any], num_loops: int, folder: Path) -> list[dict[str, Any]]:
    """
    Compares a folder that [`export_checkpoint`] has written, except for its config.json, with the looped model: in
    float64, after converting it back, and in float32, in transformers' own class of the format, if there is one.
    Returns the entries for `export.json`. Raises a ValueError if a difference exceeds the tolerance.
    """
    written = open_source(folder)
    written.config, dtype = stored_config, plan.config.dtype
    # Loaded in the written dtype first, so that rounding to it does not count as a difference
    looped = LoopMDMForMaskedLM.from_pretrained(plan.source.folder, dtype=dtype).double().eval()
    input_ids = _random_ids(looped.config, looped.config.vocab_size)
    back = plan_conversion(written, family=plan.family, mask_token_id=looped.config.mask_token_id)
    state = {name: make_tensor(back, name) for name in back.shapes}
    plain = LoopMDMForMaskedLM.from_pretrained(None, config=back.config, state_dict=state, dtype=dtype)
    with torch.no_grad():
        logits = plain.double().eval()(input_ids=input_ids, num_loops=1).logits
    del plain, state
    # These logits are aligned already.
    record = _compare(looped, input_ids, logits, num_loops, EXACT, shifts=False)
    found = [{"against": "the written model, converted back", **record}]
    if plan.family.reference is not None:
        vocab_size = looped.config.vocab_size
        found.append(
            _compare_with_reference(looped.float(), written, plan.family, vocab_size, input_ids, dtype, num_loops)
        )
    return found


def _random_ids(config: LoopMDMConfig, num_tokens: int) -> torch.Tensor:
    size = (2, min(32, config.max_position_embeddings))
    return torch.randint(num_tokens, size, generator=torch.Generator().manual_seed(0))


def _compare_with_reference(
    model: LoopMDMForMaskedLM,
    source: Source,
    family: Family,
    num_rows: int,
    input_ids: torch.Tensor,
    written: torch.dtype,
    num_loops: int = 1,
) -> dict[str, Any]:
    config, (batch_size, length) = model.config, input_ids.shape
    reference = _reference_model(source, family, num_rows, model.dtype, written)
    visible = torch.ones(length, length, dtype=torch.bool)
    if config.attention_block_size is not None:
        block = torch.arange(length) // config.attention_block_size
        visible = block[:, None] >= block
    mask = torch.zeros(batch_size, 1, length, length, dtype=model.dtype)
    mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)
    with torch.no_grad():
        logits = reference(input_ids=input_ids, attention_mask=mask).logits
    record = _compare(model, input_ids, logits, num_loops)
    return {"against": f"transformers' {type(reference).__name__}", "transformers": transformers.__version__, **record}


def _reference_model(
    source: Source, family: Family, vocab_size: int, dtype: torch.dtype, written: torch.dtype
) -> nn.Module:
    """
    The source in transformers' own class, without any code of ours. Its weights are rounded to the dtype that was
    asked for (`written`), as that rounding is no fault of the conversion.
    """
    config_class = getattr(transformers, f"{family.reference}Config")
    known = set(config_class().to_dict()) - REPLACED
    settings = {name: value for name, value in source.config.items() if name in known}
    settings |= {"vocab_size": vocab_size, "tie_word_embeddings": "lm_head.weight" not in source}
    if "rope_parameters" in known:
        settings["rope_parameters"] = rope_parameters(source.config)
    config = config_class(**settings)
    config._attn_implementation = "sdpa"
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    weights = {family.reference_name(name): source.read(name).to(written) for name in source.tensors}
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"The source lacks {min(info['missing_keys'])!r}, which {model_class.__name__} has.")
    return model.eval()


def read_reference(path: str | Path, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Reads a file of `convert/write_reference.py`: `input_ids`, `(batch_size, length)` int64, and `logits`,
    `(batch_size, length, vocab_size)`, as the source returns them. Raises a ValueError if the file is damaged, or of
    another vocabulary.
    """
    import numpy

    path = Path(path)
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    # A file of a single array is not a context manager, and a damaged header can claim any size.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    for name, kinds, what in (("input_ids", "iu", "integers"), ("logits", "f", "floating point numbers")):
        if name not in content:
            raise ValueError(f"{path} has no array {name!r}; make it with convert/write_reference.py.")
        if content[name].dtype.kind not in kinds or content[name].size == 0:
            found = f"{content[name].dtype} {content[name].shape}"
            raise ValueError(f"{name!r} in {path} is {found}; it must hold {what}.")
    input_ids, logits = torch.from_numpy(content["input_ids"]).long(), torch.from_numpy(content["logits"])
    if not 0 <= input_ids.min() <= input_ids.max() < vocab_size:
        raise ValueError(f"{path} holds tokens outside the vocabulary of {vocab_size}; is it another model's?")
    if input_ids.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"{path} holds tokens {tuple(input_ids.shape)} and logits {tuple(logits.shape)}; they need shapes "
            "(batch_size, length) and (batch_size, length, vocab_size)."
        )
    return input_ids, logits


def verify_with_file(model: LoopMDMForMaskedLM, path: str | Path) -> dict[str, Any]:
    """Like [`verify_with_transformers`], but compares with the logits in a file, see [`read_reference`]."""
    return {"against": Path(path).name, **_compare(model, *read_reference(path, model.config.vocab_size))}


def _compare(
    model: LoopMDMForMaskedLM,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    num_loops: int = 1,
    tolerance: float = TOLERANCE,
    shifts: bool = True,
) -> dict[str, Any]:
    """Compares all columns that both have, except [MASK]'s, which a LoopMDM never predicts."""
    with torch.no_grad():
        ours = model.eval()(input_ids=input_ids, num_loops=num_loops).logits
    if shifts and model.config.shift_logits:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    columns = torch.arange(min(logits.shape[-1], ours.shape[-1]))
    columns = columns[columns != model.config.mask_token_id]
    logits, ours = logits[..., columns].double(), ours[..., columns].double()
    if not logits.isfinite().all():
        raise ValueError("The reference logits are not finite, so there is nothing to compare; make them in float32.")
    difference, largest = (logits - ours).abs().max().item(), logits.abs().max().item()
    tolerance = tolerance * max(1.0, largest)
    if not difference <= tolerance:
        raise ValueError(
            f"The result differs from the source by {difference:.3g} in its logits (tolerance "
            f"{tolerance:.3g}); nothing was written. If the reference ran in float32, with weights of the "
            "dtype that is written (--dtype), this is a fault of the conversion: please report it."
        )
    return {
        "max_difference": difference,
        "tolerance": tolerance,
        "max_logit": largest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": input_ids.numel(),
    }
