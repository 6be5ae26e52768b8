# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The output of `generate`, and the watchers that collect it and feed a streamer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .cache_utils import LoopMDMCache
from .commit_rules import Block, Canvas, DenoisingStep


@dataclass
class LoopMDMTraceStep:
    """Record of denoising step `step` in block `block`. Rows that were already done ran no loops."""

    block: int
    step: int
    loops: torch.LongTensor  # (num_rows,), loops run for each row
    committed: torch.BoolTensor  # (num_rows, length), positions filled
    remasked: torch.BoolTensor  # (num_rows, length), positions set back to [MASK]
    tokens: torch.LongTensor  # (num_rows, length), the sequences after the step
    predictions: torch.LongTensor  # (num_rows, length), tokens chosen for the [MASK]s, -1 elsewhere
    # For the tokens chosen for the [MASK]s, (num_rows, length), NaN elsewhere: the probability under the raw
    # distribution, and the log-probability under the distribution that the token was drawn from
    confidence: torch.FloatTensor
    log_probs: torch.FloatTensor
    real: torch.BoolTensor | None = None  # (num_rows, length), the same in every step: what is not padding


@dataclass
class LoopMDMGenerationOutput(ModelOutput):
    """
    Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape `(num_rows, length)`): Input and new tokens.
        attention_mask (the same): 0 on padding of the input and after a row's end, 1 on tokens. A later call that
            continues the sequences needs it.
        forward_passes, loops, flops (`torch.LongTensor` of shape `(num_rows,)`):
            The cost of each row: forward passes (two per step with guidance), loops of all passes, and floating point
            operations of the matrix products (`model.flops`), without the filler of shorter rows.
        seconds (`float`): Wall time of the call. The first call in a process is slower; warm up before comparing.
        tokens_per_second (`float`): Denoised tokens of all rows per second, up to and including the end token.
        tokens_per_forward (`torch.FloatTensor` of shape `(num_rows,)`): The row's denoised tokens per forward pass.
        cache ([`LoopMDMCache`], *optional*):
            With exact caching, all blocks but the last, for a later call that continues the sequences.
        scores (`tuple[torch.FloatTensor]`, with `output_scores=True`):
            Scores that tokens were chosen by, after processors and sampling arguments: `(num_rows, vocab_size)` for
            each column denoised in any row, from left to right; NaN in rows that committed no token there.
        trace (`list[LoopMDMTraceStep]`, with `output_trace=True`): Every denoising step in order.
    """

    sequences: torch.LongTensor
    attention_mask: torch.LongTensor | None = None
    forward_passes: torch.LongTensor | None = None
    loops: torch.LongTensor | None = None
    flops: torch.LongTensor | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    cache: LoopMDMCache | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    trace: list[LoopMDMTraceStep] | None = None


class Watcher:
    """Is called after each denoising step and block is written to the canvas, and reports at the end."""

    def __init__(self, canvas: Canvas):
        self.canvas = canvas

    def on_step(self, block: Block, step: DenoisingStep, commit: torch.Tensor) -> None:
        """Called after a step that committed `commit`, `(N, P)` bool."""

    def on_block(self, block: Block) -> None:
        """Called after the last step of a block."""

    def end(self) -> dict[str, Any]:
        """Returns fields of the [`LoopMDMGenerationOutput`]."""
        return {}


