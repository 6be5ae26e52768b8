# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Text generation by masked diffusion: [MASK] tokens are predicted all at once and committed over denoising steps.

The file reads top to bottom: the generation config, the output, the state of one denoising step, the rules that decide
what a step commits, and [`LoopMDMGenerationMixin`] with `generate`.
"""

import contextlib
import copy
import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers.generation import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .cache_utils import HostCopy, LoopMDMCache, StepPredictor
from .configuration_loopmdm import check_num_loops

# What other samplers call our arguments, and arguments of autoregressive generation that have no meaning here.
OTHER_NAMES = {
    "alg": "`unmasking` chooses the commit rule",
    "cfg": "use `guidance_scale`, which is LLaDA's `cfg_scale` plus 1",
    "cfg_scale": "use `guidance_scale`, which is LLaDA's `cfg_scale` plus 1",
    "diffusion_steps": "use `max_denoising_steps`",
    "gen_length": "use `max_new_tokens`",
    "inputs": "use `input_ids`",
    "mask_id": "the mask token is `config.mask_token_id`",
    "max_tokens": "use `max_new_tokens`",
    "num_beams": "masked diffusion has no beams; use `num_return_sequences` with `do_sample=True` for several answers",
    "num_steps": "use `num_loops` for loops and `max_denoising_steps` for denoising steps",
    "remasking": "use `unmasking` for the commit rule and `remask_probability` to undo commitments",
    "steps": "use `max_denoising_steps`, the steps per block",
    "threshold": "use `confidence_threshold`",
    "use_block_cache": "use `cache_implementation`",
    "dual_cache": 'use `cache_implementation="dual"`',
}

# Share of the loops beyond the first one that a step runs, after a share `u` of a block's steps.
LOOP_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "early": lambda u: 1.0 - u,
    "middle": lambda u: 4.0 * u * (1.0 - u),
    "late": lambda u: u,
}

# Modes of torch.compile that record CUDA graphs, one for each combination of shapes.
STATIC_MODES = frozenset({"reduce-overhead", "max-autotune"})

# Arguments that say how to draw tokens, and mean nothing where none are drawn.
SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p"})


class LoopMDMGenerationConfig(GenerationConfig):
    r"""
    Arguments of [`LoopMDMGenerationMixin.generate`]. Unknown names and bad values raise a ValueError.

    Args:
        > Length

        max_new_tokens (`int`, *optional*):
            Tokens to append to the input. May be left out, or 0, when the input already holds [MASK] tokens.
        max_length (`int`, *optional*):
            Length of the input (padding included) plus new tokens; ignored when `max_new_tokens` is given.

        > Cost and quality

        num_loops (`int` or `list[int]`, *optional*, defaults to `config.num_loops`):
            Applications of mid in a forward pass. A list is stretched over the denoising steps of each block, and has
            at most as many elements as they are.
        loop_schedule (`"constant"`, `"early"`, `"middle"` or `"late"`, defaults to `"constant"`):
            How `num_loops`, an integer, is spent over the denoising steps of a block: in every step, or falling to one
            loop, rising from one, or greatest in the middle (`1 + (num_loops - 1) * 4 u (1 - u)` after a share u of
            the steps), where the paper finds loops to matter most.
        loop_tolerance (`float`, *optional*):
            Adaptive loops: a row stops looping when the relative change of its hidden state falls under this.
        loop_exit (`"row"` or `"token"`, defaults to `"row"`):
            With `"token"` single positions stop looping when their own state has settled.
        visible_loops (`int`, *optional*):
            Tokens that are not [MASK] loop so many times at most, while the [MASK]s loop on and attend to them as they
            are. The more of the sequence is given, the more this saves.
        block_length (`int`, *optional*):
            Positions that are denoised together; blocks follow each other from left to right. By default all positions
            are one block. Any value works, and the last block may be short. A model with `attention_block_size` takes
            multiples of it (by default the size itself), and its blocks are counted from position 0.
        max_denoising_steps (`int`, *optional*):
            Forward passes per block at most. By default as many as the block has [MASK]s, one commitment a step.

        > Caching

        use_cache (`bool`, *optional*):
            Models with `attention_block_size` keep the keys and values of finished blocks, which is exact; `False`
            computes them again in every step. Other models cannot, and take `cache_implementation`.
        cache_implementation (`"prefix"` or `"dual"`, *optional*):
            For models whose attention is over the whole sequence, an approximation (Fast-dLLM, arXiv 2505.22618): the
            first step of a block computes everything, the others only the block (`"dual"`), or the block and what is
            behind it (`"prefix"`), and read the keys and values of the rest as they were then.
        cache_refresh_interval (`int`, *optional*):
            Compute everything anew in every so many steps of a block; by default in its first one only.
        cache_loops (`"each"` or `"last"`, defaults to `"last"`):
            Whether an approximate cache keeps the keys and values of every loop of mid, or those of the last one for
            all of them, which takes the memory of a model without loops.

        > What a step commits

        unmasking (`str`, defaults to `"confidence"`):
            Order of commitment: `"confidence"` (probability of the chosen token), `"margin"` (over the second most
            likely one), `"entropy"` (lowest first), `"random"`, `"left_to_right"`; each commits an equal share of the
            block a step. `"ancestral"` is the exact reverse process: every [MASK] opens independently, with
            probability 1 / (steps left), and its token is sampled at temperature 1.
        confidence_threshold (`float` in (0, 1], *optional*):
            Parallel commitment (Fast-dLLM, arXiv 2505.22618): commit every position whose chosen token is at least so
            likely, and at least what keeps the block on schedule.
        entropy_bound (`float`, *optional*):
            Parallel commitment (arXiv 2505.24857): commit the positions of lowest entropy as long as the sum of their
            entropies less the largest, in nats, stays within the bound, and at least what keeps the block on schedule.
        remask_probability (`float` in [0, 1], defaults to 0.0):
            Remasking sampler (ReMDM, arXiv 2503.00307, "cap" schedule): at each step every token committed earlier in
            the block goes back to [MASK] with this probability, less towards the end. All `max_denoising_steps` are
            run then, and more of them than [MASK]s are useful.
        eos_penalty (`float`, defaults to 0.0):
            Taken from the confidence (and margin, and added to the entropy) where the chosen token ends the sequence,
            against early floods of end tokens. The distribution that tokens are drawn from stays as it is.

        > Sampling

        do_sample (`bool`, defaults to `False`):
            Draw tokens instead of choosing the most likely one.
        temperature (`float`, defaults to 1.0), top_k (`int`), top_p (`float`), min_p (`float`):
            As in transformers; they need `do_sample=True`. Confidence is read from the raw distribution all the same.
        num_return_sequences (`int`, defaults to 1):
            Independent answers per row; needs `do_sample=True` or another source of chance (`unmasking="ancestral"`).
        guidance_scale (`float`, *optional*):
            Classifier-free guidance: `uncond + guidance_scale * (cond - uncond)` on the logits, where the
            unconditional pass sees [MASK] in place of every given token. 1 is off; it doubles the cost.

        > Compilation

        compile_config (`CompileConfig` of transformers, *optional*):
            Compile the layers with `torch.compile` in this way. They stay compiled for later calls.

        > Special tokens and output

        pad_token_id, bos_token_id (`int`, *optional*), eos_token_id (`int` or `list[int]`, *optional*):
            A row ends at a committed end token with no [MASK] before it and no given token after it; padding follows.
        return_dict_in_generate (`bool`, defaults to `False`):
            Return a [`LoopMDMGenerationOutput`] with the cost of every row instead of the sequences alone.
        output_trace (`bool`, defaults to `False`):
            Add what every step did to that output; needs `return_dict_in_generate=True`.
    """

    DEFAULTS = {
        "max_new_tokens": None,
        "max_length": None,
        "num_loops": None,
        "loop_schedule": "constant",
        "loop_tolerance": None,
        "loop_exit": "row",
        "visible_loops": None,
        "use_cache": None,
        "cache_implementation": None,
        "cache_refresh_interval": None,
        "cache_loops": "last",
        "compile_config": None,
        "block_length": None,
        "max_denoising_steps": None,
        "unmasking": "confidence",
        "confidence_threshold": None,
        "entropy_bound": None,
        "remask_probability": 0.0,
        "eos_penalty": 0.0,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "num_return_sequences": 1,
        "guidance_scale": None,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "return_dict_in_generate": False,
        "output_trace": False,
    }

    def __init__(self, **kwargs):
        # Not `super().__init__`: it sets the arguments of autoregressive generation and keeps unknown ones.
        for name, default in self.DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in ("transformers_version", "_from_model_config", "_commit_hash"):
            setattr(self, name, kwargs.pop(name, None))
        reject_unknown(kwargs)
        self.validate()

    def validate(self, strict: bool = False, **kwargs):
        """Raises a ValueError for the first value that is out of range or does not fit the others."""
        for name, low in (
            ("max_new_tokens", 0),
            ("max_length", 1),
            ("block_length", 1),
            ("max_denoising_steps", 1),
            ("visible_loops", 1),
            ("cache_refresh_interval", 1),
            ("top_k", 1),
            ("num_return_sequences", 1),
        ):
            value = getattr(self, name)
            if value is None and self.DEFAULTS[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {low}.")
        for name, low, high in (
            ("loop_tolerance", 0.0, math.inf),
            ("confidence_threshold", 0.0, 1.0),
            ("entropy_bound", 0.0, math.inf),
            ("remask_probability", 0.0, 1.0),
            ("eos_penalty", 0.0, math.inf),
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("guidance_scale", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is None and self.DEFAULTS[name] is None:
                continue
            # `not low <= value` also catches NaN
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not low <= value <= high
                or value == math.inf
            ):
                raise ValueError(f"`{name}` is {value!r}; it must be a number from {low:g} to {high:g}.")
        for name in ("temperature", "confidence_threshold", "top_p"):
            if getattr(self, name) == 0:
                fix = "use `do_sample=False` for the most likely tokens" if name == "temperature" else "leave it out"
                raise ValueError(f"`{name}` is 0; it must be positive ({fix}).")
        if self.num_loops is not None:
            loops = self.num_loops if isinstance(self.num_loops, list | tuple) else [self.num_loops]
            if len(loops) == 0:
                raise ValueError("`num_loops` is an empty list; give the loops of at least one step.")
            for value in loops:
                check_num_loops(value)
            if isinstance(self.num_loops, list | tuple) and len(loops) > (self.max_denoising_steps or len(loops)):
                raise ValueError(
                    f"`num_loops` lists the loops of {len(loops)} steps, and `max_denoising_steps` is "
                    f"{self.max_denoising_steps}; give at most one number for each step."
                )
        for name, choices in (
            ("loop_schedule", tuple(LOOP_SCHEDULES)),
            ("loop_exit", ("row", "token")),
            ("cache_implementation", (None, "prefix", "dual")),
            ("cache_loops", ("each", "last")),
            ("use_cache", (None, True, False)),
        ):
            value = getattr(self, name)
            if not any(value == choice and type(value) is type(choice) for choice in choices):
                shown = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {shown}.")
        self._validate_combinations()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            for token in _as_list(getattr(self, name)):
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ValueError(f"`{name}` is {getattr(self, name)!r}; a token id is an integer of at least 0.")
        if self.unmasking not in COMMIT_RULES:
            raise ValueError(f"`unmasking` is {self.unmasking!r}; choose one of {', '.join(sorted(COMMIT_RULES))}.")
        if self.confidence_threshold is not None and self.entropy_bound is not None:
            raise ValueError("`confidence_threshold` and `entropy_bound` exclude each other; choose one.")
        if self.unmasking == "ancestral":
            for name in ("confidence_threshold", "entropy_bound"):
                if getattr(self, name) is not None:
                    raise ValueError(f'`{name}` does not go with `unmasking="ancestral"`, which opens at random.')
        if not self.do_sample:
            for name in sorted(SAMPLING):
                if getattr(self, name) != self.DEFAULTS[name]:
                    raise ValueError(f"`{name}` is {getattr(self, name)} without effect; add `do_sample=True`.")
            is_random = self.unmasking in ("ancestral", "random") or self.remask_probability > 0
            if self.num_return_sequences != 1 and not is_random:
                raise ValueError(
                    f"`num_return_sequences` is {self.num_return_sequences}, but all answers would be the same; "
                    "add `do_sample=True`."
                )
        if self.output_trace and not self.return_dict_in_generate:
            raise ValueError("`output_trace` needs `return_dict_in_generate=True`.")

    def _validate_combinations(self):
        """What concerns several arguments about loops, caches and compilation."""
        if self.loop_schedule != "constant" and isinstance(self.num_loops, list | tuple):
            raise ValueError(
                f"`loop_schedule` is {self.loop_schedule!r} and `num_loops` is a list, which is a schedule itself; "
                "give one number."
            )
        if self.loop_exit != "row" and self.loop_tolerance is None:
            raise ValueError(f'`loop_exit` is "{self.loop_exit}" without effect; give a `loop_tolerance`.')
        if self.cache_implementation is None:
            for name in ("cache_refresh_interval", "cache_loops"):
                if getattr(self, name) != self.DEFAULTS[name]:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r} without effect; give `cache_implementation`."
                    )
        elif self.use_cache is not None:
            raise ValueError("`use_cache` is about exact caching; leave it out where `cache_implementation` is given.")
        if self.cache_loops == "each":
            for name in ("loop_tolerance", "num_loops", "loop_schedule"):
                value = getattr(self, name)
                if value not in (None, "constant") and (name == "loop_tolerance" or not isinstance(value, int)):
                    raise ValueError(
                        f'`cache_loops="each"` stores a given number of loops, and `{name}` is {value!r}; use "last".'
                    )
        if self.compile_config is not None:
            if isinstance(self.compile_config, dict):
                self.compile_config = CompileConfig(**self.compile_config)
            if not isinstance(self.compile_config, CompileConfig):
                raise ValueError(f"`compile_config` is {self.compile_config!r}; give transformers' CompileConfig.")
            varies = "visible_loops" if self.visible_loops is not None else "loop_exit"
            if self.compile_config.mode in STATIC_MODES and getattr(self, varies) != self.DEFAULTS[varies]:
                raise ValueError(
                    f'`{varies}` changes shapes from loop to loop, and the compile mode "{self.compile_config.mode}" '
                    'records fixed ones; use `CompileConfig(mode="default")`.'
                )

    @classmethod
    def from_model_config(cls, model_config) -> "LoopMDMGenerationConfig":
        """The special tokens of a model's config, and defaults for everything else."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        return cls(**{name: values.get(name) for name in names}, _from_model_config=True)


