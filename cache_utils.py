# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Keys and values that outlive a forward pass: [`LoopMDMCache`], which knows that a layer runs once for every loop.

Two uses. With block-causal attention the keys and values of finished blocks never change again, and storing them is
exact. With attention over the whole sequence they do change with every commitment, and reading those of an earlier
denoising step is an approximation (Fast-dLLM, arXiv 2505.22618).
"""

import copy
import math
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_loopmdm import LoopMDMConfig, check_num_loops


class HostCopy:
    """A tensor on its way to the host: on the CPU it is there, from CUDA it is copied without waiting for it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.event = tensor, None
        if tensor.device.type == "cuda":
            self.tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def get(self) -> torch.Tensor:
        """The copy, waiting for it if it has not arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor.cpu()


class LayerMemory(NamedTuple):
    """
    One layer's part of a cache, as seen by a forward pass over N rows and Q positions.

    Args:
        keys, values (`torch.Tensor` of shape `(batch_size, num_key_value_heads, max_length + 1, head_dim)`):
            Stored by position. The last place takes what filler positions write, and is never read.
        rows (`torch.LongTensor` of shape `(N,)`, *optional*): Rows of the cache that the pass is about; by default
        all. places (`torch.LongTensor` of shape `(Q,)` or `(N, Q)`): Where the pass writes its own keys and values.
        stop (`int`): Places below this are attended to, as far as the attention mask allows.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor | None
    places: torch.Tensor
    stop: int


