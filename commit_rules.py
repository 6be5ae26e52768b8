# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The canvas that `generate` denoises, its blocks and steps, and the rules that choose which tokens to commit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.generation import StoppingCriteriaList

TIE = 1e-5  # scores that differ by less, relative to them and to their probabilities, are a tie


@dataclass
class DenoisingStep:
    """
    One denoising step of a block, with everything a commit rule may use. It covers the N unfinished rows and P
    positions of each: the [MASK]s, or the whole block if tokens may be remasked. `generate` fills in the fields with
    defaults during the step.
    """

    index: int  # number of the step in its block, from 0
    row_list: list[int]  # the rows, on the host
    rows: torch.Tensor  # (N,) int64, the rows, on the device
    columns: torch.Tensor  # (N, P) int64, the columns of the positions
    masked: torch.Tensor  # (N, P) bool, [MASK]s; only these may be committed
    counted: torch.Tensor  # (N, P) bool, False on filler positions
    size: torch.Tensor  # (N,) int64, positions of the row's block
    num_steps: torch.Tensor  # (N,) int64, steps of the row's block
    remask_probability: float  # as given by the user, before the cap
    noise: Callable[[], torch.Tensor]  # draws uniform numbers from [0, 1), (N, P)
    logits: torch.Tensor | None = None  # (N, P, vocab_size) float32, raw; -inf for the mask token
    loops: torch.Tensor | None = None  # (N,) int64, loops run for the row's logits
    scores: torch.Tensor | None = None  # (N, P, vocab_size), logits after processors, to choose tokens
    tokens: torch.Tensor | None = None  # (N, P) int64, the token chosen for every position
    penalty: torch.Tensor | float = 0.0  # (N, P), subtracted from the confidence

    @cached_property
    def normalizer(self) -> torch.Tensor:
        return self.logits.logsumexp(-1)

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities of the chosen tokens under the raw distribution, `(N, P)`."""
        return self.logits.gather(-1, self.tokens[..., None]).squeeze(-1) - self.normalizer

    @cached_property
    def confidence(self) -> torch.Tensor:
        return self.log_probs.exp() - self.penalty

    @cached_property
    def margin(self) -> torch.Tensor:
        """Difference between the two highest probabilities."""
        first, second = (self.logits.topk(2).values - self.normalizer[..., None]).exp().unbind(-1)
        return first - second - self.penalty

    @cached_property
    def entropy(self) -> torch.Tensor:
        return torch.special.entr((self.logits - self.normalizer[..., None]).exp_()).sum(-1) + self.penalty

    @cached_property
    def quota(self) -> torch.Tensor:
        """
        The number of commitments that keep a row on schedule, `(N,)`: an equal share of the block, at least one. The
        first steps commit one more if the block does not divide evenly, and the last step commits the rest. With
        remasking, shares are spread over all steps and also replace the tokens that this step remasks.
        """
        left, steps = self.masked.sum(-1), self.num_steps
        if self.remask_probability > 0:
            due, least = self.size * (self.index + 1) // steps + self.remask.sum(-1), 0
        else:
            due, least = self.size // steps * (self.index + 1) + (self.size % steps).clamp(max=self.index + 1), 1
        return torch.minimum((due - (self.size - left)).clamp(min=least), left)

    @cached_property
    def remask_rate(self) -> torch.Tensor:
        """ReMDM's capped probability `min(eta, (1 - alpha_s) / alpha_t)` with alpha = share of steps done, `(N,)`."""
        cap = (self.num_steps - self.index - 1).clamp(min=0) / max(self.index, 1)
        return cap.clamp(max=self.remask_probability)

    @cached_property
    def remask(self) -> torch.Tensor:
        """Draws which tokens committed earlier in the block go back to [MASK], `(N, P)` bool."""
        if self.remask_probability == 0:
            return torch.zeros_like(self.masked)
        return self.counted & ~self.masked & (self.noise() < self.remask_rate[:, None])

    def best(self, scores: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        """The `count` (default: quota) masked positions with the highest scores in each row, ties from the left."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Scores of -inf and NaN still rank above positions that are not masked.
        scores = scores.nan_to_num(nan=torch.finfo(torch.float32).min).masked_fill(~self.masked, -math.inf)
        count = torch.minimum(self.quota if count is None else count, self.masked.sum(-1))[:, None]
        last, place = scores.sort(dim=-1, descending=True, stable=True)
        last, place = (part.gather(-1, (count - 1).clamp(min=0)) for part in (last, place))
        # Scores that differ from the last one only by float32 rounding tie with it, since the rounding depends on the
        # rest of the batch. Positions with equal predictions, as in a canvas of [MASK]s only, all tie. A margin, or
        # the entropy of a near-certain prediction, is a small difference of large rounded numbers.
        probability = (self.logits.amax(-1) - self.normalizer).exp().gather(-1, place)
        tie = TIE * (probability + last.abs())
        above = scores > last + tie
        ties = self.masked & ~above & (scores >= last - tie)
        return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


class CommitRule:
    """
    Decides which masked positions a step commits. For a rule of your own, subclass it, implement
    [`~CommitRule.score`] (or `__call__`), and pass an instance as `unmasking` to `generate`.
    """

    draws_tokens = False  # whether tokens are always drawn from the raw distribution, regardless of `do_sample`
    is_random = False  # whether two runs commit different positions
    may_skip = False  # whether a step may commit nothing in a row, so that more steps than positions are useful

    def score(self, step: DenoisingStep) -> torch.Tensor:
        """Scores of the positions, `(N, P)`. The highest are committed first; those 1e-5 or less apart tie."""
        raise NotImplementedError

    def __call__(self, step: DenoisingStep) -> torch.Tensor:
        """The positions to commit, `(N, P)` bool."""
        return step.best(self.score(step))


class ConfidenceRule(CommitRule):
    def score(self, step):
        return step.confidence


class MarginRule(CommitRule):
    def score(self, step):
        return step.margin


class EntropyRule(CommitRule):
    def score(self, step):
        return -step.entropy


class RandomRule(CommitRule):
    is_random = True

    def score(self, step):
        return step.noise()


class LeftToRightRule(CommitRule):
    def score(self, step):
        return torch.zeros(step.masked.shape, device=step.masked.device)  # ties go from the left


class AncestralRule(CommitRule):
    """
    The exact reverse process over `num_steps` equal time steps, with alpha = steps done / steps. A [MASK] is committed
    with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, in which sigma is ReMDM's remasking rate.
    Without remasking, this is 1 / (steps left).
    """

    draws_tokens = is_random = may_skip = True

    def __call__(self, step):
        # In units of steps; sigma has no effect in the first step, before anything is committed.
        done, left = step.index, step.num_steps - step.index
        probability = (1 + step.remask_rate * done) / left
        return step.masked & (step.noise() < probability[:, None])


class ThresholdRule(CommitRule):
    """Commits all positions with at least a given confidence, in addition to another rule's (Fast-dLLM)."""

    def __init__(self, threshold: float, rule: CommitRule):
        self.threshold, self.rule = threshold, rule
        self.is_random, self.draws_tokens, self.may_skip = rule.is_random, rule.draws_tokens, rule.may_skip

    def __call__(self, step):
        return self.rule(step) | (step.masked & (step.confidence >= self.threshold))


class EntropyBoundRule(CommitRule):
    """Commits the positions of lowest entropy up to a bound on their sum, in addition to another rule's."""

    def __init__(self, bound: float, rule: CommitRule):
        self.bound, self.rule = bound, rule
        self.is_random, self.draws_tokens, self.may_skip = rule.is_random, rule.draws_tokens, rule.may_skip

    def __call__(self, step):
        ascending = step.entropy.masked_fill(~step.masked, math.inf).sort(dim=-1).values
        # The last of the first j entropies is the largest; the others add up to the exclusive cumulative sum.
        within = ascending.cumsum(-1) - ascending <= self.bound
        return self.rule(step) | step.best(-step.entropy, count=within.sum(-1))


COMMIT_RULES: dict[str, type[CommitRule]] = {
    "ancestral": AncestralRule,
    "confidence": ConfidenceRule,
    "entropy": EntropyRule,
    "left_to_right": LeftToRightRule,
    "margin": MarginRule,
    "random": RandomRule,
}
PARALLEL_RULES = {"confidence_threshold": ThresholdRule, "entropy_bound": EntropyBoundRule}


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None, sizes: list[int], rows: list[int], device: torch.device
) -> torch.Tensor:
    """
    Uniform numbers for `rows` of a block with `sizes[row]` positions in each row, `(len(rows), max(sizes))`. With one
    generator (or none), all rows draw in every step. With one per row, a row draws only for its own positions, so its
    numbers do not depend on the rest of the batch.
    """

    def draw(*shape: int, source: torch.Generator | None) -> torch.Tensor:
        where = device if source is None else source.device
        return torch.rand(shape, generator=source, device=where, dtype=torch.float32).to(device)

    if not isinstance(generator, list | tuple):
        return draw(len(sizes), max(sizes), source=generator)[rows]
    noise = torch.ones(len(rows), max(sizes), dtype=torch.float32, device=device)
    for i, row in enumerate(rows):
        noise[i, : sizes[row]] = draw(sizes[row], source=generator[row])
    return noise


