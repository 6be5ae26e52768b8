# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Runs the three graphs that `loopmdm export --format onnx` writes. It needs numpy and onnxruntime alone.

>>> model = OnnxModel("exported")
>>> logits = model.logits(input_ids, num_loops=6)
>>> sequences = model.generate(input_ids, max_denoising_steps=8)
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

GRAPHS = ("prelude", "loop", "readout")
TIE = 1e-5  # difference of scores, relative to them and to the probabilities they come from, that is none
# What `generate` does here, of the arguments of a LoopMDM's `generate`, with the defaults
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 0,
    "num_loops": None,
    "block_length": None,
    "max_denoising_steps": None,
    "unmasking": "confidence",
    "confidence_threshold": None,
    "suppress_tokens": None,
    "pad_token_id": None,
    "eos_token_id": None,
}


class OnnxModel:
    """
    A LoopMDM as three graphs: `prelude` (embeddings and head), `loop` (mid once), and `readout` (tail and logits).

    Args:
        folder (`str` or `Path`): What `loopmdm export` wrote.
        about (`dict`, *optional*): What model.json holds, if it is not in the folder.
        providers (`list[str]`, *optional*): onnxruntime's execution providers; by default the CPU's.
        num_threads (`int`, defaults to 0): Threads of an operator; 0 leaves it to onnxruntime.
    """

    def __init__(
        self,
        folder: str | Path,
        about: dict[str, Any] | None = None,
        providers: list[str] | None = None,
        num_threads: int = 0,
    ):
        folder, options = Path(folder), onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self.about = about or json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers or ["CPUExecutionProvider"])
            for name in GRAPHS
        }

    def logits(self, input_ids: Any, attention_mask: Any = None, num_loops: int | None = None) -> np.ndarray:
        """
        Scores, float32 `(batch_size, length, vocab_size)`; row `i` predicts token `i`, and the mask token's is -inf.

        Args:
            input_ids: Integers `(batch_size, length)`, what is to be predicted being the mask token.
            attention_mask (*optional*): 0 on padding, `(batch_size, length)`; by default nothing is padding.
            num_loops (`int`, *optional*): How often mid is applied; by default as the model's config says.
        """
        num_loops = self.about["num_loops"] if num_loops is None else num_loops
        if num_loops < 1:
            raise ValueError(f"`num_loops` is {num_loops}; it must be at least 1.")
        tokens = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        states = self._run("prelude", tokens, mask)
        for _ in range(num_loops):
            looped = self._run("loop", states, mask)
            if self.about["loop_update"] == "damped":  # a part of the way to mid(h)
                looped = states + (looped - states) * np.float32(1 / num_loops)
            states = looped
        return self._run("readout", states, mask)

    def _run(self, name: str, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
        session, inputs = self.sessions[name], {"input": value, "attention_mask": mask}
        # Graphs of a fixed length take no mask.
        return session.run(None, {node.name: inputs[node.name] for node in session.get_inputs()})[0]

    def generate(self, input_ids: Any, attention_mask: Any = None, **settings: Any) -> np.ndarray:
        """
        Fills in the mask tokens of `input_ids`, then those of `max_new_tokens` new positions, greedily: the tokens of
        a LoopMDM's `generate`.

        Args:
            input_ids: Integers `(batch_size, length)`.
            attention_mask (*optional*): 0 on padding, `(batch_size, length)`; by default the pad token is padding.
            settings: Those of `SETTINGS`, over those saved with the model.

        Returns:
            int64 `(batch_size, length + max_new_tokens)`.

        Raises:
            ValueError: A setting, given or saved with the model, is none of `SETTINGS`; or values do not fit.
        """
        settings = self._settings(settings)
        tokens, new = np.array(input_ids, dtype=np.int64), settings["max_new_tokens"] or 0
        real = self._real(tokens, settings) if attention_mask is None else np.asarray(attention_mask) != 0
        limit = self.about["max_position_embeddings"]
        if tokens.ndim != 2 or tokens.shape != real.shape or tokens.shape[1] + new > limit:
            raise ValueError(
                f"`input_ids` has shape {tokens.shape}, `attention_mask` {real.shape}, and {new} tokens are new; give "
                f"(batch_size, length) for both, and at most {limit} positions in all."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.about["vocab_size"]:
            raise ValueError(f"`input_ids` goes beyond the vocabulary of {self.about['vocab_size']} tokens.")
        tokens = np.pad(tokens, ((0, 0), (0, new)), constant_values=self.about["mask_token_id"])
        real = np.pad(real, ((0, 0), (0, new)), constant_values=True)
        if not (real & (tokens == self.about["mask_token_id"])).any():
            raise ValueError("There is nothing to generate; give `max_new_tokens`, or mask tokens to fill in.")
        return self._denoise(tokens, real, settings)

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        settings = {**SETTINGS, **self.about["generation"], **given}
        for name, value in settings.items():
            if name not in SETTINGS and value is not None:
                where = "was given" if name in given else "is saved with the model"
                raise ValueError(
                    f"`{name}` ({value!r}) {where}, and is not done here; pass None for it, or generate with torch. "
                    f"Known are {', '.join(SETTINGS)}."
                )
        if settings["unmasking"] not in RULES:
            raise ValueError(f"`unmasking` is {settings['unmasking']!r}; choose one of {', '.join(RULES)}.")
        for name, least in (("max_new_tokens", 0), ("block_length", 1), ("max_denoising_steps", 1)):
            if settings[name] is not None and settings[name] < least:
                raise ValueError(f"`{name}` is {settings[name]}; it must be at least {least}.")
        length, block_size = settings["block_length"], self.about["attention_block_size"]
        if block_size and (length or 0) % block_size:
            raise ValueError(f"`block_length` is {length}; this model's attention takes multiples of {block_size}.")
        steps, loops = settings["max_denoising_steps"], _as_list(settings["num_loops"])
        if len(loops) > (steps or len(loops)):
            raise ValueError(f"`num_loops` lists {len(loops)} steps of {steps}; give one number or more, one a step.")
        threshold, size = settings["confidence_threshold"], self.about["vocab_size"]
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"`confidence_threshold` is {threshold}; it must be above 0, and at most 1.")
        for token in settings["suppress_tokens"] or ():
            if not 0 <= token < size:
                raise ValueError(f"`suppress_tokens` holds {token}, which is outside the vocabulary of {size} tokens.")
        return settings

    def _real(self, tokens: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
        """Which tokens are real, where no attention mask says so."""
        padding = settings["pad_token_id"]
        if padding is None:
            return np.ones(tokens.shape, dtype=bool)
        real = tokens != padding
        if padding in (*_as_list(settings["eos_token_id"]), self.about.get("bos_token_id")):
            # Text, unless rows begin or end with different numbers of it
            if not real.any(-1).all() or np.ptp(np.stack((real, real[:, ::-1])).argmax(-1), axis=1).any():
                raise ValueError(f"Token {padding} may be padding or text here; give the `attention_mask`.")
            return np.ones(tokens.shape, dtype=bool)
        return real

    def _denoise(self, tokens: np.ndarray, real: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
        mask_token_id, block_size = self.about["mask_token_id"], self.about["attention_block_size"]
        length, ends = tokens.shape[1], np.full(len(tokens), tokens.shape[1])  # where each row ends
        loops = _as_list(settings["num_loops"]) or [self.about["num_loops"]]
        to_denoise = real & (tokens == mask_token_id)
        # Blocks are counted over a row's real positions, from the first mask token on.
        positions, block_length = real.cumsum(-1) - 1, settings["block_length"] or block_size or length
        first = np.where(to_denoise, positions, length).min(-1, keepdims=True)
        if block_size is not None:
            first = first // block_length * block_length
        block_of = np.where(to_denoise, (positions - first) // block_length, -1)
        for block in range(block_of.max(initial=-1) + 1):
            members = (block_of == block) & (ends == length)[:, None]
            sizes = members.sum(-1)
            steps = np.minimum(sizes, settings["max_denoising_steps"] or length)
            for index in range(steps.max()):
                masked = members & (tokens == mask_token_id) & (ends == length)[:, None]
                rows = np.flatnonzero(masked.any(-1))
                if len(rows) == 0:
                    break
                scores = self.logits(tokens[rows], real[rows], loops[min(index, len(loops) - 1)])
                scores[..., [mask_token_id, *(settings["suppress_tokens"] or ())]] = -np.inf
                for row, row_scores in zip(rows, scores, strict=True):
                    columns = np.flatnonzero(masked[row])
                    count = quota(sizes[row], len(columns), index, steps[row])
                    chosen, committed = choose(row_scores[columns], count, settings)
                    tokens[row, columns[committed]] = chosen[committed]
                # A row ends at an end token with no mask token before it and no given token after it.
                done = to_denoise & ((real & (tokens == mask_token_id)).cumsum(-1) == 0)
                after = np.arange(length) > np.where(real & ~to_denoise, np.arange(length), -1).max(-1, keepdims=True)
                stops = done & after & np.isin(tokens, _as_list(settings["eos_token_id"]))
                ends = np.where(stops, np.arange(length), length).min(-1)
        fills = (settings["pad_token_id"], self.about["pad_token_id"], *_as_list(settings["eos_token_id"]))
        fill = next((token for token in fills if token is not None), int(mask_token_id == 0))
        return np.where(to_denoise & (np.arange(length) > ends[:, None]), fill, tokens)


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def quota(size: int, left: int, index: int, steps: int) -> int:
    """How many of `left` masked positions step `index` commits, so that `steps` of them fill a block of `size`."""
    due = size // steps * (index + 1) + min(size % steps, index + 1)
    return min(max(due - (size - left), 1), left)


def choose(logits: np.ndarray, count: int, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of `logits`, `(num_positions, vocab_size)`, the likeliest tokens and which are committed, `(num_positions,)`."""
    tokens, most = logits.argmax(-1), logits.max(-1)
    if not np.isfinite(most).all():
        raise ValueError("No token can be chosen at some position: its scores are NaN, infinite or all -inf.")
    log_probs = logits - (most + np.log(np.exp(logits - most[:, None]).sum(-1)))[:, None]
    confidence = np.exp(log_probs.max(-1))
    scores = RULES[settings["unmasking"]](log_probs)
    # Scores that differ by rounding from the last one tie with it, and the leftmost come first.
    last = np.argsort(-scores, kind="stable")[count - 1]
    tie = TIE * (confidence[last] + np.abs(scores[last]))
    group = np.where(scores > scores[last] + tie, 0, np.where(scores >= scores[last] - tie, 1, 2))
    committed = np.zeros(len(scores), dtype=bool)
    committed[np.argsort(group, kind="stable")[:count]] = True
    if settings["confidence_threshold"] is not None:
        committed |= confidence >= np.float32(settings["confidence_threshold"])
    return tokens, committed


def _margin(log_probs: np.ndarray) -> np.ndarray:
    second, first = np.exp(np.partition(log_probs, -2, axis=-1)[:, -2:]).T
    return first - second


# The scores by which positions are committed, highest first, `(num_positions,)`
RULES = {
    "confidence": lambda log_probs: np.exp(log_probs.max(-1)),
    "margin": _margin,
    "entropy": lambda log_probs: (np.exp(log_probs) * np.maximum(log_probs, -1e4)).sum(-1),
    "left_to_right": lambda log_probs: -np.arange(len(log_probs), dtype=np.float32),
}
