# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Positions and masks that the layers of a forward pass share, and the checks of its inputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask

from .cache_utils import CacheView


@dataclass
class LoopContext:
    """The inputs of the layers in one forward pass over N rows and Q positions, apart from the hidden states."""

    attention_mask: Any = None  # in the attention implementation's format; None: full attention
    position_embeddings: tuple[torch.Tensor, ...] = ()  # with RoPE cosines and sines, (1 or N, Q, head_dim)
    cache: CacheView | None = None
    real: torch.BoolTensor | None = None  # (N, Q), False on padding
    masked: torch.BoolTensor | None = None  # (N, Q), [MASK]s and their predictors; None with `inputs_embeds`
    sources: torch.LongTensor | None = None  # (1 or N, Q), the columns that predict; only with `config.shift_logits`
    queries: torch.LongTensor | None = None  # (N, P), positions to compute outputs for; None: all
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones, for the attention implementation

    @property
    def can_narrow(self) -> bool:
        """Whether rows and queries can be selected from the mask, as in sdpa and eager attention."""
        return self.attention_mask is None or getattr(self.attention_mask, "ndim", 0) == 4

    def narrow(self, rows, positions=None, real=None) -> "LoopContext":
        """Selects rows, `(M,)`, and positions of each, `(M, P)`; positions with `real` False are filler."""

        def pick(values: torch.Tensor | None) -> torch.Tensor | None:
            return values if values is None or values.shape[0] == 1 else values[rows]

        mask, masked = pick(self.attention_mask), pick(self.masked)
        tables = tuple(pick(table) for table in self.position_embeddings)
        if positions is not None:
            mask = narrow_mask(mask, positions)
            masked = None if masked is None else masked.gather(1, positions)
            tables = tuple(take_positions(table, positions) for table in tables)
        cache = None if self.cache is None else self.cache.narrow(rows, positions, real)
        real = pick(self.real) if real is None else real
        return LoopContext(mask, tables, cache, real, masked, arguments=self.arguments)


def narrow_mask(mask: torch.Tensor | None, queries: torch.LongTensor) -> torch.Tensor | None:
    """Selects `queries`, `(batch_size, num_queries)`, from a mask `(1 or batch_size, heads, length, keys)`."""
    if mask is None or mask.shape[2] == 1:
        return mask
    index = queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.expand(queries.shape[0], -1, -1, -1).gather(2, index)


def take_positions(values: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """Selects `positions`, `(batch_size, num_positions)`, from `values`, `(1 or batch_size, length, size)`."""
    # `gather`, because `take_along_dim` cannot be exported with dynamic shapes.
    index = positions[..., None].expand(-1, -1, values.shape[-1])
    return values.expand(positions.shape[0], -1, -1).gather(1, index)


def document_starts(document_ids: torch.LongTensor) -> torch.BoolTensor:
    """Marks the first token of every document, `(batch_size, sequence_length)`, given each token's document id."""
    return nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)


def count_positions(real: torch.Tensor, document_ids: torch.LongTensor | None) -> torch.LongTensor:
    """
    Positions of the `real` (nonzero) tokens, both `(1 or batch_size, length)`, counted from 0 within each packed
    document. Padding is not counted, so it has no effect anywhere in a row.
    """
    count = (real != 0).long().cumsum(-1)
    if document_ids is not None:
        count = count - ((count - (real != 0).long()) * document_starts(document_ids)).cummax(-1).values
    return (count - 1).clamp(min=0)