def reject_unknown(names) -> None:
    """Raises a ValueError that says what the first of `names` should have been."""
    for name in names:
        close = difflib.get_close_matches(name, LoopMDMGenerationConfig.DEFAULTS, n=1)
        fix = OTHER_NAMES.get(name) or (f"did you mean `{close[0]}`?" if close else "see LoopMDMGenerationConfig")
        raise ValueError(f"`generate` takes no argument `{name}`: {fix}.")


@dataclass
class LoopMDMTraceStep:
    """
    What one denoising step did.

    Args:
        block, step (`int`): Index of the block, and of the step within it.
        loops (`torch.LongTensor` of shape `(num_rows,)`): Loops run for every row; 0 where a row had nothing to do.
        committed, remasked (`torch.BoolTensor` of shape `(num_rows, length)`): Positions filled, and sent back.
        tokens (`torch.LongTensor` of shape `(num_rows, length)`): The sequences after the step.
        confidence (`torch.FloatTensor` of shape `(num_rows, length)`):
            Probability of the chosen token under the raw distribution, at positions that were [MASK]; NaN elsewhere.
        log_probs (`torch.FloatTensor` of shape `(num_rows, length)`):
            Its log-probability under the distribution that it was drawn from; NaN elsewhere.
    """

    block: int
    step: int
    loops: torch.LongTensor
    committed: torch.BoolTensor
    remasked: torch.BoolTensor
    tokens: torch.LongTensor
    confidence: torch.FloatTensor
    log_probs: torch.FloatTensor


