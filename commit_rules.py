# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What a denoising step of `generate` commits: the state that a rule may look at, the rules, and their noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class DenoisingStep:
    """
    One denoising step of a block, and all that a commit rule may look at: the N rows that still denoise, and P of
    their positions, those that are [MASK], or with remasking all of the block. `generate` fills it in as it goes.

    Args:
        index (`int`): Number of the step in its block.
        row_list (`list[int]`), rows (`torch.LongTensor` of shape `(N,)`): The rows, on the host and on the device.
        columns (`torch.LongTensor` of shape `(N, P)`): Where the positions stand in the row.
        masked, counted (`torch.BoolTensor` of shape `(N, P)`):
            Positions that are [MASK], which alone may be committed, and those that are not mere filling.
        size, num_steps (`torch.LongTensor` of shape `(N,)`): Positions and steps of the row's block.
        remask_probability (`float`): Wanted by the user, before it is capped.
        noise (`Callable`): Draws uniform numbers in [0, 1) of shape `(N, P)`.
        logits (`torch.FloatTensor` of shape `(N, P, vocab_size)`): Raw float32 scores; -inf for the mask token.
        loops, forward_passes, flops (`torch.LongTensor` of shape `(N,)`): What the scores cost the row.
        scores (`torch.FloatTensor` of shape `(N, P, vocab_size)`): What tokens are chosen by, after processors.
        tokens (`torch.LongTensor` of shape `(N, P)`): The token chosen for every position.
        penalty (`torch.FloatTensor` of shape `(N, P)`): Taken from the confidence.
    """

    index: int
    row_list: list[int]
    rows: torch.Tensor
    columns: torch.Tensor
    masked: torch.Tensor
    counted: torch.Tensor
    size: torch.Tensor
    num_steps: torch.Tensor
    remask_probability: float
    noise: Callable[[], torch.Tensor]
    logits: torch.Tensor | None = None
    loops: torch.Tensor | None = None
    forward_passes: torch.Tensor | None = None
    flops: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    penalty: torch.Tensor | float = 0.0

    @cached_property
    def normalizer(self) -> torch.Tensor:
        return self.logits.logsumexp(-1)

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Log-probability of the chosen tokens under the raw distribution, `(N, P)`."""
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
        log_probs = self.logits - self.normalizer[..., None]
        # Impossible tokens add nothing, where 0 * -inf would be NaN.
        return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1) + self.penalty

    @cached_property
    def quota(self) -> torch.Tensor:
        """
        Commitments that keep a row on schedule, `(N,)`: an equal share of the block in each step (the first steps take
        one more where it does not divide), at least one, and all that is left in the last step. With remasking the
        shares are spread over all steps, and what this step sends back is made up for.
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
        """The tokens committed earlier in the block that go back to [MASK], `(N, P)` bool."""
        if self.remask_probability == 0:
            return torch.zeros_like(self.masked)
        belongs = torch.arange(self.masked.shape[1], device=self.size.device) < self.size[:, None]
        return belongs & ~self.masked & (self.noise() < self.remask_rate[:, None])

    def best(self, scores: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        """The `count` (default: quota) masked positions of highest score in each row; ties go to the leftmost."""
        order = scores.masked_fill(~self.masked, -math.inf).argsort(dim=-1, descending=True, stable=True)
        ranks = order.argsort(dim=-1)
        return self.masked & (ranks < (self.quota if count is None else count)[:, None])


class CommitRule:
    """
    Decides which masked positions a step commits. To add one, subclass it, implement [`~CommitRule.score`] (or
    `__call__`), and pass an instance as `unmasking` to `generate`.
    """

    draws_tokens = False  # whether tokens are drawn from the raw distribution, whatever `do_sample` says
    is_random = False  # whether two runs commit different positions
    may_skip = False  # whether a step may commit nothing in a row, so that more steps than positions are of use

    def score(self, step: DenoisingStep) -> torch.Tensor:
        """Order of commitment, highest first, `(N, P)`."""
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
        return -torch.arange(step.masked.shape[1], device=step.masked.device).float().expand(step.masked.shape)


class AncestralRule(CommitRule):
    """
    The exact reverse process over `num_steps` equal steps of time, with alpha = share of tokens open = steps done /
    steps: a [MASK] opens with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, sigma being ReMDM's
    remasking rate; without remasking this is 1 / (steps left), the (t - s) / t of the plain process.
    """

    draws_tokens = is_random = may_skip = True

    def __call__(self, step):
        # In units of steps; sigma does not matter at the first step, where nothing is committed yet.
        done, left = step.index, step.num_steps - step.index
        probability = (1 + step.remask_rate * done) / left
        return step.masked & (step.noise() < probability[:, None])


class ThresholdRule(CommitRule):
    """Commits all positions of at least a given confidence, and the quota of another rule (Fast-dLLM)."""

    def __init__(self, threshold: float, rule: CommitRule):
        self.threshold, self.rule = threshold, rule
        self.is_random, self.draws_tokens = rule.is_random, rule.draws_tokens

    def __call__(self, step):
        return self.rule(step) | (step.masked & (step.confidence >= self.threshold))


class EntropyBoundRule(CommitRule):
    """
    Commits positions of lowest entropy while the sum of the others' entropies stays bounded (arXiv 2505.24857), and
    the quota of another rule.
    """

    def __init__(self, bound: float, rule: CommitRule):
        self.bound, self.rule = bound, rule
        self.is_random, self.draws_tokens = rule.is_random, rule.draws_tokens

    def __call__(self, step):
        entropies = step.entropy.masked_fill(~step.masked, 0.0)
        ascending = step.entropy.masked_fill(~step.masked, math.inf).argsort(dim=-1, stable=True)
        sorted_entropies = entropies.gather(1, ascending)
        # The largest of the first j entropies is the last one, so all but it sum to the exclusive cumulative sum.
        within = sorted_entropies.cumsum(-1) - sorted_entropies <= self.bound
        return self.rule(step) | step.best(-step.entropy, count=within.sum(-1))


COMMIT_RULES: dict[str, type[CommitRule]] = {
    "ancestral": AncestralRule,
    "confidence": ConfidenceRule,
    "entropy": EntropyRule,
    "left_to_right": LeftToRightRule,
    "margin": MarginRule,
    "random": RandomRule,
}


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None, sizes: list[int], rows: list[int], device: torch.device
) -> torch.Tensor:
    """
    Uniform numbers for `rows` of a block with `sizes[row]` positions in each row, `(len(rows), max(sizes))`. With one
    generator (or none) all rows draw at every step, those that have nothing to do too; with one generator per row a
    row draws for its own positions only, so that its numbers do not depend on the rest of the batch.
    """
    if not isinstance(generator, list):
        source = device if generator is None else generator.device
        return torch.rand(len(sizes), max(sizes), generator=generator, device=source).to(device)[rows]
    noise = torch.ones(len(rows), max(sizes), device=device)
    for i, row in enumerate(rows):
        drawn = torch.rand(sizes[row], generator=generator[row], device=generator[row].device)
        noise[i, : sizes[row]] = drawn.to(device)
    return noise


def draw_tokens(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens `(N, P)` drawn from `logits`, `(N, P, vocab_size)`: the distribution function inverted at `noise`."""
    # float64: a float32 sum over a large vocabulary would favour or starve the tokens at its end.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = noise.double()[..., None] * cumulative[..., -1:]
    # The first token whose cumulative probability exceeds the target; impossible tokens add nothing and are passed.
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


__all__ = [
    "COMMIT_RULES",
    "CommitRule",
    "DenoisingStep",
    "EntropyBoundRule",
    "ThresholdRule",
    "draw_noise",
    "draw_tokens",
]