class Trace(Watcher):
    """Records every step as a [`LoopMDMTraceStep`]."""

    def __init__(self, canvas):
        super().__init__(canvas)
        self.steps: list[LoopMDMTraceStep] = []

    def end(self):
        return {"trace": self.steps}

    def on_step(self, block, step, commit):
        sequences, real = self.canvas.sequences, self.canvas.real

        def scatter(values: torch.Tensor, where: torch.Tensor, fill: Any) -> torch.Tensor:
            out = torch.full(sequences.shape, fill, dtype=values.dtype, device=values.device)
            i, j = where.nonzero(as_tuple=True)
            out[step.rows[i], step.columns[i, j]] = values[where]
            return out

        log_probs = step.scores.log_softmax(-1).gather(-1, step.tokens[..., None]).squeeze(-1)
        loops = torch.zeros_like(block.size).index_copy(0, step.rows, step.loops)
        commits = scatter(commit, commit, False), scatter(step.remask, step.remask, False)
        tokens = sequences.clone(), scatter(step.tokens, step.masked, -1)
        scores = scatter(step.log_probs.exp(), step.masked, math.nan), scatter(log_probs, step.masked, math.nan)
        self.steps.append(LoopMDMTraceStep(block.index, step.index, loops, *commits, *tokens, *scores, real))


class Scores(Watcher):
    """Keeps the scores by which each token was chosen."""

    def __init__(self, canvas):
        super().__init__(canvas)
        is_denoised = canvas.to_denoise.any(0)
        self.index, self.shape = is_denoised.long().cumsum(-1) - 1, (len(canvas.ends), int(is_denoised.sum()))
        self.values: torch.Tensor | None = None

    def on_step(self, block, step, commit):
        if self.values is None:
            self.values = step.scores.new_full((*self.shape, step.scores.shape[-1]), math.nan)
        i, j = commit.nonzero(as_tuple=True)
        self.values[step.rows[i], self.index[step.columns[i, j]]] = step.scores[i, j]

    def end(self):
        return {"scores": () if self.values is None else self.values.unbind(1)}


class Stream(Watcher):
    """Feeds a streamer with row 0: the prompt, drafts of the current block, finished blocks, and the rest."""

    def __init__(self, canvas, streamer: BaseStreamer):
        super().__init__(canvas)
        self.streamer, self.takes_confidence = streamer, getattr(streamer, "takes_confidence", False)
        # Of the token chosen last for every column, its probability; NaN where none was
        self.confidence = torch.full(canvas.sequences.shape[1:], math.nan, device=canvas.sequences.device)
        self.sent = int(canvas.to_denoise[0].long().argmax())
        # Even if the prompt is empty, since `skip_prompt` drops the first call.
        streamer.put(self._real(canvas.sequences[0], 0, self.sent))

    def _real(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Those of columns that are not padding."""
        return values[start:stop][self.canvas.real[0, start:stop]].cpu()

    def _end_of(self, block: Block) -> int:
        """Column after a block and the given tokens that follow it."""
        later = self.canvas.block_of[0] > block.index
        return int(later.long().argmax()) if bool(later.any()) else len(later)

    def _put(self, stop: int) -> None:
        tokens = self._real(self.canvas.sequences[0], self.sent, stop)
        self.sent = max(self.sent, stop)
        if len(tokens) > 0:
            self.streamer.put(tokens)

    def on_step(self, block, step, commit):
        if not hasattr(self.streamer, "put_draft"):
            return
        stop, known = self._end_of(block), {}
        if self.takes_confidence:
            chosen = step.masked[0]
            self.confidence[step.columns[0, chosen]] = step.log_probs[0, chosen].exp()
            known["confidence"] = self._real(self.confidence, self.sent, stop)
        self.streamer.put_draft(self._real(self.canvas.sequences[0], self.sent, stop), **known)

    def on_block(self, block):
        self._put(min(self._end_of(block), int(self.canvas.ends[0]) + 1))

    def end(self):
        self._put(int(self.canvas.ends[0]) + 1)
        self.streamer.end()
        return {}


def make_watchers(canvas: Canvas, streamer: BaseStreamer | None) -> list[Watcher]:
    """Makes the watchers that the generation config needs."""
    wanted = {Trace: canvas.config.output_trace, Scores: canvas.config.output_scores}
    watchers = [kind(canvas) for kind, is_wanted in wanted.items() if is_wanted]
    return watchers if streamer is None else [*watchers, Stream(canvas, streamer)]


__all__ = ["LoopMDMGenerationOutput", "LoopMDMTraceStep", "Watcher", "make_watchers"]
