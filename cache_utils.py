# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Keys and values stored across forward passes: [`LoopMDMCache`], with separate entries for every loop of a layer.

With block-causal attention, the keys and values of finished blocks no longer change, so caching is exact. With
attention over the whole sequence, they change with every commitment, so reusing them in later denoising steps is an
approximation (Fast-dLLM, arXiv 2505.22618). Positions count the real tokens of a row from 0: padding has no effect.
"""

import copy
from dataclasses import dataclass

import torch

from .configuration_loopmdm import LoopMDMConfig, check_num_loops


class LoopMDMCache:
    """
    A depth-aware cache: keys and values by position, for every executed layer (head, mid of every loop, tail). Loop s
    of mid reads the keys and values of loop s.

    Pass it to `forward` as `past_key_values` (`generate` can make one). A forward pass attends to the stored positions
    and to its own, which it writes after them. With `use_cache=True`, they stay stored. Otherwise the next pass
    overwrites them, as denoising steps do with an unfinished block. A cache is valid for one state of the weights:
    start a new one after training or with another adapter.

    Args:
        config ([`LoopMDMConfig`]): Configuration of the model that fills it.
        num_loops (`int`): Number of loops of the passes that fill it.
        batch_size (`int`): Number of rows.
        max_length (`int`, defaults to 0): Positions per row to allocate; the cache grows if more are needed.
        share_loops (`bool`, defaults to `False`): One entry for all loops of mid, which each loop overwrites. This is
            an approximation that takes no more memory than a model without loops.
        visible_loops (`int`, *optional*): The `visible_loops` of the passes that fill it.
    """

    def __init__(
        self, config, num_loops: int, batch_size: int, max_length: int = 0, share_loops=False, visible_loops=None
    ):
        self.config, self.share_loops, self.visible_loops = config, share_loops, visible_loops
        self.num_loops, self.max_length = check_num_loops(num_loops), max_length
        # Keys and values of every executed layer, (batch_size, num_key_value_heads, max_length + 1, head_dim), created
        # by the first pass. Filler positions write to the last place, which is never read.
        num_slots = config.num_executed_layers(1 if share_loops else num_loops)
        self.slots: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_slots
        self.tokens = torch.full((batch_size, max_length + 1), -1)  # the stored tokens; -1 if unknown
        self.lengths = torch.zeros(batch_size, dtype=torch.long)  # stored positions of every row, on the host
        # Set by `select`: the rows that the next pass covers, (N,), and the number of positions it attends to, (N,)
        self.rows: torch.Tensor | None = None
        self.reach: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """The largest number of positions stored in any row."""
        return int(self.lengths.max())

    @staticmethod
    def num_bytes(config, num_loops: int, batch_size: int, length: int, dtype: torch.dtype, share_loops=False) -> int:
        """`2 * batch_size * (length + 1) * num_key_value_heads * head_dim * element_size` for each executed layer."""
        size = config.num_key_value_heads * config.head_dim * dtype.itemsize
        return 2 * batch_size * (length + 1) * size * config.num_executed_layers(1 if share_loops else num_loops)

    def check(self, config: LoopMDMConfig, batch_size: int, num_loops: int, visible_loops: int | None) -> None:
        """Raises a ValueError if the cache was made for another model, batch size or number of loops."""
        if config != self.config:
            raise ValueError("`past_key_values` was made for another model; start a new cache for this one.")
        asked = {"rows": batch_size, "num_loops": num_loops, "visible_loops": visible_loops}
        own = {"rows": len(self.lengths), "num_loops": self.num_loops, "visible_loops": self.visible_loops}
        for name in ("rows",) if self.share_loops else own:  # shared loops are an approximation by design
            if own[name] != asked[name]:
                made, used = f"made for {name}={own[name]}", f"used with {asked[name]}"
                raise ValueError(f"`past_key_values` was {made} and is {used}; use the same, or start a new cache.")

    def check_tokens(self, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """
        Raises a ValueError if the rows do not begin with the stored tokens. `tokens`, `(batch_size, num_positions)`,
        are the rows' tokens, and `lengths`, `(batch_size,)` on the host, the number of tokens in each row.
        """
        width = min(self.length, tokens.shape[1])
        stored, tokens = self.tokens[:, :width].cpu(), tokens[:, :width].cpu()
        differs = (torch.arange(width) < self.lengths[:, None]) & (stored != tokens)
        first = torch.nn.functional.pad(differs.long(), (0, 1), value=1).argmax(-1).minimum(lengths)
        for row in (first < self.lengths).nonzero().flatten().tolist():
            raise ValueError(
                f"`past_key_values` holds other tokens than the input from position {first[row]} of row {row} on; "
                f"`past_key_values.crop({first[row]})` keeps what agrees, or leave it out."
            )

    def crop(self, max_length: int) -> None:
        """
        Keeps only the first `max_length` positions of every row; a negative number removes as many from the end. With
        block-causal attention, only whole blocks are kept.
        """
        keep = max(self.length + max_length, 0) if max_length < 0 else max_length
        block_size = self.config.attention_block_size or 1
        self.lengths = self.lengths.clamp(max=keep) // block_size * block_size

    def select(self, rows: torch.Tensor | None, reach: torch.Tensor) -> "LoopMDMCache":
        """
        Returns a view for a pass over some rows, `(N,)` (None: all), that attends to the first `reach` positions of
        each, `(N,)` int64 on the host. It shares the stored tensors, and stores nothing itself.
        """
        self._make_room(int(reach.max()))
        view = copy.copy(self)
        view.rows, view.reach = rows, reach
        return view

    def stored_lengths(self) -> torch.LongTensor:
        """Number of stored positions of each row that the next pass covers, `(N,)`, on the host."""
        return self.lengths if self.rows is None else self.lengths[self.rows.cpu()]

    def open(self, position_ids: torch.Tensor, real: torch.Tensor | None) -> "CacheView":
        """Prepares a pass over `position_ids`, `(1 or N, Q)`; positions with `real`, `(N, Q)`, False are filler."""
        stored, reach, position_ids = self.stored_lengths(), self.reach, position_ids.long()
        if reach is None:
            last = position_ids if real is None else position_ids.masked_fill(~real, -1)
            reach = torch.maximum(stored, last.amax(-1).cpu() + 1)
            # A begun block changes with the rest of it, so it is computed anew. Shifted logits do not do so (below).
            size = self.config.attention_block_size or 1
            whole = torch.where(reach > stored, stored // size * size, stored)
            ends = torch.cat((whole[:, None], torch.maximum(whole[:, None], last.cpu() + 1)), -1).sort(-1).values
            is_wrong = (ends.diff(dim=-1) > 1).any(-1) | ((whole < stored) & self.config.shift_logits)
            for row in is_wrong.nonzero().flatten().tolist():
                wrong = "which `past_key_values` does not hold; give all of them"
                if whole[row] < stored[row]:
                    fix = f"begin the input at a block, after `past_key_values.crop({self.length})`"
                    wrong = f"and `past_key_values` ends within a block, at {int(stored[row])}; {fix}"
                places = f"from {int(whole[row])} to {int(reach[row]) - 1}"
                raise ValueError(f"`position_ids` leaves out positions of row {row} {places}, {wrong}.")
            self._make_room(int(reach.max()))
        places = position_ids if real is None else torch.where(real, position_ids, self.max_length)
        if self.reach is None and bool((places < 0).any()):
            raise ValueError(f"`position_ids` holds {int(places.min())}; positions are counted from 0.")
        if self.config.shift_logits and self.config.attention_block_size is not None:
            # A pass over a block begins with the position before it, whose keys and values must not change.
            places = torch.where(position_ids < stored.to(places.device)[:, None], self.max_length, places)
        return CacheView(self, self.rows, places.expand(len(stored), -1), reach)

    def store(self, lengths: torch.Tensor, tokens: torch.Tensor | None, places: torch.Tensor) -> None:
        """
        Keeps the first `lengths`, `(batch_size,)` on the host, positions of each row. `tokens`, `(batch_size, Q)`, are
        the tokens at `places`, or None with `inputs_embeds`.
        """
        self.lengths, self.tokens = lengths, self.tokens.to(places.device)
        self.tokens.scatter_(1, places, torch.full_like(places, -1) if tokens is None else tokens.long())

    def _make_room(self, length: int) -> None:
        if length <= self.max_length:
            return
        more, self.max_length = length - self.max_length, length
        self.tokens = torch.nn.functional.pad(self.tokens[:, :-1], (0, more + 1), value=-1)
        for index, pair in enumerate(self.slots):
            if pair is not None:
                self.slots[index] = tuple(torch.nn.functional.pad(stored, (0, 0, 0, more)) for stored in pair)

    def slot(self, layer_idx: int, loop: int) -> int:
        """Index in `slots` of a physical layer in the given loop, counted from 0 (used only for layers of mid)."""
        if layer_idx < self.config.loop_start:
            return layer_idx
        last = 0 if self.share_loops else self.num_loops - 1
        return layer_idx + (min(loop, last) if layer_idx < self.config.loop_end else last) * self.config.num_mid_layers


@dataclass
class LayerMemory:
    """
    The part of a [`CacheView`] for one executed layer, with the keys and values of the whole cache. It holds only
    tensors and numbers, so that all layers can share one compiled graph.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    stop: int
    is_selection: bool

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores `(N, heads, Q, head_dim)`. Returns everything the pass attends to, `(N, heads, stop, head_dim)`."""
        return self._put(self.keys, key), self._put(self.values, value)

    def _put(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # The dtypes differ if autocast began or ended in between.
        stored[self.rows[:, None], :, self.places] = new.detach().to(stored.dtype).transpose(1, 2)
        kept = stored[:, :, : self.stop].to(new.dtype)
        return kept[self.rows] if self.is_selection else kept


class CacheView:
    """
    A `cache` during one forward pass over N rows and Q positions: the `rows` of the pass, `(N,)` (None: all), the
    `places` it writes to, `(N, Q)`, and how many positions it attends to, `reach`, `(N,)` on the host.
    """

    def __init__(self, cache: LoopMDMCache, rows: torch.Tensor | None, places: torch.Tensor, reach: torch.Tensor):
        self.cache, self.places, self.reach, self.is_selection = cache, places, reach, rows is not None
        self.rows = torch.arange(len(places), device=places.device) if rows is None else rows
        self.stop = max(int(reach.max()), 1)  # if all is padding, a place that none sees

    def layer(self, layer_idx: int, loop: int, hidden_states: torch.Tensor) -> LayerMemory:
        """The memory of a physical layer in the given loop."""
        cache, index = self.cache, self.cache.slot(layer_idx, loop)
        if cache.slots[index] is None:
            device, config = hidden_states.device, cache.config
            in_autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if in_autocast else hidden_states.dtype
            # Zeros, since places that were never written are masked, but 0 * NaN would still be NaN.
            shape = (len(cache.lengths), config.num_key_value_heads, cache.max_length + 1, config.head_dim)
            cache.slots[index] = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return LayerMemory(*cache.slots[index], self.rows, self.places, self.stop, self.is_selection)

    def narrow(self, rows, positions, real) -> "CacheView":
        """Selects rows of the pass, `(M,)`, and positions, `(M, P)`; positions with `real` False are filler."""
        view = copy.copy(self)
        view.rows, view.places, view.is_selection = self.rows[rows], self.places[rows], True
        if positions is not None:
            view.places = view.places.gather(1, positions).masked_fill(~real, self.cache.max_length)
        return view

    def carry(self, loop: int, hidden_states: torch.Tensor) -> None:
        """Copies the positions of the pass from the previous loop to `loop`, unless the two share their entries."""
        config, where = self.cache.config, (self.rows[:, None], slice(None), self.places)
        for layer_idx in range(config.loop_start, config.loop_end) if not self.cache.share_loops else ():
            before, after = (self.layer(layer_idx, number, hidden_states) for number in (loop - 1, loop))
            after.keys[where], after.values[where] = before.keys[where], before.values[where]


@dataclass
class ForwardPass:
    """
    A forward pass of `generate`. In each of its `rows`, it computes the positions from `starts` to `stops`, attends to
    the positions before `reach`, and stores the positions before `keeps` for good; all `(N,)` int64 on the host. With
    `predicts=False` it only fills the `cache`, and runs all loops whatever the exit rule.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    stops: torch.Tensor
    reach: torch.Tensor
    cache: LoopMDMCache | None = None
    keeps: torch.Tensor | None = None
    predicts: bool = True