@dataclass
class LoopMDMGenerationOutput(ModelOutput):
    """
    Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape `(num_rows, length)`): Input and new tokens.
        forward_passes (`torch.LongTensor` of shape `(num_rows,)`):
            Forward passes spent on each row (a guided step takes two).
        loops (`torch.LongTensor` of shape `(num_rows,)`): Applications of mid over all of them.
        layer_passes (`torch.LongTensor` of shape `(num_rows,)`): Layers executed over all of them.
        token_passes, token_loops (`torch.LongTensor` of shape `(num_rows,)`):
            Single positions computed over all forward passes, and applications of mid to them.
        token_layer_passes (`torch.LongTensor` of shape `(num_rows,)`):
            Layers executed for single positions; the last layer counts for those that it computes in full.
        flops (`torch.LongTensor` of shape `(num_rows,)`):
            Floating point operations of the matrix products (`model.flops`), without what fills up shorter rows.
        seconds (`float`): Wall time of the call. The first call of a process takes longer: warm up to compare.
        tokens_per_second (`float`): Denoised tokens of all rows, up to and including the end token, in that time.
        past_key_values ([`LoopMDMCache`], *optional*):
            With exact caching and one number of loops: all blocks but the last one, for a next call whose input
            continues the sequences.
        tokens_per_forward (`torch.FloatTensor` of shape `(num_rows,)`):
            Denoised tokens, up to and including the end token, per forward pass.
        trace (`list[LoopMDMTraceStep]`, with `output_trace=True`): Every denoising step in order.
    """

    sequences: torch.LongTensor
    forward_passes: torch.LongTensor | None = None
    loops: torch.LongTensor | None = None
    layer_passes: torch.LongTensor | None = None
    token_passes: torch.LongTensor | None = None
    token_loops: torch.LongTensor | None = None
    token_layer_passes: torch.LongTensor | None = None
    flops: torch.LongTensor | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    past_key_values: LoopMDMCache | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    trace: list[LoopMDMTraceStep] | None = None