def predictors(real: torch.Tensor, document_ids: torch.LongTensor | None) -> torch.LongTensor:
    """
    With `config.shift_logits`, the columns whose states predict the tokens, `(1 or batch_size, length)`: the previous
    `real` column, or the column itself at the start of a row or document.
    """
    columns = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    before = nn.functional.pad(torch.where(real != 0, columns, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
    start = torch.zeros_like(columns)
    if document_ids is not None:
        start = (columns * document_starts(document_ids.to(real.device))).cummax(-1).values
    return torch.where(before < start, columns, before)


def make_mask(config, inputs_embeds, attention_mask, position_ids, document_ids, cache) -> Any:
    """
    The attention mask in the attention implementation's format. A query sees no padding; with
    `config.attention_block_size` only its own and earlier blocks; with `document_ids` only its own document; and
    with a cache only the positions within the pass's reach.
    """
    block_size, keys, blocks = config.attention_block_size, inputs_embeds, None
    if block_size is not None:
        blocks = key_blocks = position_ids.expand(inputs_embeds.shape[:2]) // block_size
    if cache is not None:
        places, reach = torch.arange(cache.stop, device=inputs_embeds.device), cache.reach
        is_even = int(reach.min()) == cache.stop
        attention_mask = None if is_even else places < reach.to(places.device)[:, None]
        keys = inputs_embeds.new_empty(1, 1, 1).expand(len(inputs_embeds), cache.stop, 1)  # only its shape matters
        if block_size is not None:
            key_blocks = (places // block_size).expand(len(inputs_embeds), -1)
            # A decoding pass over the last block sees everything. Checking would make an accelerator wait.
            if places.device.type == "cpu" and bool((blocks.amin(-1) >= key_blocks[:, -1]).all()):
                blocks = None

    def is_visible(batch, head, query, key):
        visible = True if document_ids is None else document_ids[batch, query] == document_ids[batch, key]
        return visible if blocks is None else (blocks[batch, query] >= key_blocks[batch, key]) & visible

    is_restricted = blocks is not None or document_ids is not None
    if "flash" in config._attn_implementation and (is_restricted or (cache is not None and not is_even)):
        raise ValueError(
            f"{config._attn_implementation!r} attention cannot be block-causal, see packed documents apart, "
            'or read a cache of uneven rows; call `model.set_attn_implementation("sdpa")`, or "flex_attention".'
        )
    implementation, is_ready = config._attn_implementation, attention_mask is not None and attention_mask.ndim == 4
    if not is_restricted or is_ready or implementation not in ("eager", "sdpa"):
        restriction = is_visible if is_restricted else None
        # Where all queries see the same, one stands for them, as the mask of all would be length times as large.
        queries = inputs_embeds[:, :1] if implementation in ("eager", "sdpa") else inputs_embeds
        return create_bidirectional_mask(config, queries, attention_mask, keys, and_mask_function=restriction)
    # By broadcasting: `create_bidirectional_mask` would use vmap, which can take longer than all layers.
    sizes = *inputs_embeds.shape[:2], keys.shape[1]
    options = {"allow_is_causal_skip": False, "dtype": inputs_embeds.dtype, "device": inputs_embeds.device}
    make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return make(*sizes, mask_function=is_visible, attention_mask=attention_mask, **options)


def one_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Returns the one that is given. Raises a ValueError for none or both, or if it is not a tensor."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if not isinstance(given, torch.Tensor):
        raise ValueError(f'The input is a {type(given).__name__}; give a tensor (`return_tensors="pt"`).')
    return given


def check_shape(name: str, tensor: Any, shape: tuple[int, ...], more: str = "") -> None:
    """Raises a ValueError if `tensor` is given, and is not a tensor of this shape."""
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise ValueError(f'`{name}` is a {type(tensor).__name__}; give a tensor (`return_tensors="pt"`).')
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; the input needs {shape}{more}.")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], more: str = "") -> None:
    """Raises a ValueError if what a rule of the user returned is not a bool tensor of this shape."""
    kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
    if kind != torch.bool or mask.shape != shape:
        found = f"{kind} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else kind
        raise ValueError(f"`{name}` returned {found}; it must return bool of shape {shape}{more}.")


def check_inputs(config, input_ids, inputs_embeds, attention_mask, position_ids, document_ids, cache) -> None:
    """Raises a ValueError for inputs of a wrong type, shape or value."""
    name, inputs = "input_ids" if inputs_embeds is None else "inputs_embeds", one_of(input_ids, inputs_embeds)
    shape, size = tuple(inputs.shape[:2]), inputs.shape[2:]
    if inputs_embeds is None:
        needed = "int64 or int32 of shape (batch_size, sequence_length)"
        is_right = inputs.dtype in (torch.int64, torch.int32) and not size
    else:
        needed = f"floating point of shape (batch_size, sequence_length, {config.hidden_size})"
        is_right = inputs.is_floating_point() and tuple(size) == (config.hidden_size,)
    if not is_right or len(shape) < 2 or 0 in shape:
        found = f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        raise ValueError(f"`{name}` is {found}; it must be {needed}, with at least one row and position.")
    if inputs_embeds is None:
        low, high = _bounds(inputs)
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"`input_ids` holds {bad}, outside the vocabulary of {config.vocab_size} tokens.")
    more = "" if cache is None else ", its own positions without those of a cache"
    is_ready = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and cache is None
    is_shared = isinstance(position_ids, torch.Tensor) and tuple(position_ids.shape) == (1, shape[1])
    check_shape("attention_mask", None if is_ready else attention_mask, shape, more)
    check_shape("document_ids", document_ids, shape)
    check_shape("position_ids", None if is_shared else position_ids, shape, more)
    if attention_mask is not None and attention_mask.ndim == 4 and not attention_mask.is_floating_point():
        implementation, dtype = config._attn_implementation, attention_mask.dtype
        if dtype != torch.bool or implementation != "sdpa":
            needed = "floating point: 0 for what is seen, the lowest number elsewhere (sdpa also takes bool)"
            raise ValueError(f"`attention_mask` is 4-D and {dtype}; {implementation!r} attention needs {needed}.")
    if cache is not None and document_ids is not None:
        raise ValueError("`document_ids` and `past_key_values` do not go together: packed rows are not cached.")
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if document_ids is not None and rope_type in ("dynamic", "longrope"):
        needed = "rotary frequencies that no length changes; give every document a row of its own"
        raise ValueError(f"`document_ids` is given, and `rope_type` is {rope_type!r}; packed rows need {needed}.")
    if position_ids is not None and position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`position_ids` is {position_ids.dtype}; it must be int64 or int32.")
    # Rotary positions may exceed the limit, some kinds by design ("dynamic"); learned positions may not.
    if config.position_embedding_type == "learned":
        limit, first, last = config.max_position_embeddings, 0, shape[1] - 1 + (0 if cache is None else cache.length)
        if position_ids is not None:
            first, last = _bounds(position_ids)
        if first < 0:
            raise ValueError(f"`position_ids` holds {first}; positions are counted from 0.")
        if last >= limit:
            needed = f"more than `max_position_embeddings` ({limit}); shorten it"
            raise ValueError(f"The input has {last + 1} positions, {needed}.")


def check_positions_to_keep(keep: int | torch.Tensor, inputs: torch.Tensor) -> None:
    """Raises a ValueError if `logits_to_keep` does not name positions of the inputs, `(batch_size, length)`."""
    fits = isinstance(keep, int) and keep >= 0
    if isinstance(keep, torch.Tensor):
        is_integer = keep.dtype in (torch.int64, torch.int32)
        fits = is_integer and (keep.ndim == 1 or (keep.ndim == 2 and keep.shape[0] == inputs.shape[0]))
        if fits and inputs.ndim > 1:
            low, high = _bounds(keep)
            fits = low >= (-inputs.shape[1] if keep.ndim == 1 else 0) and high < inputs.shape[1]
    if not fits:
        found = keep if not isinstance(keep, torch.Tensor) else f"{keep.dtype} of shape {tuple(keep.shape)}"
        raise ValueError(
            f"`logits_to_keep` is {found}; it must be a number of last positions (0: all), or integer positions "
            "within the input, of shape (num_positions,) or (batch_size, num_positions)."
        )


def _bounds(values: torch.Tensor) -> tuple[int, int]:
    """The least and the largest value; 0 and -1 if reading them would make an accelerator wait or break a graph."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
        return 0, -1
    low, high = torch.stack(values.aminmax()).tolist()
    return low, high


__all__ = ["LoopContext"]