class CachePlan:
    """
    Decides which positions a denoising step computes, and which it reads from a cache. The base class computes all
    positions that the block may see. For another way of caching, subclass it, override [`~CachePlan.passes`], and pass
    the class to `generate` as `cache_implementation`.

    Args:
        config ([`LoopMDMConfig`]): Configuration of the model.
        lengths (`torch.LongTensor` of shape `(num_rows,)`, on the host): Number of real positions of every row.
        num_loops (`int`): The largest number of loops of any step.
        copies (`int`, defaults to 1): Cache rows per row; 2 with guidance.
        refresh_interval (`int`, *optional*): Steps between passes over everything; by default, one pass per block.
        visible_loops (`int`, *optional*): As in `generate`.
        has_exits (`bool`, defaults to `False`): Whether a block may run other loops than finished text.
    """

    def __init__(
        self, config, lengths, num_loops, copies=1, refresh_interval=None, visible_loops=None, has_exits=False
    ):
        self.config, self.lengths, self.copies, self.has_exits = config, lengths, copies, has_exits
        self.refresh_interval = refresh_interval
        self.cache: LoopMDMCache | None = self.make_cache(num_loops, visible_loops)

    def make_cache(self, num_loops: int, visible_loops: int | None) -> LoopMDMCache | None:
        """Makes the initial cache."""

    def passes(self, rows: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor, step: int) -> list[ForwardPass]:
        """
        Returns the passes of denoising step `step` for a block between `starts` and `stops` in each of the `rows`, all
        `(N,)` int64 on the host. The last one predicts: it has all `rows`, in this order, and covers their blocks from
        `source(starts)` on. Rows that the last step did not change keep its logits, unless the step `refreshes`.
        """
        stops = self.lengths[rows] if self.config.attention_block_size is None else stops
        return [ForwardPass(rows, torch.zeros_like(stops), stops, stops)]

    def refreshes(self, step: int) -> bool:
        """Whether a step recomputes the cached keys and values of unfinished text, and so all rows."""
        return False

    def source(self, starts: torch.Tensor) -> torch.Tensor:
        """Start of a pass over a block: with `config.shift_logits`, one earlier, to predict the first position."""
        return (starts - 1).clamp(min=0) if self.config.shift_logits else starts


