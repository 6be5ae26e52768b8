# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Text generation by masked diffusion: [MASK] tokens are predicted in parallel and committed over several steps.

This file has the generation config, the denoiser (the only place that calls the model), and [`LoopMDMGenerationMixin`]
with `generate`. The canvas and the rules that choose which tokens a step commits are in commit_rules.py, the plans of
what a step computes and what it reads from a cache in cache_utils.py, and the outputs in generation_outputs.py.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import math
import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, logits_process
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .cache_utils import CACHE_PLANS, BlockCausalCache, CachePlan, ForwardPass, LoopMDMCache
from .commit_rules import COMMIT_RULES, PARALLEL_RULES, Block, Canvas, CommitRule, DenoisingStep, draw_tokens
from .configuration_loopmdm import check_num_loops
from .generation_outputs import LoopMDMGenerationOutput, make_watchers
from .loop_context import check_mask, check_shape
from .loop_policies import LoopPolicy, resolve_policy
from .weight_files import HUB_OPTIONS, read_json

# Names of our arguments in other samplers, and arguments of autoregressive generation that cannot work here.
OTHER_NAMES = {
    **dict.fromkeys(("no_repeat_ngram_size", "repetition_penalty", "sequence_bias"), "use a `logits_processor`"),
    **dict.fromkeys(("diffusion_steps", "steps", "steps_per_block"), "use `max_denoising_steps`, the steps per block"),
    **dict.fromkeys(("gen_length", "max_tokens"), "use `max_new_tokens`"),
    **dict.fromkeys(("min_length", "min_new_tokens"), "use `eos_penalty`, which holds back end tokens"),
    "alg": "`unmasking` chooses the commit rule",
    "bad_words_ids": "use `suppress_tokens`, or a `logits_processor`",
    "block_size": "use `block_length`",
    "cache": "use `past_key_values`",
    "cfg_scale": "use `guidance_scale`, which is LLaDA's `cfg_scale` plus 1",
    "compile_config": "compile the layers: `for layer in model.model.layers: layer.compile()`",
    "dual_cache": 'use `cache_implementation="dual"`',
    **dict.fromkeys(("inputs", "inputs_embeds"), "use `input_ids`"),
    **dict.fromkeys(("mask_id", "mask_token_id"), "the mask token is `config.mask_token_id`"),
    "max_time": "use `stopping_criteria` with transformers' MaxTimeCriteria",
    "num_beams": "masked diffusion has no beams; use `num_return_sequences` with `do_sample=True` for several answers",
    "num_steps": "use `num_loops` for loops and `max_denoising_steps` for denoising steps",
    "remasking": "use `unmasking` for the commit rule and `remask_probability` to undo commitments",
    "right_shift_logits": "the model's `config.shift_logits` says so",
    "token_type_ids": "leave it out (`tokenizer(..., return_token_type_ids=False)`)",
    "threshold": "use `confidence_threshold`",
    "use_block_cache": "use `cache_implementation`",
}
# Values of transformers' arguments that have no effect, like None, 0 and False, and are therefore accepted.
NEUTRAL_VALUES = {"disable_compile": True, "use_model_defaults": True, "num_beams": 1, "num_beam_groups": 1}
NEUTRAL_VALUES |= dict.fromkeys(("length_penalty", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1)
TRANSFORMERS_NAMES = {*GenerationConfig().__dict__, *inspect.signature(GenerationMixin.generate).parameters}
# Sampling arguments in transformers' order, each with its neutral value. They need `do_sample=True`.
SAMPLING = {
    "temperature": (logits_process.TemperatureLogitsWarper, 1),
    "top_k": (logits_process.TopKLogitsWarper, None),
    "top_p": (logits_process.TopPLogitsWarper, 1),
    "min_p": (logits_process.MinPLogitsWarper, 0),
}
DEFAULT_NEW_TOKENS = 20  # as in transformers
logger = logging.get_logger(__name__)


class LoopMDMGenerationConfig(GenerationConfig):
    r"""
    Arguments of [`LoopMDMGenerationMixin.generate`]. Unknown names and bad values raise a ValueError. Arguments of
    transformers' own `generate` are accepted if their value has no effect (`num_beams=1`, `top_k=0`).

    Args:
        max_new_tokens (`int`, *optional*):
            Number of tokens to append. By default 20, with a warning, or 0 if the input contains [MASK]s to fill in.
        max_length (`int`, *optional*): Length of input (with padding) plus new tokens, instead of `max_new_tokens`.
        stop_strings (`str` or `list[str]`, *optional*):
            A row ends at the token that first completes one of these texts; `generate` then needs the `tokenizer`.

        > Cost and quality

        num_loops (`int` or `list[int]`, defaults to `config.num_loops`):
            How often a forward pass applies mid. A list has one number per denoising step of a block; its last element
            is used for all further steps.
        loop_tolerance (`float`, *optional*):
            Adaptive loops: a row stops looping when the relative change of its hidden state falls below this.
        visible_loops (`int`, *optional*):
            Maximum number of loops for tokens that are not [MASK]. [MASK]s loop further, and still attend to them.
        loop_policy ([`LoopPolicy`], *optional*): An exit rule of your own.
        block_length (`int`, *optional*):
            Number of positions that are denoised together; blocks are denoised from left to right. By default, all
            positions form one block. For a block-causal model it must be a multiple of `config.attention_block_size`,
            which is then the default, and blocks are counted from position 0.
        max_denoising_steps (`int`, *optional*):
            Maximum number of denoising steps per block. By default one per [MASK], so that each commits one token.
        use_cache (`bool`, defaults to `True`):
            Block-causal models cache the keys and values of finished blocks, which is exact, if all steps have the
            same `num_loops`; `False` recomputes them. It has no effect on other models.
        cache_implementation (`"prefix"`, `"dual"` or a subclass of [`CachePlan`], *optional*):
            An approximation for attention over the whole sequence (Fast-dLLM, arXiv 2505.22618). The first step of a
            block computes everything. Later steps compute only the block (`"dual"`), or the block and everything after
            it (`"prefix"`), and reuse the other keys and values of the first step.
        cache_refresh_interval (`int`, *optional*): Steps between passes over everything; by default one per block.

        > Committing and remasking

        unmasking (`str` or [`CommitRule`], defaults to `"confidence"`):
            Order of commitment: `"confidence"` (probability of the chosen token), `"margin"` (between the two most
            likely tokens), `"entropy"` (lowest first), `"random"` or `"left_to_right"`; each step commits an equal
            share of the block. `"ancestral"` is the exact reverse process: every [MASK] is committed independently,
            with probability 1 / (steps left), and its token is sampled at temperature 1.
        confidence_threshold (`float` in (0, 1], *optional*):
            Also commit every position whose chosen token has at least this probability (Fast-dLLM).
        entropy_bound (`float`, *optional*):
            Also commit the positions of lowest entropy, as long as the sum of their entropies in nats, without the
            largest one, stays within this bound (arXiv 2505.24857).
        remask_probability (`float` in [0, 1], defaults to 0.0):
            Remasking sampler (ReMDM, arXiv 2503.00307, "cap" schedule): at each step, every token committed earlier in
            the block is set back to [MASK] with this probability, which decreases towards the end. All
            `max_denoising_steps` are then run, and it can help to have more of them than [MASK]s.
        eos_penalty (`float`, defaults to 0.0):
            Lowers the confidence and the margin, and raises the entropy, if the chosen token is an end token, so that
            end tokens are not committed too early. It does not change which tokens are chosen.

        > Sampling

        do_sample (`bool`, defaults to `False`): Draw tokens instead of choosing the most likely one.
        temperature (`float`, defaults to 1.0), top_k (`int`), top_p (`float`), min_p (`float`):
            As in transformers, with `do_sample=True`. Confidence still comes from the raw distribution.
        num_return_sequences (`int`, defaults to 1): Independent answers per row, which need a source of randomness.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance: the logits are `uncond + guidance_scale * (cond - uncond)`, and the
            unconditional pass sees [MASK] instead of every given token. It doubles the cost; 1 turns it off.

        > Special tokens and output

        pad_token_id, bos_token_id (`int`, *optional*), eos_token_id (`int` or `list[int]`, *optional*):
            A row ends at a committed end token with no [MASK] before it and no given token after it; padding follows.
        suppress_tokens (`list[int]`, *optional*): Tokens that are never generated, such as ids without text.
        return_dict_in_generate (`bool`, defaults to `False`): Return a [`LoopMDMGenerationOutput`].
        output_scores, output_trace (`bool`, default to `False`):
            Add the scores of the tokens, or a record of every step, to the output.
    """

    # The default, type and range of every argument; a lower bound of EPSILON means "above 0".
    EPSILON = 1e-12
    FIELDS = {
        **dict.fromkeys(("max_new_tokens", "pad_token_id", "bos_token_id"), (None, int, 0)),
        **dict.fromkeys(("max_length", "block_length", "max_denoising_steps", "visible_loops"), (None, int, 1)),
        **dict.fromkeys(("cache_refresh_interval", "top_k"), (None, int, 1)),
        **dict.fromkeys(("num_loops", "eos_token_id"), (None, int | list | tuple)),
        **dict.fromkeys(("loop_tolerance", "entropy_bound", "guidance_scale"), (None, float, 0)),
        **dict.fromkeys(("confidence_threshold", "top_p"), (None, float, EPSILON, 1)),
        **dict.fromkeys(("do_sample", "return_dict_in_generate", "output_scores", "output_trace"), (False, bool)),
        "use_cache": (True, bool),
        "remask_probability": (0.0, float, 0, 1),
        "eos_penalty": (0.0, float, 0),
        "temperature": (1.0, float, EPSILON),
        "min_p": (None, float, 0, 1),
        "num_return_sequences": (1, int, 1),
        "unmasking": ("confidence", str | CommitRule),
        "cache_implementation": (None, str | type),
        "loop_policy": (None, LoopPolicy),
        "stop_strings": (None, str | list),
        "suppress_tokens": (None, list | tuple),
    }

    def __init__(self, **kwargs):
        # Not `super().__init__`, which sets the arguments of autoregressive generation and keeps unknown ones.
        for name, (default, *_) in self.FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        for name in ("transformers_version", "_from_model_config", "_commit_hash"):
            setattr(self, name, kwargs.pop(name, None))
        reject_unknown(kwargs)
        self.validate()

    def validate(self, strict: bool = False, **kwargs):
        """Raises a ValueError for a value that is out of range or does not fit the others, or cannot be saved."""
        own = {*self.FIELDS, "transformers_version"}
        reject_unknown({name: value for name, value in vars(self).items() if name not in own and name[0] != "_"})
        if self.top_k == 0:  # in transformers, 0 means none
            self.top_k = None
        for name, (default, *limits) in self.FIELDS.items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, default)
            else:
                check_argument(name, value, *limits)
        for name in ("eos_token_id", "suppress_tokens"):
            for token in _as_list(getattr(self, name)):
                check_argument(name, token, int, 0)
        if not all(isinstance(text, str) and text for text in _as_list(self.stop_strings)):
            raise ValueError(f"`stop_strings` is {self.stop_strings!r}; give a text that is not empty, or several.")
        loops = [check_num_loops(value) for value in _as_list(self.num_loops)]
        if (self.num_loops is not None and not loops) or len(loops) > (self.max_denoising_steps or len(loops)):
            steps = self.max_denoising_steps
            raise ValueError(f"`num_loops` lists {len(loops)} steps of {steps}; give one number or more, one a step.")
        for name, known in (("unmasking", COMMIT_RULES), ("cache_implementation", CACHE_PLANS)):
            if isinstance(getattr(self, name), str) and getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(sorted(known))}.")
        self._validate_combinations()
        # `save_pretrained` is strict. Rules, plans and policies cannot be written to a file.
        for name in ("unmasking", "cache_implementation", "loop_policy") if strict else ():
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which cannot be saved; pass it to `generate`.")

    def _validate_combinations(self):
        """Checks arguments that exclude or need each other."""
        rule, wrong = self.commit_rule(), None
        parallel = [name for name in PARALLEL_RULES if getattr(self, name) is not None]
        idle = [name for name, (_, neutral) in SAMPLING.items() if getattr(self, name) not in (None, neutral)]
        is_random = self.do_sample or rule.is_random or self.remask_probability > 0
        if len(parallel) > 1 or (parallel and rule.draws_tokens):
            wrong = f"`{parallel[-1]}` excludes other such rules and ancestral `unmasking`; choose one of them"
        elif idle and not self.do_sample:
            wrong = f"`{idle[0]}={getattr(self, idle[0])}` has no effect on greedy decoding; add `do_sample=True`"
        elif self.num_return_sequences != 1 and not is_random:
            wrong = f"`num_return_sequences={self.num_return_sequences}` answers are the same; add `do_sample=True`"
        elif self.cache_refresh_interval is not None and self.cache_implementation is None:
            wrong = "`cache_refresh_interval` has no effect without `cache_implementation`; give both, or neither"
        elif (self.output_trace or self.output_scores) and not self.return_dict_in_generate:
            wrong = "`output_trace` and `output_scores` need `return_dict_in_generate=True`"
        if wrong is not None:
            raise ValueError(f"{wrong}.")

    def validate_for(self, model_config: Any) -> None:
        """Raises a ValueError for arguments that a model with this [`LoopMDMConfig`] does not support."""
        size, wrong = model_config.attention_block_size, None
        if size is not None and self.cache_implementation is not None:
            wrong = "this block-causal model caches exactly, so `cache_implementation` would only lose; leave it out"
        elif size is not None and (self.block_length or 0) % size != 0:
            wrong = f"`block_length` is {self.block_length}; this model's attention takes multiples of {size}"
        for name in ("pad_token_id", "eos_token_id", "suppress_tokens"):
            tokens = _as_list(getattr(self, name))
            if model_config.mask_token_id in tokens and name != "suppress_tokens":
                wrong = f"`{name}` is the mask token ({model_config.mask_token_id}); name another"
            elif any(token >= model_config.vocab_size for token in tokens):
                wrong = f"`{name}` is {tokens}, outside the vocabulary of {model_config.vocab_size} tokens"
        if wrong is not None:
            raise ValueError(f"{wrong}.")

    def commit_rule(self) -> CommitRule:
        """Makes the commit rule that the arguments describe."""
        rule = COMMIT_RULES[self.unmasking]() if isinstance(self.unmasking, str) else self.unmasking
        for name, parallel_rule in PARALLEL_RULES.items():
            if getattr(self, name) is not None:
                rule = parallel_rule(getattr(self, name), rule)
        return rule

    def warpers(self) -> LogitsProcessorList:
        """Makes transformers' processors for the sampling arguments, in transformers' order."""
        warpers = LogitsProcessorList()
        for name, (warper, neutral) in SAMPLING.items():
            value = getattr(self, name)
            if value not in (None, neutral):
                warpers.append(warper(value if name == "top_k" else float(value)))
        return warpers

    def to_dict(self) -> dict[str, Any]:
        """As in transformers. Rules, plans and policies are given by name, for display."""
        own = {name: getattr(self, name) for name in ("unmasking", "cache_implementation", "loop_policy")}
        shown = {name: value if isinstance(value, str | None) else repr(value) for name, value in own.items()}
        return super().to_dict() | shown

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict[str, Any]:
        """Makes `from_pretrained` raise a ValueError for a damaged file, and an OSError only for a missing one."""
        return read_json(json_file)

    @classmethod
    def from_model_config(cls, model_config) -> "LoopMDMGenerationConfig":
        """Takes the special tokens from a model's config, and defaults for everything else."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        return cls(**{name: values.get(name) for name in names}, _from_model_config=True)


def check_argument(name: str, value: Any, kind: Any, low: Any = None, high: Any = math.inf) -> None:
    """Raises a ValueError if `value` is not of type `kind`, or not a finite number from `low` to `high`."""
    accepted = int | float if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` is {value!r}; it must be of type {getattr(kind, '__name__', kind)}.")
    if low is not None and not (low <= value <= high and value < math.inf):
        least = "above 0" if low == LoopMDMGenerationConfig.EPSILON else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"`{name}` is {value!r}; it must be {least}{most}, and finite.")


def reject_unknown(arguments: dict[str, Any]) -> None:
    """Raises a ValueError that names the first unknown argument of `generate`, and what to use instead."""
    for name, value in arguments.items():
        is_neutral = not isinstance(value, torch.Tensor) and (not value or value == NEUTRAL_VALUES.get(name))
        if name in TRANSFORMERS_NAMES | NEUTRAL_VALUES.keys() and is_neutral:
            continue
        close = difflib.get_close_matches(name, LoopMDMGenerationConfig.FIELDS, n=1)
        fix = OTHER_NAMES.get(name) or (f"did you mean `{close[0]}`?" if close else "see LoopMDMGenerationConfig")
        raise ValueError(f"`generate` takes no argument `{name}`: {fix}.")


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@functools.lru_cache(maxsize=8)
def stop_criterion(tokenizer: Any, strings: tuple[str, ...], num_tokens: int) -> StopStringCriteria:
    """The criterion for `stop_strings`, kept, since making one reads a whole vocabulary (2 s for 150,000 tokens)."""
    return StopStringCriteria(tokenizer, list(strings))


class Denoiser:
    """Predicts the [MASK]s of a denoising step, from the `past_key_values` of the call or a cache of its own."""

    def __init__(self, model, canvas: Canvas, cache: LoopMDMCache | None):
        self.model, self.canvas, self.config = model, canvas, canvas.config
        config, block_size = self.config, model.config.attention_block_size
        self.loops = _as_list(config.num_loops) or [model.config.num_loops]
        self.copies = 1 if config.guidance_scale in (None, 1) else 2
        # Whether finished blocks are stored; a cache holds keys and values for one number of loops.
        self.is_exact = block_size is not None and config.use_cache and isinstance(config.num_loops, int | None)
        # Whether a block may run other loops than finished text (with `shift_logits`, a token before a [MASK] loops
        # with it). This needs a cache within a step even if none is kept, since finished text runs all loops.
        visible_counts = config.visible_loops is not None and model.config.shift_logits
        is_adaptive = config.loop_tolerance is not None or config.loop_policy is not None or visible_counts
        has_exits = block_size is not None and is_adaptive
        kind = BlockCausalCache if self.is_exact or has_exits else config.cache_implementation or CachePlan
        settings = self.copies, config.cache_refresh_interval, config.visible_loops, has_exits
        kind = CACHE_PLANS[kind] if isinstance(kind, str) else kind
        self.plan: CachePlan = kind(model.config, canvas.lengths, max(self.loops), *settings)
        if cache is not None:
            self._check_cache(cache)
            cache.lengths = cache.lengths // block_size * block_size
            self.plan.cache = cache
        # Forward passes, loops and FLOPs of each row so far, (3, num_rows)
        self.spent = torch.zeros(3, len(canvas.lengths), dtype=torch.long, device=canvas.sequences.device)
        self.started = time.perf_counter()

    def _check_cache(self, cache: Any) -> None:
        """Raises a ValueError if the given cache does not fit this call."""
        if not isinstance(cache, LoopMDMCache) or cache.share_loops or not self.is_exact or self.copies > 1:
            raise ValueError(
                "`past_key_values` must be a LoopMDMCache with a place for every loop, and serves block-causal models "
                "with one `num_loops` for all steps, `use_cache=True` and no guidance; leave it out."
            )
        canvas = self.canvas
        cache.check(self.model.config, len(canvas.lengths), self.loops[0], self.config.visible_loops)
        cache.check_tokens(canvas.sequences.gather(1, canvas.column_of), canvas.lengths)

    def finished_cache(self) -> LoopMDMCache | None:
        """Returns the cache of finished blocks, if a later call can use it."""
        cache = self.plan.cache
        if not self.is_exact or self.copies > 1:
            return None
        tokens = self.canvas.sequences.gather(1, self.canvas.column_of)[:, : cache.max_length]
        cache.store(cache.lengths, tokens, torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape))
        return cache

    def cost(self) -> dict[str, Any]:
        """Returns the cost so far, as fields of the [`LoopMDMGenerationOutput`]."""
        denoised = (self.canvas.to_denoise & ~self.canvas.behind).sum(-1)
        total, seconds = int(denoised.sum()), time.perf_counter() - self.started  # waits for the device
        cost = dict(zip(("forward_passes", "loops", "flops"), self.spent, strict=True))
        speed = {"seconds": seconds, "tokens_per_second": total / seconds}
        return cost | speed | {"tokens_per_forward": denoised / cost["forward_passes"].clamp(min=1)}

    def num_loops(self, step: int) -> int:
        return self.loops[min(step, len(self.loops) - 1)]

    def predict(self, block: Block, step: DenoisingStep) -> None:
        """Fills in the logits of a step, and the loops that they took."""
        canvas, rows = self.canvas, torch.tensor(step.row_list)
        if self.plan.has_exits and not self.is_exact:
            self.plan.cache = self.plan.make_cache(self.num_loops(step.index), self.config.visible_loops)
        starts = canvas.starts[rows] + block.index * canvas.block_length
        stops = torch.minimum(starts + canvas.block_length, canvas.lengths[rows])
        before = self.spent[1, step.rows]
        for forward_pass in self.plan.passes(rows, starts, stops, step.index):
            step.logits, cost = self._run(forward_pass, step)
            self.spent[:, forward_pass.rows.to(self.spent.device)] += cost
        step.loops = self.spent[1, step.rows] - before

    def _run(self, forward_pass: ForwardPass, step: DenoisingStep) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Calls the model. Returns float32 logits of the step's positions, `(N, P, vocab_size)`, and the forward passes,
        loops and FLOPs of each row, `(3, N)`.
        """
        canvas, config, model_config = self.canvas, self.config, self.model.config
        device, copies = canvas.sequences.device, self.copies
        host = torch.stack((forward_pass.rows, forward_pass.starts, forward_pass.stops, forward_pass.reach))
        rows, starts, stops, reach = host.to(device)
        # Positions of the rows, and their columns. Shorter rows are filled up.
        width = int((forward_pass.stops - forward_pass.starts).max())
        is_even = bool((host[1:3] == host[1:3, :1]).all())
        positions = starts[:, None] + torch.arange(width, device=device)
        real = None if is_even else positions < stops[:, None]
        positions = torch.minimum(positions, stops[:, None] - 1)
        columns = canvas.column_of[rows].gather(1, positions)
        input_ids = canvas.sequences[rows].gather(1, columns)
        exits, wanted, num_wanted = {}, rows.new_zeros(len(rows), 1), copies  # one query, as attention fails with none
        if forward_pass.predicts:
            exits = {"loop_tolerance": config.loop_tolerance, "loop_policy": config.loop_policy}
            wanted = (canvas.position_of[rows].gather(1, step.columns) - starts[:, None]).clamp(min=0, max=width - 1)
            num_wanted = step.counted.sum(-1) * copies
        cache, cache_rows = forward_pass.cache, forward_pass.rows
        if copies > 1:  # guidance
            masked = input_ids.masked_fill(canvas.given[rows].gather(1, columns), model_config.mask_token_id)
            input_ids, positions, wanted = torch.cat((input_ids, masked)), positions.repeat(2, 1), wanted.repeat(2, 1)
            real = None if real is None else real.repeat(2, 1)
            cache_rows = torch.cat((cache_rows, cache_rows + len(canvas.lengths)))
        if bool((forward_pass.reach < forward_pass.stops).any()) or (cache is None and not torch.equal(*host[2:])):
            wrong = "`reach` is less than `stops`, or more without a `cache`"
            raise ValueError(f"`passes` of {type(self.plan).__name__} returned a pass whose {wrong}.")
        if cache is not None:
            is_all = torch.equal(cache_rows, torch.arange(len(cache.lengths)))
            cache = cache.select(None if is_all else cache_rows.to(device), forward_pass.reach.repeat(copies))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=None if real is None else real.long(),
            position_ids=positions[:1] if is_even else positions,
            past_key_values=cache,
            num_loops=self.num_loops(step.index),
            visible_loops=config.visible_loops,
            logits_to_keep=wanted,
            **{"return_dict": True, **exits},
        )
        if forward_pass.keeps is not None:
            forward_pass.cache.lengths[cache_rows] = forward_pass.keeps.repeat(copies)
        logits, loops, computed = outputs.logits.float(), outputs.loops, (stops - starts) * copies
        token_loops = loops * (stops - starts).repeat(copies) if outputs.token_loops is None else outputs.token_loops
        if copies > 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + config.guidance_scale * (conditional - unconditional)
            loops, token_loops = sum(loops.chunk(2)), sum(token_loops.chunk(2))
        logits[..., canvas.never] = -math.inf
        flops = model_config.pass_flops(computed, reach, num_wanted, num_wanted, token_loops)
        return logits, torch.stack((torch.full_like(loops, copies), loops, flops))