def remember(memory: LayerMemory, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stores `(N, heads, Q, head_dim)` and returns all that the pass attends to, `(N, heads, stop, head_dim)`."""
    read = []
    for stored, new in ((memory.keys, key), (memory.values, value)):
        new = new.detach().to(stored.dtype)
        if memory.places.ndim == 1 and memory.rows is None:
            stored.index_copy_(2, memory.places, new)
        else:
            rows = memory.rows
            if rows is None:
                rows = torch.arange(new.shape[0], device=new.device)
            stored[rows[:, None], :, memory.places.expand(new.shape[0], -1)] = new.transpose(1, 2)
        kept = stored[:, :, : memory.stop]
        read.append(kept if memory.rows is None else kept[memory.rows])
    return read[0], read[1]


class LoopMDMCacheLayer(CacheLayerMixin):
    """Keys and values of one executed layer, `(batch_size, heads, max_length + 1, head_dim)`, by position."""

    is_sliding = False

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length

    def allocate(self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        # Zeros, since places that were never written are masked, and 0 * NaN would be NaN all the same.
        shape = (batch_size, num_heads, self.max_length + 1, head_dim)
        self.dtype, self.device = dtype, device
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, num_heads, _, head_dim = key_states.shape
        self.allocate(batch_size, num_heads, head_dim, key_states.dtype, key_states.device)

    def grow(self, max_length: int) -> None:
        """Makes room for `max_length` positions and keeps what is stored."""
        if self.is_initialized:
            keys, values, stored = self.keys, self.values, self.max_length
            self.max_length = max_length
            self.allocate(keys.shape[0], keys.shape[1], keys.shape[3], self.dtype, self.device)
            self.keys[:, :, :stored], self.values[:, :, :stored] = keys[:, :, :stored], values[:, :, :stored]
        self.max_length = max_length

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("A LoopMDMCache is written by position; see `LoopMDMCache.open`.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_seq_length(self) -> int:
        return self.max_length if self.is_initialized else 0  # `LoopMDMCache` knows how many of them are used

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class LoopMDMCache(Cache):
    """
    A depth-aware cache: keys and values by position, for every executed layer, so that loop s of mid finds those of
    loop s. The `num_hidden_layers + (num_loops - 1) * |mid|` layers lie in executed order: head, mid of every loop,
    tail.

    Give it to `forward` (or let `generate` make one) as `past_key_values`: the pass attends to the stored positions
    and to its own, which it writes behind them. With `use_cache=True` its positions stay stored; without, the next
    pass writes over them, as denoising steps do with a block that is not finished.

    With block-causal attention (`config.attention_block_size`) storing finished blocks is exact. It needs the same
    `num_loops` for all of them, and none that were still [MASK].

    Args:
        config ([`LoopMDMConfig`]): Of the model that will fill it.
        num_loops (`int`): Applications of mid that the keys and values come from.
        batch_size (`int`): Number of rows.
        max_length (`int`): Positions per row; it grows when more are needed.
        share_loops (`bool`, defaults to `False`):
            One place for all loops of mid, which holds the keys and values of the last loop that wrote them. An
            approximation which needs the memory of a model without loops.
    """

    def __init__(
        self, config: LoopMDMConfig, num_loops: int, batch_size: int, max_length: int, share_loops: bool = False
    ):
        self.config = config
        self.num_loops = check_num_loops(num_loops)
        self.share_loops = share_loops
        self.max_length = max_length
        num_slots = config.num_executed_layers(1 if share_loops else num_loops)
        super().__init__(layers=[LoopMDMCacheLayer(max_length) for _ in range(num_slots)])
        self.lengths = torch.zeros(batch_size, dtype=torch.long)  # stored positions of every row
        self.length = 0  # the most of them, known without asking the device
        # What is stored, (batch_size, max_length + 1), -1 where unknown
        self.tokens = torch.full((batch_size, max_length + 1), -1)
        self.rows: torch.Tensor | None = None  # rows that the next passes are about; see `select`
        self._origin: LoopMDMCache = self  # what `select` was called on
        self.last_state: torch.Tensor | None = None  # see `keep_state`
        self._reserved: int | None = None
        self._model: weakref.ref | None = None
        self._versions = 0
        self._visible_loops: int | None = None

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @staticmethod
    def num_bytes(
        config: LoopMDMConfig, num_loops: int, batch_size: int, length: int, dtype: torch.dtype, share_loops=False
    ) -> int:
        """
        Memory of a cache: `2 * batch_size * (length + 1) * num_key_value_heads * head_dim * element_size` for each of
        the executed layers.
        """
        layers = config.num_executed_layers(1 if share_loops else num_loops)
        size = config.num_key_value_heads * config.head_dim * dtype.itemsize
        return 2 * batch_size * (length + 1) * size * layers

    def slot(self, layer_idx: int, loop: int) -> int:
        """Index in `layers` of a physical layer in the given loop (counted from 0; only mid's layers care)."""
        if layer_idx < self.config.loop_start:
            return layer_idx
        loops = 1 if self.share_loops else self.num_loops
        past = loop if layer_idx < self.config.loop_end else loops - 1
        return layer_idx + min(past, loops - 1) * self.config.num_mid_layers

    def open(self, position_ids: torch.Tensor, real: torch.Tensor | None) -> "OpenCache":
        """
        Prepares a pass over `position_ids`, `(1 or N, Q)`; `real`, `(N, Q)`, is False on filler, which is stored
        nowhere. `stop`, how far the pass reaches, is read from them unless `select` was told.
        """
        stop = self._reserved
        if stop is None:
            stop = int(position_ids.max() if real is None else position_ids.masked_fill(real == 0, -1).max()) + 1
            stop = max(stop, self.length)
        self._make_room(stop)
        places = position_ids
        if real is not None:
            places = torch.where(real.bool(), position_ids, self.max_length)
        elif position_ids.shape[0] == 1:
            places = position_ids[0]
        last = position_ids if real is None else position_ids.masked_fill(real == 0, -1)
        stored = self.row_lengths(last.device)
        lengths = torch.maximum(stored, last.amax(-1) + 1)
        if self.config.shift_logits and self.config.attention_block_size is not None:
            # A pass over a block begins with the position before it, whose keys and values stay as they are.
            places = torch.where(position_ids < stored[:, None], self.max_length, places)
        return OpenCache(self, places, stop, lengths)

    def _make_room(self, stop: int) -> None:
        if self._origin is not self:
            self._origin._make_room(stop)
            self.max_length, self.tokens = self._origin.max_length, self._origin.tokens
        elif stop > self.max_length:
            for layer in self.layers:
                layer.grow(stop)
            # The last column is that of filler.
            self.tokens = torch.nn.functional.pad(self.tokens[:, :-1], (0, stop + 1 - self.max_length), value=-1)
            self.max_length = stop

    def select(self, rows: torch.Tensor | None, stop: int | None = None) -> "LoopMDMCache":
        """
        The same cache, for passes over some of its rows, `(N,)`, that reach to position `stop` (by default they ask
        the device). It shares the stored tensors.
        """
        view = copy.copy(self)
        view.rows, view._reserved = rows, stop
        return view

    def store(self, lengths: torch.Tensor, length: int, tokens: torch.Tensor | None, places: torch.Tensor) -> None:
        """
        Keeps the first `lengths`, `(batch_size,)`, written positions; `length` is the most of them. `tokens`,
        `(batch_size, Q)`, are those at `places`, or None if they came as embeddings.
        """
        self.lengths, self.length = lengths, max(self.length, length)
        self.tokens = self.tokens.to(lengths.device)
        places = places.expand(self.batch_size, -1)
        self.tokens.scatter_(1, places, torch.full_like(places, -1) if tokens is None else tokens)

    def row_lengths(self, device: torch.device) -> torch.LongTensor:
        """Stored positions of the rows that the next pass is about, `(N,)`."""
        self.lengths = self.lengths.to(device)
        return self.lengths if self.rows is None else self.lengths[self.rows]

    def set_lengths(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Says how many positions of `rows`, `(N,)`, stay stored from now on, `(N,)`."""
        self.lengths = self.lengths.to(lengths.device).index_copy(0, rows, lengths)

    def keep_state(self, hidden_states: torch.Tensor, real: torch.Tensor | None) -> None:
        """
        With `config.shift_logits`: keeps the output state of every row's last stored position, which predicts the
        first position of the next pass. `hidden_states` `(N, Q, hidden_size)`, `real` `(N, Q)` False on padding.
        """
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        last = columns[-1:].expand(hidden_states.shape[0]) if real is None else (columns * (real != 0)).amax(-1)
        state = hidden_states.take_along_dim(last[:, None, None], dim=1).squeeze(1)
        if real is not None and self.last_state is not None:
            state = torch.where((real != 0).any(-1, keepdim=True), state, self.last_state)
        self.last_state = state

    def state_before(self) -> torch.Tensor | None:
        """The state that `keep_state` kept for the rows of the next pass, `(N, hidden_size)`."""
        return self.last_state if self.rows is None or self.last_state is None else self.last_state[self.rows]

    def crop(self, max_length: int) -> None:
        """
        Forgets all but the first `max_length` positions of every row, or with a negative number so many at the end.
        With block-causal attention only whole blocks are kept.
        """
        keep = max(self.length + max_length, 0) if max_length < 0 else max_length
        block_size = self.config.attention_block_size or 1
        keep = keep // block_size * block_size
        if self.length > keep:
            self.lengths, self.length, self.last_state = self.lengths.clamp(max=keep), keep, None

    def reset(self) -> None:
        self.lengths, self.length, self.last_state = torch.zeros_like(self.lengths), 0, None
        self.tokens = torch.full_like(self.tokens, -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def _map_rows(self, change) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
        for name in ("lengths", "tokens", "last_state"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def check(self, model: torch.nn.Module, batch_size: int, num_loops: int, visible_loops: int | None = None) -> None:
        """Raises a ValueError where the model, its weights, the rows or the loops are not those that filled it."""
        if self._reserved is not None:  # a selection that `generate` made of a cache that it has checked
            return
        rows = self.batch_size if self.rows is None else self.rows.shape[0]
        if batch_size != rows:
            raise ValueError(f"`past_key_values` holds {rows} rows and the input has {batch_size}; they must agree.")
        if num_loops != self.num_loops and not self.share_loops:
            raise ValueError(
                f"`past_key_values` was made with num_loops={self.num_loops} and is used with {num_loops}; the keys "
                "and values of other loops are different ones. Use the same number, or start a new cache."
            )
        owner = self._origin
        known = owner._model is not None
        if self.config is not model.config or (known and owner._model() is not model):
            raise ValueError("`past_key_values` was filled by another model; start a new cache for this one.")
        versions = _weight_versions(model)
        if known and owner.length > 0 and versions != owner._versions:
            raise ValueError(
                "`past_key_values` was filled before the model's weights changed; start a new cache with the weights "
                "as they are now."
            )
        if known and owner.length > 0 and visible_loops != owner._visible_loops:
            raise ValueError(
                f"`past_key_values` was filled with visible_loops={owner._visible_loops} and is used with "
                f"{visible_loops}; stored tokens have looped otherwise. Use the same number, or start a new cache."
            )
        owner._model, owner._versions, owner._visible_loops = weakref.ref(model), versions, visible_loops

    def __deepcopy__(self, memo):
        new = copy.copy(self)
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            # The model that filled it, and its config, stay the same objects.
            new.__dict__[name] = value if name in ("_model", "config") else copy.deepcopy(value, memo)
        return new


class OpenCache:
    """A cache during one forward pass over N rows and Q positions: where the pass writes and what it reads."""

    def __init__(
        self,
        cache: LoopMDMCache,
        places: torch.Tensor,
        stop: int,
        lengths: torch.Tensor,
        rows: torch.Tensor | None = None,
    ):
        self.cache, self.places, self.stop, self.lengths = cache, places, stop, lengths
        self.rows = cache.rows if rows is None else rows  # of the cache; None: all

    def layer(self, layer_idx: int, loop: int, hidden_states: torch.Tensor) -> LayerMemory:
        """The memory of a physical layer in the given loop."""
        stored = self.cache.layers[self.cache.slot(layer_idx, loop)]
        if not stored.is_initialized:
            config, device = self.cache.config, hidden_states.device
            in_autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if in_autocast else hidden_states.dtype
            stored.allocate(self.cache.batch_size, config.num_key_value_heads, config.head_dim, dtype, device)
        return LayerMemory(stored.keys, stored.values, self.rows, self.places, self.stop)

    def narrow(
        self, rows: torch.Tensor | None, queries: torch.Tensor | None, real: torch.Tensor | None
    ) -> "OpenCache":
        """
        For a part of the pass: some of its rows, `(M,)`, and of their positions, `(M, P)`, which are filler where
        `real` is False.
        """
        places = self.places if rows is None or self.places.ndim == 1 else self.places[rows]
        if queries is not None:
            places = places.expand(queries.shape[0], -1).gather(1, queries).masked_fill(~real, self.cache.max_length)
        if rows is None:
            rows = self.rows
        elif self.rows is not None:
            rows = self.rows[rows]
        return OpenCache(self.cache, places, self.stop, self.lengths, rows)

    def carry(self, loop: int) -> None:
        """Copies the pass's positions from the loop before into `loop`, where the two have places of their own."""
        cache = self.cache
        for layer_idx in range(cache.config.loop_start, cache.config.loop_end):
            before, after = (cache.layers[cache.slot(layer_idx, number)] for number in (loop - 1, loop))
            if before is after:
                return
            if not after.is_initialized:
                after.allocate(*before.keys.shape[:2], before.keys.shape[3], before.dtype, before.device)
            for source, target in ((before.keys, after.keys), (before.values, after.values)):
                if self.places.ndim == 1 and self.rows is None:
                    target.index_copy_(2, self.places, source.index_select(2, self.places))
                else:
                    rows = torch.arange(source.shape[0], device=source.device) if self.rows is None else self.rows
                    places = self.places.expand(rows.shape[0], -1)
                    target[rows[:, None], :, places] = source[rows[:, None], :, places]


def _weight_versions(model: torch.nn.Module) -> int:
    """Changes whenever a weight is written to."""
    return sum(parameter._version for parameter in model.parameters() if not parameter.is_inference())


class ForwardPass(NamedTuple):
    """
    A forward pass of `generate`: for every one of its `rows`, the real positions from `starts` to `stops` are
    computed, and all before `keys` are attended to. `adaptive`: whether `loop_tolerance` applies to it.
    """

    rows: list[int]
    starts: list[int]
    stops: list[int]
    keys: list[int]
    cache: LoopMDMCache | None
    adaptive: bool = True


class PassPlanner:
    """
    Which positions every denoising step has to compute, and what it reads from a cache instead. Positions are a row's
    real ones, counted from 0, so that padding does not matter.

    Args:
        config ([`LoopMDMConfig`]): Of the model.
        starts, lengths (`list[int]`): Of every row, where its first block begins and how many positions it has.
        block_length (`int`): Positions per block.
        cache_implementation (`str`, *optional*): `"prefix"` or `"dual"`, the approximations for whole-sequence
        attention. use_cache (`bool`): Whether a block-causal model stores finished blocks.
        refresh_interval (`int`, *optional*): Denoising steps between passes over everything; once a block by default.
        share_loops (`bool`): Whether an approximate cache has one place for all loops of mid.
        max_loops (`int`): The most loops of any step.
        adaptive (`bool`): Whether a block's loops may be others than those that are to be stored.
        copies (`int`): Rows of a cache per row; 2 with guidance.
        cache ([`LoopMDMCache`], *optional*): Filled before, with the first blocks of every row.
    """

    def __init__(
        self,
        config: LoopMDMConfig,
        starts: list[int],
        lengths: list[int],
        block_length: int,
        cache_implementation: str | None,
        use_cache: bool,
        refresh_interval: int | None,
        share_loops: bool,
        max_loops: int,
        adaptive: bool,
        copies: int,
        cache: LoopMDMCache | None = None,
    ):
        self.config, self.starts, self.lengths, self.block_length = config, starts, lengths, block_length
        self.cache_implementation, self.use_cache = cache_implementation, use_cache
        self.refresh_interval, self.share_loops = refresh_interval, share_loops
        self.max_loops, self.adaptive, self.copies = max_loops, adaptive, copies
        self.is_block_causal = config.attention_block_size is not None
        # Finished positions of every row in the cache of each number of loops: their keys and values are different.
        self.caches: dict[int, LoopMDMCache] = {} if cache is None else {cache.num_loops: cache}
        self.stored: dict[int, list[int]] = {}
        if cache is not None:
            size = config.attention_block_size
            self.stored[cache.num_loops] = [length // size * size for length in cache.lengths.tolist()]

    def plan(self, rows: list[int], block: int, step: int, num_loops: int) -> list[ForwardPass]:
        """The passes of a denoising step, in order. The last one gives the logits."""
        starts = [self.starts[row] + block * self.block_length for row in rows]
        lengths = [self.lengths[row] for row in rows]
        stops = [min(start + self.block_length, length) for start, length in zip(starts, lengths, strict=True)]
        nothing = [0] * len(rows)
        if self.is_block_causal:
            return self._plan_block_causal(rows, starts, stops, num_loops)
        if self.cache_implementation is None:
            return [ForwardPass(rows, nothing, lengths, lengths, None)]
        cache = self._cache(0, self.max_loops, self.share_loops)
        if self.refreshes(step):
            return [ForwardPass(rows, nothing, lengths, lengths, cache)]
        until = lengths if self.cache_implementation == "prefix" else stops
        return [ForwardPass(rows, [self._source(start) for start in starts], until, lengths, cache)]

    def refreshes(self, step: int) -> bool:
        """Whether a step computes what an approximate cache stores."""
        if self.cache_implementation is None:
            return False
        return step == 0 if self.refresh_interval is None else step % self.refresh_interval == 0

    def _plan_block_causal(
        self, rows: list[int], starts: list[int], stops: list[int], num_loops: int
    ) -> list[ForwardPass]:
        """Finished blocks that are not stored yet are computed together with the current one, or before it."""
        if not self.use_cache:
            if not self.adaptive:
                return [ForwardPass(rows, [0] * len(rows), stops, stops, None)]
            self.caches.clear()
            self.stored.clear()
        cache = self._cache(num_loops, num_loops, False)
        stored = self.stored.setdefault(num_loops, [0] * len(self.starts))
        before = [stored[row] for row in rows]
        for row, start in zip(rows, starts, strict=True):
            stored[row] = start
        behind = [i for i in range(len(rows)) if before[i] < starts[i]]
        currents = [self._source(start) for start in starts]
        passes = []
        if self.adaptive and behind:
            # What is stored has all loops, whenever the current block stops.
            ends = [starts[i] for i in behind]
            passes.append(
                ForwardPass([rows[i] for i in behind], [before[i] for i in behind], ends, ends, cache, False)
            )
        elif behind:
            currents = [min(old, current) for old, current in zip(before, currents, strict=True)]
        return [*passes, ForwardPass(rows, currents, stops, stops, cache)]

    def _source(self, start: int) -> int:
        """Where a pass over a block begins: with `config.shift_logits` at the position that predicts its first."""
        return max(start - 1, 0) if self.config.shift_logits else start

    def _cache(self, key: int, num_loops: int, share_loops: bool) -> LoopMDMCache:
        if key not in self.caches:
            lengths = self.lengths * self.copies
            cache = LoopMDMCache(self.config, num_loops, len(lengths), max(lengths), share_loops)
            if not self.is_block_causal:  # everything is there from the first pass on
                cache.lengths, cache.length = torch.tensor(lengths), max(lengths)
            self.caches[key] = cache
        return self.caches[key]

    def finish(self, num_loops: int, tokens: torch.LongTensor) -> LoopMDMCache | None:
        """The cache of finished blocks, to go on from; `tokens`, `(num_rows, length)`, by position."""
        cache = self.caches.get(num_loops)
        if cache is None or not self.is_block_causal or not self.use_cache:
            return None
        lengths = torch.tensor(self.stored[num_loops], device=tokens.device)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        cache.length = 0
        cache.store(lengths, max(self.stored[num_loops]), tokens[:, : cache.max_length], places[: cache.max_length])
        return cache


@dataclass
class Prediction:
    """
    What the model says in one step of N rows at P positions.

    Args:
        rows, num_loops (`list[int]`): The rows, and the loops asked for.
        logits (`torch.FloatTensor` of shape `(N, P, vocab_size)`): Raw float32 scores; -inf for the mask token.
        loops (`torch.LongTensor` of shape `(N,)`): Loops run; 0 where the scores are those of the step before.
        cost (`dict[str, torch.LongTensor]`): By name of the output's field, `(N,)` each.
        changed (`list[bool]`): Whether the step then changed the row.
    """

    rows: list[int]
    num_loops: list[int]
    logits: torch.Tensor
    loops: torch.Tensor
    cost: dict[str, torch.Tensor]
    changed: list[bool] | None = None


class StepPredictor:
    """
    Predicts the [MASK]s of a denoising step with as little work as the settings allow. The one place where `generate`
    calls the model.

    Args:
        model: The [`LoopMDMForMaskedLM`].
        settings: The call's generation config.
        canvas: Its sequences: `sequences`, `given`, `rank` (the position of every column) and `column` (that of every
            position), each `(num_rows, length)`, and for the host `starts`, `lengths` and `block_length`.
        cache ([`LoopMDMCache`], *optional*): What was handed in as `past_key_values`.
    """

    def __init__(self, model: torch.nn.Module, settings: Any, canvas: Any, cache: LoopMDMCache | None):
        self.model, self.settings, self.canvas = model, settings, canvas
        loops = model.config.num_loops if settings.num_loops is None else settings.num_loops
        self.num_loops = loops
        self.varies = isinstance(loops, list | tuple) or settings.loop_schedule != "constant"
        self.is_guided = settings.guidance_scale is not None and settings.guidance_scale != 1
        use_cache = model.config.attention_block_size is not None and settings.use_cache is not False
        if cache is not None:
            self._check_cache(cache, use_cache)
        self.planner = PassPlanner(
            model.config,
            starts=canvas.starts,
            lengths=canvas.lengths,
            block_length=canvas.block_length,
            cache_implementation=settings.cache_implementation,
            use_cache=use_cache,
            refresh_interval=settings.cache_refresh_interval,
            share_loops=settings.cache_loops == "last",
            max_loops=max(loops) if isinstance(loops, list | tuple) else loops,
            # With `shift_logits` a token before a [MASK] loops more often than it would as a part of finished text.
            adaptive=settings.loop_tolerance is not None
            or (settings.visible_loops is not None and model.config.shift_logits),
            copies=2 if self.is_guided else 1,
            cache=cache,
        )
        self.last: Prediction | None = None
        self.checked: list[LoopMDMCache] = []

    def _check_cache(self, cache: Any, use_cache: bool) -> None:
        """Raises a ValueError where a cache that was handed in is not one of this call's."""
        if not use_cache:
            raise ValueError(
                "`past_key_values` needs block-causal attention and `use_cache` not False: otherwise stored keys and "
                "values are not those of this call."
            )
        if not isinstance(cache, LoopMDMCache) or cache.share_loops:
            raise ValueError("`past_key_values` is not a LoopMDMCache with a place for every loop.")
        if self.is_guided or self.varies:
            raise ValueError(
                "`past_key_values` serves the same `num_loops` in every step and no guidance; leave it out."
            )
        canvas = self.canvas
        cache.check(self.model.model, len(canvas.lengths), self.num_loops, self.settings.visible_loops)
        # The stored tokens must be those that the rows begin with.
        device = canvas.sequences.device
        width = min(cache.length, canvas.column.shape[1])
        lengths = cache.lengths.to(device)
        used = torch.arange(width, device=device) < lengths[:, None]
        tokens = canvas.sequences.gather(1, canvas.column)[:, :width]
        differs = used & (cache.tokens[:, :width].to(device) != tokens)
        too_long = lengths > torch.tensor(canvas.lengths, device=device)
        if bool(too_long.any()) or bool(differs.any()):
            row = int((differs.any(-1) | too_long).long().argmax())
            position = int(differs[row].long().argmax()) if bool(differs[row].any()) else canvas.lengths[row]
            raise ValueError(
                f"`past_key_values` holds other tokens than the input from position {position} of row {row} on; "
                f"`past_key_values.crop({position})` keeps what agrees, or leave it out."
            )

    def finish(self) -> LoopMDMCache | None:
        """The cache of finished blocks, where it can serve a next call."""
        if self.is_guided or self.varies:
            return None
        return self.planner.finish(self.num_loops, self.canvas.sequences.gather(1, self.canvas.column))

    def forget(self) -> None:
        """Forgets the last step's scores, before another block."""
        self.last = None

    def note(self, prediction: Prediction, changed: list[bool]) -> None:
        """Remembers a step's scores, and which rows the step then `changed`: those of the others hold on."""
        prediction.changed = changed
        self.last = prediction

    def __call__(
        self,
        block: int,
        index: int,
        rows: torch.Tensor,
        row_list: list[int],
        columns: torch.Tensor,
        counted: torch.Tensor,
        loops: list[int],
    ) -> Prediction:
        """
        Predicts step `index` of a block for some `rows`, `(N,)`, at their `columns`, `(N, P)`, which are filler where
        `counted`, `(N, P)`, is False, with so many `loops`. Rows that the last step left as they were keep its scores.
        """
        last = None if self.planner.refreshes(index) else self.last
        same: dict[int, int] = {}  # index in this step: index in the last one
        if last is not None:
            where = {row: i for i, row in enumerate(last.rows) if not last.changed[i]}
            same = {
                i: where[row]
                for i, row in enumerate(row_list)
                if row in where and last.num_loops[where[row]] == loops[i]
            }
        new = [i for i in range(len(row_list)) if i not in same]
        if not same:
            return self._predict(block, index, rows, row_list, columns, counted, loops)
        old, kept = (torch.tensor(list(part), device=rows.device) for part in (same, same.values()))
        logits = last.logits.new_empty(*columns.shape, last.logits.shape[-1])
        logits[old] = last.logits[kept, : columns.shape[1]]
        loops_run = torch.zeros_like(rows)
        cost: dict[str, torch.Tensor] = {}
        if new:
            index_new = torch.tensor(new, device=rows.device)
            part = self._predict(
                block,
                index,
                rows[index_new],
                [row_list[i] for i in new],
                columns[index_new],
                counted[index_new],
                [loops[i] for i in new],
            )
            logits[index_new], loops_run[index_new] = part.logits, part.loops
            cost = {name: torch.zeros_like(rows).index_copy(0, index_new, spent) for name, spent in part.cost.items()}
        return Prediction(row_list, loops, logits, loops_run, cost)

    def _predict(
        self,
        block: int,
        index: int,
        rows: torch.Tensor,
        row_list: list[int],
        columns: torch.Tensor,
        counted: torch.Tensor,
        loops: list[int],
    ) -> Prediction:
        """One forward pass for each number of loops, or two where finished blocks are stored first."""
        logits, loops_run = None, torch.zeros_like(rows)
        cost: dict[str, torch.Tensor] = {}
        for num_loops in sorted(set(loops)):
            members = [i for i, own in enumerate(loops) if own == num_loops]
            group = slice(None) if len(members) == len(loops) else torch.tensor(members, device=rows.device)
            for forward_pass in self.planner.plan([row_list[i] for i in members], block, index, num_loops):
                is_last = forward_pass.rows == [row_list[i] for i in members] and forward_pass.adaptive
                wanted = columns[group] if is_last else None
                scores, group_loops, spent = self._run_pass(
                    forward_pass, wanted, counted[group].sum(-1) if is_last else 0, num_loops
                )
                where = (
                    group
                    if is_last
                    else torch.tensor([row_list.index(row) for row in forward_pass.rows], device=rows.device)
                )
                for name, value in spent.items():
                    cost.setdefault(name, torch.zeros_like(rows))[where] += value
            if len(members) == len(loops):
                logits, loops_run = scores, group_loops
                break
            if logits is None:
                logits = scores.new_empty(len(loops), *scores.shape[1:])
            logits[group], loops_run[group] = scores, group_loops
        logits[..., self.model.config.mask_token_id] = -math.inf
        return Prediction(row_list, loops, logits, loops_run, cost)

    def _run_pass(
        self,
        forward_pass: ForwardPass,
        columns: torch.Tensor | None,
        num_wanted: torch.Tensor | int,
        num_loops: int,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Calls the model. Returns float32 logits at `columns`, `(N, P, vocab_size)`, the loops of
        each row, `(N,)`, and what the pass cost; `num_wanted`, `(N,)`, of the columns are not filler.
        """
        canvas, settings, model_config = self.canvas, self.settings, self.model.config
        device = canvas.sequences.device
        rows, starts, stops, keys = torch.tensor(forward_pass[:4]).to(device)
        width = max(stop - start for start, stop in zip(forward_pass.starts, forward_pass.stops, strict=True))
        # Positions of the rows, and the columns that they stand in. Shorter rows are filled up.
        is_even = len(set(forward_pass.starts)) == 1 and len(set(forward_pass.stops)) == 1
        positions = starts[:, None] + torch.arange(width, device=device)
        real = None if is_even else positions < stops[:, None]
        positions = positions.clamp(max=canvas.column.shape[1] - 1)
        sequences = canvas.sequences[rows].gather(1, canvas.column[rows].gather(1, positions))
        if columns is None:
            wanted = rows.new_zeros(len(rows), 0)
        else:
            wanted = (canvas.rank[rows].gather(1, columns) - starts[:, None]).clamp(min=0, max=width - 1)
        guided = self.is_guided
        if guided:
            given = canvas.given[rows].gather(1, canvas.column[rows].gather(1, positions))
            sequences = torch.cat((sequences, sequences.masked_fill(given, model_config.mask_token_id)))
            real, wanted = None if is_even else real.repeat(2, 1), wanted.repeat(2, 1)
        cache = forward_pass.cache
        if cache is not None:
            if cache not in self.checked:
                cache.check(self.model.model, cache.batch_size, cache.num_loops, settings.visible_loops)
                self.checked.append(cache)
            cache_rows = torch.cat((rows, rows + len(canvas.lengths))) if guided else rows
            is_all = len(cache_rows) == cache.batch_size
            cache = cache.select(None if is_all else cache_rows, max(forward_pass.keys))
        positions = positions[:1] if is_even else positions.repeat(2, 1) if guided else positions
        adaptive = forward_pass.adaptive and settings.loop_tolerance is not None
        outputs = self.model(
            input_ids=sequences,
            attention_mask=None if real is None else real.long(),
            position_ids=positions,
            past_key_values=cache,
            num_loops=num_loops,
            loop_tolerance=settings.loop_tolerance if adaptive else None,
            loop_exit=settings.loop_exit if adaptive else "row",
            visible_loops=settings.visible_loops,
            logits_to_keep=wanted,
        )
        if cache is not None and not forward_pass.adaptive:
            forward_pass.cache.set_lengths(cache_rows, stops.repeat(self.planner.copies))
        scores, loops_run = outputs.logits.float(), outputs.loops
        computed = stops - starts
        token_loops = loops_run * (computed.repeat(2) if guided else computed)
        if outputs.token_loops is not None:
            token_loops = outputs.token_loops
        passes = 1
        if guided:
            conditional, unconditional = scores.chunk(2)
            scores = unconditional + settings.guidance_scale * (conditional - unconditional)
            loops_run, token_loops, passes = sum(loops_run.chunk(2)), sum(token_loops.chunk(2)), 2
        mid, once = model_config.num_mid_layers, model_config.num_hidden_layers - model_config.num_mid_layers
        narrows = model_config.loop_end < model_config.num_hidden_layers
        skipped = (computed - num_wanted) if narrows else 0
        cost = {
            "forward_passes": torch.full_like(rows, passes),
            "loops": loops_run,
            "layer_passes": passes * once + loops_run * mid,
            "token_passes": passes * computed,
            "token_loops": token_loops,
            "token_layer_passes": passes * (computed * once - skipped) + token_loops * mid,
            "flops": self.model.pass_flops(
                passes * computed, keys, passes * num_wanted, passes * num_wanted, token_loops
            ),
        }
        return scores, loops_run, cost


__all__ = [
    "HostCopy",
    "LayerMemory",
    "LoopMDMCache",
    "LoopMDMCacheLayer",
    "OpenCache",
    "PassPlanner",
    "Prediction",
    "StepPredictor",
    "remember",
]