@dataclass
class DenoisingStep:
    """
    All that a commit rule may look at: the N rows that still denoise in this block, and P of their positions in it:
    those that are [MASK], or with remasking all.

    Args:
        logits (`torch.FloatTensor` of shape `(N, P, vocab_size)`): Raw float32 scores; -inf for the mask token.
        tokens (`torch.LongTensor` of shape `(N, P)`): The token chosen for every position.
        masked (`torch.BoolTensor` of shape `(N, P)`): Positions that are [MASK] now; only these may be committed.
        size (`torch.LongTensor` of shape `(N,)`): Positions to denoise in the row's block; the rest of P is filling.
        index (`int`): Index of the step.
        num_steps (`torch.LongTensor` of shape `(N,)`): Steps that the row has for the block.
        penalty (`torch.FloatTensor` of shape `(N, P)`): Taken from the confidence.
        remask_probability (`float`): Wanted by the user, before it is capped.
        noise (`Callable`): Draws uniform numbers in [0, 1) of shape `(N, P)`.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    masked: torch.Tensor
    size: torch.Tensor
    index: int
    num_steps: torch.Tensor
    penalty: torch.Tensor
    remask_probability: float
    noise: Callable[[], torch.Tensor]

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
        left = self.masked.sum(-1)
        if self.remask_probability > 0:
            due = self.size * (self.index + 1) // self.num_steps + self.remask.sum(-1)
            return torch.minimum((due - (self.size - left)).clamp(min=0), left)
        return _quota(self.size, self.num_steps, self.index, left)

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


def _quota(size: torch.Tensor, num_steps: torch.Tensor, index: int, left: torch.Tensor) -> torch.Tensor:
    """Commitments of step `index` that keep rows on schedule, `(N,)`, with `left` of `size` positions to go."""
    share, remainder = size // num_steps, size % num_steps
    due = share * (index + 1) + remainder.clamp(max=index + 1)
    return torch.minimum((due - (size - left)).clamp(min=1), left)


class CommitRule:
    """Decides which masked positions a step commits. To add one, subclass it and name it in `COMMIT_RULES`."""

    samples_tokens = False  # whether the rule needs tokens drawn from the raw distribution

    @property
    def commits_quota(self) -> bool:
        """Whether a step commits exactly the quota, so that the schedule alone tells what is left."""
        return type(self).__call__ is CommitRule.__call__

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
    def score(self, step):
        return step.noise()


class LeftToRightRule(CommitRule):
    def score(self, step):
        return -torch.arange(step.masked.shape[1], device=step.masked.device, dtype=torch.float32).expand(
            step.masked.shape
        )


class AncestralRule(CommitRule):
    """
    The exact reverse process over `num_steps` equal steps of time, with alpha = share of tokens open = steps done /
    steps: a [MASK] opens with probability `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)`, sigma being ReMDM's
    remasking rate; without remasking this is 1 / (steps left), the (t - s) / t of the plain process.
    """

    samples_tokens = True

    def __call__(self, step):
        # In units of steps; sigma does not matter at the first step, where nothing is committed yet.
        done, left = step.index, step.num_steps - step.index
        probability = (1 + step.remask_rate * done) / left
        return step.masked & (step.noise() < probability[:, None])


class ThresholdRule(CommitRule):
    """Commits all positions of at least a given confidence, and the quota of another rule."""

    def __init__(self, threshold: float, rule: CommitRule):
        self.threshold, self.rule = threshold, rule

    def __call__(self, step):
        return self.rule(step) | (step.masked & (step.confidence >= self.threshold))


class EntropyBoundRule(CommitRule):
    """Commits positions of lowest entropy while the sum of the others' entropies stays bounded, and the quota."""

    def __init__(self, bound: float, rule: CommitRule):
        self.bound, self.rule = bound, rule

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


def commit_rule(config: LoopMDMGenerationConfig) -> CommitRule:
    """The rule that a generation config describes."""
    rule = COMMIT_RULES[config.unmasking]()
    if config.confidence_threshold is not None:
        return ThresholdRule(config.confidence_threshold, rule)
    if config.entropy_bound is not None:
        return EntropyBoundRule(config.entropy_bound, rule)
    return rule


class _Noise:
    """
    Uniform numbers for the positions of a block. With one generator (or none) all rows draw at every step, those that
    have nothing to do too; with one generator per row a row draws for its own positions only, so that its numbers do
    not depend on the rest of the batch.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device):
        self.generator, self.device = generator, device

    def __call__(self, size: list[int], rows: list[int]) -> torch.Tensor:
        """Draws for `rows` of a block with `size[row]` positions in each row, `(len(rows), max(size))`."""
        width = max(size)
        if not isinstance(self.generator, list):
            source = self.device if self.generator is None else self.generator.device
            noise = torch.rand(len(size), width, generator=self.generator, device=source)
            return noise.to(self.device)[rows]
        noise = torch.ones(len(rows), width, device=self.device)
        for i, row in enumerate(rows):
            generator = self.generator[row]
            noise[i, : size[row]] = torch.rand(size[row], generator=generator, device=generator.device).to(self.device)
        return noise


def _sample(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens `(N, P)` drawn from `logits`, `(N, P, vocab_size)`: the distribution function inverted at `noise`."""
    # float64: a float32 sum over a large vocabulary would favour or starve the tokens at its end.
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = noise.double()[..., None] * cumulative[..., -1:]
    # The first token whose cumulative probability exceeds the target; impossible tokens add nothing and are passed.
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