class ReusingDenoiser(Denoiser):
    """
    For rules that may commit nothing. Rows that the last step did not change keep their logits, since computing them
    again would give the same result.
    """

    last: tuple = (None, None, None)  # block, step and tokens of the last prediction

    def predict(self, block, step):
        (last_block, before, old_tokens), tokens, known = self.last, self.canvas.sequences[step.rows], {}
        loops = self.num_loops(step.index)
        if last_block is block and not self.plan.refreshes(step.index) and self.num_loops(before.index) == loops:
            places = map(before.row_list.index, step.row_list)  # a row that is done stays so
            known = {i: j for i, j in enumerate(places) if torch.equal(tokens[i], old_tokens[j])}
        if not known:
            super().predict(block, step)
        else:
            step.logits = before.logits.new_empty(*step.columns.shape, before.logits.shape[-1])
            step.logits[list(known)] = before.logits[list(known.values()), : step.columns.shape[1]]
            step.loops = torch.zeros_like(step.rows)
            new = [i for i in range(len(step.row_list)) if i not in known]
            if new:
                parts = {name: getattr(step, name)[new] for name in ("rows", "columns", "counted")}
                part = replace(step, row_list=[step.row_list[i] for i in new], **parts)
                super().predict(block, part)
                step.logits[new], step.loops[new] = part.logits, part.loops
        self.last = (block, step, tokens)