class DualCache(CachePlan):
    """The first step of a block computes everything. Later steps compute only the block and read the rest."""

    def make_cache(self, num_loops, visible_loops):
        size, length = len(self.lengths) * self.copies, int(self.lengths.max())
        cache = LoopMDMCache(self.config, num_loops, size, length, share_loops=True)
        cache.lengths = self.lengths.repeat(self.copies)  # the first pass fills all of it
        return cache

    def refreshes(self, step):
        return step == 0 if self.refresh_interval is None else step % self.refresh_interval == 0

    def passes(self, rows, starts, stops, step):
        lengths = self.lengths[rows]
        if self.refreshes(step):
            return [ForwardPass(rows, torch.zeros_like(starts), lengths, lengths, self.cache)]
        return [ForwardPass(rows, self.source(starts), stops, lengths, self.cache)]


class PrefixCache(DualCache):
    """Like [`DualCache`], but later steps also compute everything after the block."""

    def passes(self, rows, starts, stops, step):
        return super().passes(rows, starts, self.lengths[rows], step)


class BlockCausalCache(CachePlan):
    """
    Stores the finished blocks of a block-causal model, which is exact. They are computed in the same pass as the first
    step of the next block, or in a pass before it if the loops may differ (`has_exits`).
    """

    def make_cache(self, num_loops, visible_loops):
        size, length = len(self.lengths) * self.copies, int(self.lengths.max())
        return LoopMDMCache(self.config, num_loops, size, length, visible_loops=visible_loops)

    def passes(self, rows, starts, stops, step):
        stored, first, passes = self.cache.lengths[rows], self.source(starts), []
        behind = stored < starts
        if not self.has_exits:
            first = torch.where(behind, torch.minimum(stored, first), first)
        elif bool(behind.any()):
            ends = starts[behind]
            passes.append(ForwardPass(rows[behind], stored[behind], ends, ends, self.cache, ends, predicts=False))
        return [*passes, ForwardPass(rows, first, stops, stops, self.cache, keeps=starts)]


CACHE_PLANS: dict[str, type[CachePlan]] = {"dual": DualCache, "prefix": PrefixCache}

__all__ = ["CACHE_PLANS", "CachePlan", "ForwardPass", "LoopMDMCache"]