def draw_tokens(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws tokens `(N, P)` from `logits`, `(N, P, vocab_size)`: inverts the distribution function at `noise`."""
    tokens, vocab_size = [], logits.shape[-1]
    size = max(1, 2**24 // vocab_size)  # positions at a time, as float64 takes twice the memory of all logits
    for part, uniform in zip(logits.flatten(0, 1).split(size), noise.double().flatten().split(size), strict=True):
        # float64, since float32 sums over a large vocabulary give its last tokens wrong probabilities.
        cumulative = part.double().softmax(-1).cumsum(-1)
        # The first token whose cumulative probability exceeds the target, so impossible tokens are never chosen.
        tokens.append(torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True))
    return torch.cat(tokens).view(noise.shape).clamp(max=vocab_size - 1)


class Canvas:
    """
    The sequences being denoised, on the device. Tensors are `(num_rows, length)` unless stated otherwise.

    Args:
        sequences: Tokens, with [MASK] at new positions.
        real: False on padding.
        config, model_config: The generation config of the call, and the config of the model.
        generator: Source of all random numbers.
    """

    def __init__(self, sequences: torch.Tensor, real: torch.Tensor, config, model_config, generator=None):
        self.sequences, self.real, self.config, self.generator = sequences, real, config, generator
        self.mask_token_id, self.rule = model_config.mask_token_id, config.commit_rule()
        # Whether a step may commit nothing, or undo a commitment, so that more steps than positions are useful
        self.may_stand_still = self.rule.may_skip or config.remask_probability > 0
        # Tokens that are never produced
        self.never = torch.tensor([self.mask_token_id, *(config.suppress_tokens or ())], device=sequences.device)
        self.to_denoise = real & (sequences == self.mask_token_id)
        self.given = real & ~self.to_denoise
        self.columns = torch.arange(sequences.shape[1], device=sequences.device)
        self.last_given = torch.where(self.given, self.columns, -1).amax(-1, keepdim=True)
        # Blocks are counted over a row's real positions, so that padding does not shift them. Block 0 is the first one
        # with a [MASK].
        self.position_of = real.long().cumsum(-1) - 1  # of every column
        self.column_of = real.long().argsort(dim=-1, descending=True, stable=True)  # of every position
        num_rows, length = sequences.shape
        self.block_length = config.block_length or model_config.attention_block_size or length
        first = self.position_of.masked_fill(~self.to_denoise, length).amin(-1, keepdim=True)
        if model_config.attention_block_size is not None:
            first = first // self.block_length * self.block_length
        self.block_of = ((self.position_of - first) // self.block_length).masked_fill(~self.to_denoise, -1)
        # For planning passes, (num_rows,) on the host: the start of block 0, and the number of positions
        self.starts, self.lengths = torch.stack((first.squeeze(-1), real.sum(-1))).cpu()
        self.ends = torch.full((num_rows,), length, device=sequences.device)  # the column where each row ends
        self.failed = torch.zeros((), dtype=torch.long, device=sequences.device)

    @property
    def finished(self) -> torch.Tensor:
        """Marks rows that have reached their end, bool `(num_rows,)`."""
        return self.ends < self.sequences.shape[1]

    @property
    def behind(self) -> torch.Tensor:
        """Marks columns after the rows' ends."""
        return self.columns > self.ends[:, None]

    def blocks(self) -> Iterator["Block"]:
        for index in range(int(self.block_of.max()) + 1):
            block = Block(self, index)
            if block.num_steps > 0:
                yield block
            if bool(self.finished.all()):
                return

    def commit(self, step: DenoisingStep, commit: torch.Tensor) -> None:
        """Writes the committed tokens, and [MASK] where the step remasks one."""
        where = (step.rows[:, None], step.columns)
        tokens = self.sequences[where].where(~commit, step.tokens)
        self.sequences[where] = tokens.where(~step.remask, self.mask_token_id)

    def end_at(self, eos_token_ids: list[int]) -> None:
        """Ends rows at a denoised end token with no [MASK] before it and no given token after it."""
        if eos_token_ids:
            is_end = torch.isin(self.sequences, self.sequences.new_tensor(eos_token_ids))
            before = (self.real & (self.sequences == self.mask_token_id)).long().cumsum(-1) == 0
            self._end(is_end & self.to_denoise & before & (self.columns > self.last_given))

    def stop_at(self, criteria: StoppingCriteriaList, block: "Block") -> None:
        """
        Ends rows at the token where transformers' criteria stop them. The criteria are checked after every token of a
        finished block, on the row's real tokens. A criterion that ignores the text (a time limit) ends the row after
        the block.
        """
        stops = torch.zeros_like(self.to_denoise)
        for row in range(len(stops)) if criteria else []:
            tokens = self.sequences[row][self.real[row]]
            # Also in a row that has reached its end token in this block: the criteria may stop it earlier.
            members = (self.block_of[row] == block.index) & (self.columns <= self.ends[row])
            columns = members.nonzero().flatten().tolist()
            lengths = (self.position_of[row, columns] + 1).tolist()
            hits = [bool(criteria(tokens[None, :length], None)) for length in lengths]
            # One that also stops a lone [MASK] ignores the text (criteria cannot read an empty one).
            if hits and all(hits) and bool(criteria(tokens.new_tensor([[self.mask_token_id]]), None)):
                stops[row, columns[-1]] = True
            elif any(hits):
                stops[row, columns[hits.index(True)]] = True
        self._end(stops)

    def _end(self, stops: torch.Tensor) -> None:
        self.ends = torch.minimum(self.ends, torch.where(stops, self.columns, len(self.columns)).amin(-1))

    def check(self, block: "Block") -> None:
        """Raises a ValueError if a position of the block allows no token, or if [MASK]s are left."""
        if bool(self.failed):
            raise ValueError(
                "No token can be chosen at some position: its scores are NaN, infinite or all -inf. Look for logits "
                "processors that forbid everything, or for an overflow (use `dtype=torch.bfloat16` or float32)."
            )
        left = (self.block_of == block.index) & (self.sequences == self.mask_token_id) & ~self.finished[:, None]
        if bool(left.any()):
            raise ValueError(
                f"The commit rule {type(self.rule).__name__} has left [MASK]s. In the last step of a block "
                "(`step.index + 1 == step.num_steps`) it has to commit all of `step.masked`."
            )


class Block:
    """The positions of all rows that are denoised together; `index` counts the blocks."""

    def __init__(self, canvas: Canvas, index: int):
        self.canvas, self.index = canvas, index
        members = (canvas.block_of == index) & ~canvas.finished[:, None]
        self.size = members.sum(-1)
        self.sizes: list[int] = self.size.tolist()
        # Columns of the positions, (num_rows, max(sizes)); `belongs` is False on filler
        self.columns = members.long().argsort(dim=-1, descending=True, stable=True)[:, : max(self.sizes)]
        self.belongs = torch.arange(max(self.sizes), device=self.size.device) < self.size[:, None]
        wanted = canvas.config.max_denoising_steps
        steps = [n if wanted is None else min(wanted, n) for n in self.sizes]
        if wanted is not None and canvas.may_stand_still:
            steps = [wanted * (n > 0) for n in self.sizes]
        self.num_steps, self.steps = max(steps), torch.tensor(steps, device=self.size.device)

    def step(self, index: int) -> DenoisingStep | None:
        """Makes a denoising step, or None if the block is done. It waits for the device."""
        canvas, remask_probability = self.canvas, self.canvas.config.remask_probability
        masked = self.belongs & (canvas.sequences.gather(1, self.columns) == canvas.mask_token_id)
        # Only [MASK]s can be committed; with remasking, every step of a row covers its whole block.
        counted = (self.belongs if remask_probability > 0 else masked) & (index < self.steps)[:, None]
        *left, failed = torch.cat((counted.sum(-1) * ~canvas.finished, canvas.failed[None])).tolist()
        row_list = [row for row, count in enumerate(left) if count > 0]
        if failed or not row_list:
            return None
        rows = torch.tensor(row_list, device=self.columns.device)
        slots = counted[rows].long().argsort(dim=-1, descending=True, stable=True)[:, : max(left)]

        def noise() -> torch.Tensor:
            return draw_noise(canvas.generator, self.sizes, row_list, rows.device).gather(1, slots)

        columns, masked, counted = (part[rows].gather(1, slots) for part in (self.columns, masked, counted))
        limits = self.size[rows], self.steps[rows], remask_probability
        return DenoisingStep(index, row_list, rows, columns, masked, counted, *limits, noise)


__all__ = ["COMMIT_RULES", "Block", "Canvas", "CommitRule", "DenoisingStep"]