def choose(canvas: Canvas, step: DenoisingStep, processors, warpers, draws: bool) -> None:
    """Fills in the scores and tokens of a step: the most likely tokens, or sampled ones with `draws`."""
    scores = step.logits
    if len(processors) > 0:
        scores = scores.clone()  # confidence is read from `logits`
        for i, row in enumerate(step.row_list):
            # Only the row's own tokens and positions, so that padding and other rows have no effect
            tokens, masked = canvas.sequences[row][canvas.real[row]], step.masked[i]
            if bool(masked.any()):  # with remasking, a step also covers tokens
                scores[i, masked] = processors(tokens.expand(int(masked.sum()), -1), scores[i, masked])
    if len(warpers) > 0:
        scores = warpers(None, scores.flatten(0, 1)).view(scores.shape)
    if scores is not step.logits:
        scores[..., canvas.never] = -math.inf
    best, step.tokens = scores.max(-1)
    step.scores, canvas.failed = scores, canvas.failed + ~best.isfinite().all()
    if draws:
        step.tokens = draw_tokens(scores, step.noise())
    if canvas.config.eos_penalty > 0:
        ends = step.tokens.new_tensor(_as_list(canvas.config.eos_token_id))
        step.penalty = canvas.config.eos_penalty * torch.isin(step.tokens, ends)