class _Canvas:
    """
    The sequences being denoised, with what is fixed about them. All tensors are `(num_rows, length)`.

    Args:
        sequences: Tokens, new positions as [MASK].
        real: False on padding.
        block_length: Positions per block, or None for a single block.
        from_start: Whether blocks are counted from a row's first real position, or from its first [MASK].
        mask_token_id: Id of [MASK].
    """

    def __init__(
        self,
        sequences: torch.Tensor,
        real: torch.Tensor,
        block_length: int | None,
        from_start: bool,
        mask_token_id: int,
    ):
        self.sequences, self.real, self.mask_token_id = sequences, real, mask_token_id
        self.to_denoise = real & (sequences == mask_token_id)
        self.given = real & ~self.to_denoise
        # Blocks are counted over a row's real positions, so that padding does not shift them. The first one that holds
        # a [MASK] is block 0.
        rank = real.long().cumsum(-1) - 1
        block_length = block_length or rank.shape[1]
        first = rank.masked_fill(~self.to_denoise, rank.shape[1]).amin(-1, keepdim=True)
        if from_start:
            first = first // block_length * block_length
        block = (rank - first) // block_length
        self.block = block.masked_fill(~self.to_denoise, -1)
        self.num_blocks = int(self.block.max()) + 1
        self.rank, self.block_length = rank, block_length
        # The columns of a row's real positions, and on the host what passes are planned with.
        self.column = real.long().argsort(dim=-1, descending=True, stable=True)
        self.lengths = real.sum(-1).tolist()
        self.starts = first.squeeze(-1).tolist()
        columns = torch.arange(sequences.shape[1], device=sequences.device)
        # An end token ends a row only where no given token follows.
        self.open_end = columns > columns.where(self.given, columns.new_tensor(-1)).amax(-1, keepdim=True)

    @property
    def masked(self) -> torch.Tensor:
        return self.real & (self.sequences == self.mask_token_id)

    def block_positions(self, block: int, finished: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns to denoise in a block, `(num_rows, P)`, filled up with others, and how many count, `(num_rows,)`."""
        members = (self.block == block) & ~finished[:, None]
        size = members.sum(-1)
        columns = members.long().argsort(dim=-1, descending=True, stable=True)[:, : int(size.max())]
        return columns, size


class EndTokenStop:
    """
    Stopping rule: a row ends at a denoised end token with no [MASK] before it and no given token after it.

    A stopping rule is called with the canvas and returns the last column of every row, or the canvas' length where
    the row goes on, `(num_rows,)`.
    """

    def __init__(self, eos_token_ids: torch.Tensor):
        self.eos_token_ids = eos_token_ids

    def __call__(self, canvas: _Canvas) -> torch.Tensor:
        before = canvas.masked.long().cumsum(-1) == 0
        ends = torch.isin(canvas.sequences, self.eos_token_ids) & canvas.to_denoise & canvas.open_end & before
        return _first(ends)


class CriteriaStop:
    """Stopping rule: transformers' criteria on the text up to `stop`; a row ends before the first [MASK] behind it."""

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria = criteria

    def __call__(self, canvas: _Canvas, stop: int) -> torch.Tensor:
        stopped = self.criteria(canvas.sequences[:, :stop], None).to(canvas.sequences.device)
        return torch.where(stopped, _first(canvas.masked) - 1, canvas.sequences.shape[1])


def _first(where: torch.Tensor) -> torch.Tensor:
    """The first column where a row is True, or the number of columns, `(num_rows,)`."""
    return torch.where(where.any(-1), where.long().argmax(-1), where.shape[1])


class LoopMDMGenerationMixin(GenerationMixin):
    """Adds `generate` to a masked diffusion model with loops."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        past_key_values: LoopMDMCache | None = None,
        **kwargs,
    ) -> torch.LongTensor | LoopMDMGenerationOutput:
        r"""
        Denoises the [MASK] tokens of `input_ids` in place, then those of `max_new_tokens` new positions behind it:

        1. Read the arguments: `kwargs` over `generation_config`, or over the model's own where none is given.
        2. Lay out the canvas: input, new positions as [MASK], and the blocks that they fall into.
        3. For every block, from left to right, and every denoising step:
            a. Predict: one forward pass of the rows that still have a [MASK] in the block.
            b. Choose a token for every [MASK] of the block.
            c. Commit those that the commit rule picks; send some earlier ones back (`remask_probability`).
            d. Finish the rows that have reached their end token.
            e. Tell the host what it cannot work out from the schedule.
        4. Pad behind the ends and return.

        Greedy, or with a generator per row, a row's result depends neither on the other rows nor on padding.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                Prompt, padded on either side; [MASK] tokens in it are filled in.
            attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                1 on tokens, 0 on padding. By default everything but `pad_token_id` is a token.
            generation_config ([`LoopMDMGenerationConfig`], *optional*):
                Arguments in one object; its documentation lists them. Each may also be given by name.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called on the row's tokens `(num_positions, length)` and the scores `(num_positions, vocab_size)` of
                the block's positions, before the sampling arguments apply. Confidence does not see the result.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Called after every block on the sequences up to its end (and `None` for scores); a row that it stops
                is padded from there on.
            streamer (`BaseStreamer`, *optional*):
                Gets the prompt, then every finished block, and after each step the block as it stands where the
                streamer takes drafts (`TextDiffusionStreamer`). One row only.
            generator (`torch.Generator`, or a `list` with one per row of the output, *optional*):
                Source of all random numbers.
            past_key_values ([`LoopMDMCache`], *optional*):
                Of an earlier call, whose sequences the input continues (block-causal models only). It is filled on.

        Returns:
            The sequences `(batch_size * num_return_sequences, length + max_new_tokens)`, or a
            [`LoopMDMGenerationOutput`] with `return_dict_in_generate=True`.
        """
        # 1. Read the arguments
        started = time.perf_counter()
        config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        reject_unknown(unknown)
        input_ids, real, num_new_tokens = self._prepare_inputs(config, input_ids, attention_mask)
        self._check_extras(input_ids.shape[0], generator, streamer)
        processors = self._prepare_processors(config, logits_processor)
        eos_token_ids, pad_token_id = self._prepare_special_tokens(config)
        rule = commit_rule(config)
        end_token_stop = EndTokenStop(eos_token_ids)
        criteria_stop = CriteriaStop(StoppingCriteriaList(stopping_criteria or []))
        noise = _Noise(generator, input_ids.device)

        # 2. Lay out the canvas
        num_rows = input_ids.shape[0]
        new_tokens = input_ids.new_full((num_rows, num_new_tokens), self.config.mask_token_id)
        canvas = _Canvas(
            torch.cat((input_ids, new_tokens), dim=1),
            torch.cat((real, torch.ones_like(new_tokens, dtype=torch.bool)), dim=1),
            config.block_length or self.config.attention_block_size,
            self.config.attention_block_size is not None,
            self.config.mask_token_id,
        )
        length = canvas.sequences.shape[1]
        ends = torch.full((num_rows,), length, device=input_ids.device)  # the column where each row ends
        finished = torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)
        names = (
            "forward_passes",
            "loops",
            "layer_passes",
            "token_passes",
            "token_loops",
            "token_layer_passes",
            "flops",
        )
        cost = {name: torch.zeros_like(ends) for name in names}
        trace: list[LoopMDMTraceStep] = []
        predictor = StepPredictor(self, config, canvas, past_key_values)
        self._compile_layers(config.compile_config)
        stream = _Stream(streamer, canvas)
        remasks = config.remask_probability > 0
        follows_schedule = rule.commits_quota and not remasks
        reports = _Reports(waits=not follows_schedule)

        # 3. Denoise block after block
        for block in range(canvas.num_blocks):
            block_columns, size = canvas.block_positions(block, finished)
            sizes = size.tolist()
            if max(sizes) == 0:
                continue
            # What the host knows of the rows: positions still masked, and which rows go on.
            left, goes_on = torch.tensor(sizes), (~finished).cpu()
            size_on_host = left
            steps = [self._num_steps(config, n) for n in sizes]
            num_steps = torch.tensor(steps)
            steps_on_device = num_steps.to(ends.device)
            belongs = torch.arange(block_columns.shape[1], device=ends.device) < size[:, None]
            row_list: list[int] = []
            predictor.forget()
            for index in range(max(steps)):
                # A row is done with the block when nothing is masked; with remasking, when its steps are over.
                busy = goes_on & ((index < num_steps) & (num_steps > 0) if remasks else left > 0)
                if not busy.any():
                    break
                if len(row_list) != int(busy.sum()):
                    row_list = busy.nonzero().squeeze(-1).tolist()
                    rows = torch.tensor(row_list).to(ends.device)

                # a. Predict. Only what is [MASK] can be committed; with remasking a step looks at all of the block.
                columns = block_columns[rows]
                masked = belongs[rows] & (canvas.sequences[rows[:, None], columns] == self.config.mask_token_id)
                slots, counted = None, belongs[rows]
                if not remasks and not self._has_static_shapes(config):
                    slots = masked.long().argsort(dim=-1, descending=True, stable=True)[:, : int(left[row_list].max())]
                    masked, columns = masked.gather(1, slots), columns.gather(1, slots)
                    counted = masked
                loops = [self._loops_at(config, index, steps[row]) for row in row_list]
                prediction = predictor(block, index, rows, row_list, columns, counted, loops)
                for name, spent in prediction.cost.items():
                    cost[name][rows] += spent

                # b. Choose a token for every [MASK]
                draws = config.do_sample or rule.samples_tokens
                scores, tokens, is_possible = self._process(processors, canvas.sequences[rows], prediction.logits)
                draw = _narrowed(noise, sizes, row_list, slots)
                if draws:
                    tokens = _sample(scores, draw())

                # c. Commit some of them
                step = DenoisingStep(
                    logits=prediction.logits,
                    tokens=tokens,
                    masked=masked,
                    size=size[rows],
                    index=index,
                    num_steps=steps_on_device[rows],
                    penalty=torch.isin(tokens, eos_token_ids) * config.eos_penalty,
                    remask_probability=config.remask_probability,
                    noise=draw,
                )
                commit = rule(step)
                remask = step.remask
                current = canvas.sequences[rows[:, None], columns]
                updated = current.where(~commit, tokens).where(~remask, self.config.mask_token_id)
                canvas.sequences[rows[:, None], columns] = updated

                # d. Finish rows that have reached their end token
                if len(eos_token_ids) > 0:
                    ends = torch.minimum(ends, end_token_stop(canvas))
                    finished = ends < length
                if config.output_trace:
                    trace.append(
                        self._trace_step(block, step, prediction, commit, remask, scores, canvas, rows, columns)
                    )
                stream.draft(block)

                # e. Tell the host what the schedule does not
                if follows_schedule:
                    left = left.where(~busy, left - _quota(size_on_host, num_steps.clamp(min=1), index, left))
                changed = (commit | remask).any(-1)
                report = reports.send(rows, changed, masked.sum(-1) - commit.sum(-1), finished, is_possible)
                if report is not None:
                    goes_on = ~report.finished
                    if not follows_schedule and not remasks:
                        left = left.index_copy(0, torch.tensor(row_list), report.left[row_list])
                    if not follows_schedule:
                        predictor.note(prediction, report.changed[row_list].tolist())

            reports.check()
            # User-defined criteria look at the text up to the end of the block
            if stopping_criteria:
                stop = int(block_columns.where(belongs, 0).max()) + 1
                ends = torch.minimum(ends, criteria_stop(canvas, stop))
                finished = ends < length
            stream.block(block, ends)
            if bool(finished.all()):
                break

        # 4. Pad behind the ends
        behind = torch.arange(length, device=ends.device) > ends[:, None]
        sequences = canvas.sequences.masked_fill(behind & canvas.to_denoise, pad_token_id)
        stream.end(ends)
        if not config.return_dict_in_generate:
            return sequences
        denoised = (canvas.to_denoise & ~behind).sum(-1)
        num_denoised = int(denoised.sum())  # waits for the device
        seconds = time.perf_counter() - started
        return LoopMDMGenerationOutput(
            sequences=sequences,
            tokens_per_forward=denoised / cost["forward_passes"].clamp(min=1),
            seconds=seconds,
            tokens_per_second=num_denoised / seconds,
            past_key_values=predictor.finish(),
            trace=trace if config.output_trace else None,
            **cost,
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[LoopMDMGenerationConfig, dict]:
        """The arguments of a call, and those of `kwargs` that are none. transformers 5.17's pipelines call it too."""
        config_class = self.generation_config_class
        config = self.generation_config if generation_config is None else generation_config
        if hasattr(config, "DEFAULTS"):
            config = copy.deepcopy(config)
        else:  # transformers' own: take over what is set
            config = config_class.from_dict(config.to_diff_dict())
        # A config made for one call need not repeat the special tokens.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.generation_config, name))
        if kwargs.get("do_sample") is False:
            # Greedy on request, whatever way of sampling the config describes.
            for name in SAMPLING.difference(kwargs):
                setattr(config, name, config_class.DEFAULTS[name])
        config.update(**{name: kwargs.pop(name) for name in config_class.DEFAULTS if name in kwargs})
        config.validate()
        if config.loop_tolerance is not None:
            self.model._check_loop_tolerance(config.loop_tolerance, config.loop_exit)
        arguments = (config.visible_loops, self.dummy_inputs["input_ids"], config.loop_tolerance, config.loop_exit)
        self.model._check_visible_loops(*arguments)
        is_block_causal = self.config.attention_block_size is not None
        if config.cache_implementation is not None and is_block_causal:
            raise ValueError(
                f"`cache_implementation` is {config.cache_implementation!r}, an approximation for attention over the "
                f"whole sequence; this model is block-causal and caches exactly: leave it out (`use_cache=True`)."
            )
        if config.use_cache and not is_block_causal:
            raise ValueError(
                "`use_cache=True` needs block-causal attention, and this model attends to the whole sequence, whose "
                'keys and values change in every step; `cache_implementation="dual"` or "prefix" approximates them.'
            )
        attention_block_size = self.config.attention_block_size or 1
        if config.block_length is not None and config.block_length % attention_block_size != 0:
            raise ValueError(
                f"`block_length` is {config.block_length}; this model's attention sees blocks of "
                f"{attention_block_size} positions, so it must be a multiple of that."
            )
        for name in ("pad_token_id", "eos_token_id"):
            if self.config.mask_token_id in _as_list(getattr(config, name)):
                raise ValueError(
                    f"`{name}` is the mask token ({self.config.mask_token_id}), which stands for text that is still "
                    "to be generated; name another token."
                )
        return config, kwargs

    def _prepare_inputs(
        self, config: LoopMDMGenerationConfig, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Checks the input and expands it. Returns tokens and mask, `(num_rows, length)`, and the new tokens."""
        if input_ids is None:
            raise ValueError("`input_ids` is missing; give a prompt, or only [MASK] tokens for unconditional samples.")
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if value is not None and not isinstance(value, torch.Tensor):
                raise ValueError(f'`{name}` is a {type(value).__name__}; give a tensor (`return_tensors="pt"`).')
        if input_ids.ndim != 2 or input_ids.shape[0] == 0:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; it needs (batch_size, length), at least one row."
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`input_ids` is {input_ids.dtype}; token ids are int64 or int32.")
        input_ids = input_ids.long()
        length = input_ids.shape[1]
        if attention_mask is None:
            pad = config.pad_token_id
            is_padding = pad is not None and pad not in _as_list(config.eos_token_id) and pad != config.bos_token_id
            real = input_ids != pad if is_padding else torch.ones_like(input_ids, dtype=torch.bool)
        elif attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; `input_ids` has {tuple(input_ids.shape)}."
            )
        else:
            real = attention_mask.to(input_ids.device).bool()

        if length > 0:
            low, high = input_ids.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"`input_ids` holds {int(low if low < 0 else high)}, outside the vocabulary of "
                    f"{self.config.vocab_size} tokens; is it the right tokenizer?"
                )
            padding_rows = (~real.any(-1)).nonzero().flatten().tolist()
            if padding_rows:
                raise ValueError(f"Rows {padding_rows} of the input are all padding; leave them out.")

        has_mask = bool((real & (input_ids == self.config.mask_token_id)).any())
        num_new_tokens = config.max_new_tokens
        if num_new_tokens is None and config.max_length is not None:
            num_new_tokens = config.max_length - length
            if num_new_tokens < 0:
                raise ValueError(
                    f"The input has {length} tokens, more than `max_length` ({config.max_length}); "
                    "use `max_new_tokens`, which counts new tokens alone."
                )
        if not num_new_tokens and not has_mask:
            raise ValueError(
                f"There is nothing to generate: `max_new_tokens` is {num_new_tokens} and the input holds no mask "
                f"token ({self.config.mask_token_id}). Give `max_new_tokens`, or [MASK] tokens to fill in."
            )
        num_new_tokens = num_new_tokens or 0
        if length + num_new_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens of input and {num_new_tokens} new ones exceed `max_position_embeddings` "
                f"({self.config.max_position_embeddings}); shorten one of them."
            )
        repeats = config.num_return_sequences
        return input_ids.repeat_interleave(repeats, 0), real.repeat_interleave(repeats, 0), num_new_tokens

    @staticmethod
    def _check_extras(num_rows: int, generator: Any, streamer: BaseStreamer | None) -> None:
        if isinstance(generator, list) and len(generator) != num_rows:
            raise ValueError(f"`generator` holds {len(generator)} generators for {num_rows} rows; give one for each.")
        for one in generator if isinstance(generator, list) else [generator]:
            if one is not None and not isinstance(one, torch.Generator):
                raise ValueError(f"`generator` is {one!r}; it must be a torch.Generator, or a list with one per row.")
        if streamer is not None and num_rows != 1:
            raise ValueError(f"`streamer` shows one row, and there are {num_rows}; generate them one by one.")

    def _prepare_processors(
        self, config: LoopMDMGenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> LogitsProcessorList:
        """The user's processors, then the sampling arguments, as transformers orders them."""
        processors = LogitsProcessorList(logits_processor or [])
        if config.do_sample:
            if config.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(float(config.temperature)))
            if config.top_k is not None:
                processors.append(TopKLogitsWarper(config.top_k))
            if config.top_p is not None and config.top_p < 1:
                processors.append(TopPLogitsWarper(float(config.top_p)))
            if config.min_p is not None:
                processors.append(MinPLogitsWarper(float(config.min_p)))
        return processors

    def _prepare_special_tokens(self, config: LoopMDMGenerationConfig) -> tuple[torch.Tensor, int]:
        """End tokens as a tensor, `(n,)`, and the id that fills rows behind their end."""
        ends = _as_list(config.eos_token_id)
        pad = next((token for token in (config.pad_token_id, self.config.pad_token_id, *ends) if token is not None), 0)
        return torch.tensor(ends, dtype=torch.long, device=self.device), pad

    @staticmethod
    def _num_steps(config: LoopMDMGenerationConfig, size: int) -> int:
        """Denoising steps for a row with `size` positions in the block."""
        steps = config.max_denoising_steps
        if steps is None or size == 0:
            return size
        # More steps than positions serve only rules that may open nothing in a step, or close again what was open.
        return steps if config.unmasking == "ancestral" or config.remask_probability > 0 else min(steps, size)

    def _loops_at(self, config: LoopMDMGenerationConfig, index: int, num_steps: int) -> int:
        """Loops of a row's step; a list or a schedule is stretched over the row's steps."""
        loops = self.config.num_loops if config.num_loops is None else config.num_loops
        if isinstance(loops, list | tuple):
            return loops[index * len(loops) // num_steps]
        share = LOOP_SCHEDULES[config.loop_schedule]((index + 0.5) / num_steps)
        return 1 + round((loops - 1) * share)

    @staticmethod
    def _has_static_shapes(config: LoopMDMGenerationConfig) -> bool:
        return config.compile_config is not None and config.compile_config.mode in STATIC_MODES

    def _compile_layers(self, compile_config: CompileConfig | None) -> None:
        """Compiles every layer on its own: they share one graph, which loops, steps and lengths do not change."""
        if compile_config is None or getattr(self, "_compiled_as", None) == compile_config.to_dict():
            return
        settings = compile_config.to_dict()
        if settings["dynamic"] is None and compile_config.mode not in STATIC_MODES:
            settings["dynamic"] = True
        if self.device.type == "cpu" and settings["mode"] in STATIC_MODES:
            settings["mode"] = None  # CUDA graphs
        if settings["options"] is not None:
            settings.pop("mode")
        for layer in self.model.layers:
            layer.compile(**settings)
        self._compiled_as = compile_config.to_dict()

    def _process(
        self, processors: LogitsProcessorList, sequences: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Applies logits processors, made for one position at a time, to all positions `(N, P, vocab_size)`. Returns the
        scores, the best token of each position, and whether there is one everywhere.
        """
        num_rows, num_positions, vocab_size = logits.shape
        scores = logits
        if len(processors) > 0:
            input_ids = sequences.repeat_interleave(num_positions, 0)
            # A copy, since processors may write into their argument and confidence is read from `logits`.
            scores = processors(input_ids, logits.reshape(-1, vocab_size).clone())
            scores = scores.view(num_rows, num_positions, vocab_size)
            mask_token = torch.tensor([self.config.mask_token_id], device=scores.device)
            scores = scores.index_fill(-1, mask_token, -math.inf)
        highest, tokens = scores.max(-1)
        return scores, tokens, highest.isfinite().all()

    @staticmethod
    def _trace_step(block, step, prediction, commit, remask, scores, canvas, rows, columns) -> LoopMDMTraceStep:
        def scatter(values: torch.Tensor, where: torch.Tensor, fill: Any) -> torch.Tensor:
            out = torch.full(canvas.sequences.shape, fill, dtype=values.dtype, device=values.device)
            i, j = where.nonzero(as_tuple=True)
            out[rows[i], columns[i, j]] = values[where]
            return out

        log_probs = scores.log_softmax(-1).gather(-1, step.tokens[..., None]).squeeze(-1)
        loops = torch.zeros(len(canvas.sequences), dtype=torch.long, device=rows.device)
        loops[rows] = prediction.loops
        return LoopMDMTraceStep(
            block=block,
            step=step.index,
            loops=loops,
            committed=scatter(commit, commit, False),
            remasked=scatter(remask, remask, False),
            tokens=canvas.sequences.clone(),
            confidence=scatter(step.log_probs.exp(), step.masked, math.nan),
            log_probs=scatter(log_probs, step.masked, math.nan),
        )

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Reads generation_config.json when a model is loaded; transformers' own would make a plain config of it."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_diff_dict())
        elif pretrained_model_name_or_path is not None:
            # Without the file, the config made from the model's config stays. `kwargs` override the model's config.
            with contextlib.suppress(OSError):
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                )


class _Report(NamedTuple):
    """On the host, by row: positions left in the block, whether the step changed the row, whether it has ended."""

    left: torch.Tensor
    changed: torch.Tensor
    finished: torch.Tensor


class _Reports:
    """
    What the device tells the host after every step. It is waited for where the next step's work depends on it
    (`waits`); elsewhere an accelerator's report is read one step late, when it has long arrived: at worst a row that
    has ended runs another step, which changes nothing.
    """

    def __init__(self, waits: bool):
        self.waits = waits
        self.sent: HostCopy | None = None

    def send(self, rows, changed, left, finished, is_possible) -> _Report | None:
        report = torch.zeros(4, len(finished), dtype=torch.long, device=finished.device)
        report[0, rows], report[1, rows] = left, changed.long()
        report[2], report[3] = finished, is_possible
        late, self.sent = self.sent, HostCopy(report)
        return self._read(self.sent if self.waits or report.device.type == "cpu" else late)

    def check(self) -> None:
        """Raises what the last report of a block has to say."""
        self._read(self.sent)
        self.sent = None

    @staticmethod
    def _read(sent: HostCopy | None) -> _Report | None:
        if sent is None:
            return None
        left, changed, finished, is_possible = sent.get()
        if not is_possible.all():
            raise ValueError(
                "No token can be chosen at some position: its scores are NaN, infinite or all -inf. Look for logits "
                "processors that forbid everything, or for an overflow (use `dtype=torch.bfloat16` or float32)."
            )
        return _Report(left, changed.bool(), finished.bool())


def _narrowed(noise: _Noise, sizes: list[int], row_list: list[int], slots: torch.Tensor | None) -> Callable:
    """Draws for the positions of a block, `(N, P)`, of which `slots`, `(N, P)`, are looked at."""

    def draw() -> torch.Tensor:
        numbers = noise(sizes, row_list)
        return numbers if slots is None else numbers.gather(1, slots)

    return draw


class _Stream:
    """Feeds a streamer with row 0: the prompt, drafts of the current block, finished blocks, and the rest."""

    def __init__(self, streamer: BaseStreamer | None, canvas: _Canvas):
        self.streamer, self.canvas = streamer, canvas
        self.sent = 0
        if streamer is not None:
            first = int(canvas.to_denoise[0].long().argmax())
            # Also where the prompt is empty: `skip_prompt` drops whatever comes first.
            streamer.put(self._tokens(first))
            self.sent = first

    def _end_of(self, block: int) -> int:
        """Column behind a block and the given tokens that follow it."""
        later = self.canvas.block[0] > block
        return int(later.long().argmax()) if bool(later.any()) else len(later)

    def _tokens(self, stop: int) -> torch.Tensor:
        window = slice(self.sent, stop)
        return self.canvas.sequences[0, window][self.canvas.real[0, window]].cpu()

    def _put(self, stop: int) -> None:
        tokens = self._tokens(stop)
        self.sent = max(self.sent, stop)
        if len(tokens) > 0:
            self.streamer.put(tokens)

    def draft(self, block: int) -> None:
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(self._tokens(self._end_of(block)))

    def block(self, block: int, ends: torch.Tensor) -> None:
        if self.streamer is not None:
            self._put(min(self._end_of(block), int(ends[0]) + 1))

    def end(self, ends: torch.Tensor) -> None:
        if self.streamer is not None:
            self._put(int(ends[0]) + 1)
            self.streamer.end()


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


__all__ = [
    "COMMIT_RULES",
    "CommitRule",
    "LoopMDMGenerationConfig",
    "LoopMDMGenerationMixin",
    "LoopMDMGenerationOutput",
    "LoopMDMTraceStep",
]