class LoopMDMGenerationMixin(GenerationMixin):
    """
    Adds `generate` to a masked diffusion model with loops.

    Arguments of `generate`:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            Prompt, padded on either side. Its [MASK] tokens are filled in. By default, the start token, if any.
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            0 on padding. By default, `pad_token_id` is padding. If it is also an end or start token, it counts as
            text, and rows that begin or end with different numbers of it raise an error.
        generation_config ([`LoopMDMGenerationConfig`], *optional*): All other arguments, also accepted by name.
        logits_processor (`LogitsProcessorList`, *optional*):
            Called for every row on its tokens without padding, `(num_positions, length)`, and the scores of the
            block's [MASK]s, `(num_positions, vocab_size)`, before the sampling arguments apply. The result does not
            affect confidence.
        stopping_criteria (`StoppingCriteriaList`, *optional*):
            Checked after every block, once for each of its tokens. A row is padded after the token that stops it.
        streamer (`BaseStreamer`, *optional*):
            Receives the prompt and every finished block; needs a single row. If it has a `put_draft`
            (`TextDiffusionStreamer`), it also receives a draft of the block after each step. If its
            `takes_confidence` is True, `put_draft` also gets `confidence`, the raw probability of the token chosen
            last for each position, NaN where none was.
        generator (`torch.Generator`, or a `list` with one per row of the output, *optional*): Source of randomness.
        past_key_values ([`LoopMDMCache`], *optional*):
            The cache of an earlier call whose sequences the input continues (block-causal models only). The call
            extends it.
        tokenizer (*optional*): For `stop_strings`.
    """

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
        tokenizer: Any = None,
        **kwargs,
    ) -> torch.LongTensor | LoopMDMGenerationOutput:
        r"""
        Denoises the [MASK] tokens of `input_ids`, and of `max_new_tokens` new positions after them:

        1. Read the arguments: `kwargs` override `generation_config`, or the model's own if none is given.
        2. Lay out the canvas: input, new positions as [MASK], and the division into blocks.
        3. For every block, from left to right, and every denoising step:
            a. Predict: one forward pass of the rows that still have a [MASK] in the block.
            b. Choose a token for every [MASK] of the block.
            c. Commit the tokens that the commit rule selects; remask some earlier ones (`remask_probability`).
            d. End the rows that have reached their end token.
        4. Pad after the ends and return the sequences, `(batch_size * num_return_sequences, length + new tokens)`, or
           a [`LoopMDMGenerationOutput`] with `return_dict_in_generate=True`.

        With greedy decoding, or one generator per row, other rows and padding do not change a row's result.
        """
        # 1. Read the arguments
        self._check_adapters()
        config = self._prepare_generation_config(generation_config, **kwargs)[0]
        if input_ids is None:  # of pipelines for an empty prompt
            input_ids = torch.tensor([_as_list(config.bos_token_id)], dtype=torch.long, device=self.device)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        eos_token_ids, warpers = _as_list(config.eos_token_id), config.warpers()
        processors, criteria = self._prepare_lists(config, logits_processor, stopping_criteria, tokenizer)

        # 2. Lay out the canvas
        canvas = self._prepare_canvas(config, input_ids, attention_mask, generator, streamer)
        draws = config.do_sample or canvas.rule.draws_tokens
        denoiser = (ReusingDenoiser if canvas.may_stand_still else Denoiser)(self, canvas, past_key_values)
        watchers = make_watchers(canvas, streamer)

        # 3. Denoise block after block
        for block in canvas.blocks():
            for index in range(block.num_steps):
                step = block.step(index)
                if step is None:
                    break
                denoiser.predict(block, step)
                choose(canvas, step, processors, warpers, draws)
                commit = canvas.rule(step)
                check_mask(type(canvas.rule).__name__, commit, tuple(step.masked.shape))
                commit = commit & step.masked  # a custom rule may mark fillers, which are given tokens
                canvas.commit(step, commit)
                canvas.end_at(eos_token_ids)
                for watcher in watchers:
                    watcher.on_step(block, step, commit)
            canvas.check(block)
            canvas.stop_at(criteria, block)
            for watcher in watchers:
                watcher.on_block(block)

        # 4. Pad after the ends, and report
        fills = (config.pad_token_id, self.config.pad_token_id, *eos_token_ids, int(canvas.mask_token_id == 0))
        fill = next(token for token in fills if token is not None)
        sequences = canvas.sequences.masked_fill(canvas.behind & canvas.to_denoise, fill)
        report = {name: value for watcher in watchers for name, value in watcher.end().items()}
        if not config.return_dict_in_generate:
            return sequences
        real = (canvas.real & ~canvas.behind).long()
        return LoopMDMGenerationOutput(sequences, real, cache=denoiser.finished_cache(), **denoiser.cost(), **report)

    def _check_adapters(self, use: str = "`generate`") -> None:
        """Raises a ValueError if PEFT changes forward passes in a way that fails if they cover only some positions."""
        wrong, adapters = None, getattr(self, "peft_config", {}).values()
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:
            wrong = "soft prompts (prompt, prefix or P-tuning)"
        elif any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
            wrong = "activated LoRA, whose start PEFT counts from the end of the input"
        if wrong is not None:
            raise ValueError(f"{use} cannot apply {wrong}; use LoRA.")

    def _prepare_generation_config(self, generation_config, **kwargs) -> tuple[LoopMDMGenerationConfig, dict]:
        """Returns the arguments of a call and an empty dict, as transformers' pipelines expect."""
        config_class = self.generation_config_class
        config = self.generation_config if generation_config is None else generation_config
        if not isinstance(config, GenerationConfig):
            fix = "give a LoopMDMGenerationConfig, or its arguments by name"
            raise ValueError(f"`generation_config` is {config!r}; {fix}.")
        config = copy.copy(config) if hasattr(config, "FIELDS") else config_class.from_dict(config.to_diff_dict())
        # A config made for one call need not repeat the special tokens.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.generation_config, name))
        if kwargs.get("do_sample") is False:
            # Greedy on request, whatever sampling arguments the config has.
            for name in SAMPLING:
                setattr(config, name, kwargs.get(name, config_class.FIELDS[name][0]))
        config.update(**{name: kwargs.pop(name) for name in config_class.FIELDS if name in kwargs})
        reject_unknown(kwargs)
        config.validate()
        config.validate_for(self.config)
        resolve_policy(self.config, config.loop_tolerance, config.visible_loops, config.loop_policy)
        return config, {}

    def _prepare_canvas(self, config, input_ids, attention_mask, generator, streamer) -> Canvas:
        """Checks the input, repeats its rows for `num_return_sequences`, and appends [MASK]s."""
        real = self._check_input(config, input_ids, attention_mask)
        input_ids, length, mask_token_id = input_ids.long(), input_ids.shape[1], self.config.mask_token_id
        has_masks, limit = bool((real & (input_ids == mask_token_id)).any()), self.config.max_position_embeddings
        new = config.max_new_tokens
        if new is None and config.max_length is not None:
            new = config.max_length - length
        elif new is None:
            new = 0 if has_masks else max(1, min(DEFAULT_NEW_TOKENS, limit - length))
            if new > 0:
                logger.warning(f"`generate` appends {new} tokens, as in transformers; give `max_new_tokens`.")
        repeats, wrong = config.num_return_sequences, None
        num_rows, generators = len(input_ids) * repeats, _as_list(generator)
        if new < 0:
            wrong = f"`max_length` is {config.max_length}, and the input has {length} tokens; use `max_new_tokens`"
        elif new == 0 and not has_masks:
            wrong = f"There is nothing to generate; give `max_new_tokens`, or [MASK]s ({mask_token_id}) to fill in"
        elif length + new > limit:
            wrong = f"{length} input tokens and {new} new ones exceed `max_position_embeddings` ({limit}); shorten one"
        elif isinstance(generator, list | tuple) and len(generator) != num_rows:
            wrong = f"`generator` holds {len(generator)} generators for {num_rows} rows; give one for each"
        elif not all(isinstance(one, torch.Generator) for one in generators):
            wrong = f"`generator` is {generator!r}; it must be a torch.Generator, or a list with one per row"
        elif len({*map(id, generators)}) < len(generators):
            wrong = "`generator` holds one generator several times, which would tie rows together; give each its own"
        elif streamer is not None and num_rows != 1:
            wrong = f"`streamer` shows one row, and there are {num_rows}; generate them one by one"
        if wrong is not None:
            raise ValueError(f"{wrong}.")
        sequences, real = pad(input_ids, (0, new), value=mask_token_id), pad(real, (0, new), value=True)
        rows = sequences.repeat_interleave(repeats, 0), real.repeat_interleave(repeats, 0)
        return Canvas(*rows, config, self.config, generator)

    def _check_input(self, config, input_ids, attention_mask) -> torch.BoolTensor:
        """Checks the input and returns which tokens are real, `(batch_size, length)`."""
        if not isinstance(input_ids, torch.Tensor):
            raise ValueError(
                f"`input_ids` is a {type(input_ids).__name__}; give a tensor (a tokenizer's: `**inputs`)."
            )
        shape, padding = tuple(input_ids.shape), config.pad_token_id
        if len(shape) != 2 or shape[0] == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            needed = "int64 or int32 of shape (batch_size, length), with at least one row"
            raise ValueError(f"`input_ids` is {input_ids.dtype} of shape {shape}; it must be {needed}.")
        check_shape("attention_mask", attention_mask, shape)
        if attention_mask is not None:
            real = attention_mask.to(input_ids.device) != 0
        else:
            real = input_ids != padding if padding is not None else torch.ones_like(input_ids, dtype=torch.bool)
            if padding is not None and padding in (*_as_list(config.eos_token_id), config.bos_token_id):
                ends = torch.stack((real, real.flip(-1))).long().argmax(-1) if shape[1] > 0 else real.new_zeros(2, 1)
                if bool((ends != ends[:, :1]).any()) or not bool(real.any(-1).all()):
                    raise ValueError(
                        f"Some rows of `input_ids` begin or end with more of token {padding}, which may be padding "
                        "or text here (`pad_token_id` is an end or start token too); give the `attention_mask`."
                    )
                real = torch.ones_like(real)
        bad = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)].tolist()
        empty = (~real.any(-1)).nonzero().flatten().tolist() if shape[1] > 0 else []
        if bad:
            raise ValueError(f"`input_ids` holds {bad[0]}, outside the vocabulary of {self.config.vocab_size} tokens.")
        if empty:
            raise ValueError(f"Rows {empty} of the input are all padding; leave them out.")
        return real

    @staticmethod
    def _prepare_lists(config, logits_processor, stopping_criteria, tokenizer):
        """Returns the processors and criteria of the call, with a criterion for `stop_strings`."""
        for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
            if not isinstance(value, list | tuple | None) or not all(map(callable, value or ())):
                raise ValueError(f"`{name}` is {value!r}; give a list of transformers' objects for it, or none.")
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.stop_strings:
            if tokenizer is None:
                raise ValueError("`stop_strings` needs the `tokenizer`; give both to `generate`.")
            try:
                criteria.append(stop_criterion(tokenizer, tuple(_as_list(config.stop_strings)), len(tokenizer)))
            except Exception as error:  # the tokenizers library raises a plain Exception
                wrong = f"`stop_strings` is {config.stop_strings!r}, which this tokenizer cannot look for ({error})"
                raise ValueError(f"{wrong}; use `stopping_criteria`.") from error
        return LogitsProcessorList(logits_processor or []), criteria

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Reads generation_config.json when a model is loaded; transformers would make a plain GenerationConfig."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_diff_dict())
        elif pretrained_model_name_or_path is not None:
            # Older versions give in order where files come from. `kwargs` also have changes of the model's config.
            given = {**dict(zip(HUB_OPTIONS, args, strict=False)), **kwargs}
            names = (*HUB_OPTIONS, "pad_token_id", "bos_token_id", "eos_token_id")
            options, path = {name: given[name] for name in names if name in given}, pretrained_model_name_or_path
            if os.path.isdir(path):  # transformers would prefer a file of the folder to that of its subfolder
                path = os.path.join(path, options.pop("subfolder", ""))
            # Without the file, the config made from the model's config stays. `from_pretrained` reports a damaged one.
            with contextlib.suppress(OSError):
                self.generation_config = self.generation_config_class.from_pretrained(path, **options)
            if self.generation_config.num_loops is not None:  # otherwise the model's config decides, now and later
                self.generation_config.num_loops = given.get("num_loops", self.generation_config.num_loops)


__all__ = ["Canvas", "LoopMDMGenerationConfig", "LoopMDMGenerationMixin", "LoopMDMGenerationOutput"]
