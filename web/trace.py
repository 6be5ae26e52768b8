# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A generation as one self-contained HTML file that plays it step by step."""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..data import write_atomically
from ..generation_outputs import LoopMDMGenerationOutput

# The kinds of a position in a step; trace.js uses these numbers.
GIVEN, WAITING, GUESSED, KEPT, COMMITTED, REMASKED = range(6)
NOT_KNOWN = 255  # in place of a percentage
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
script-src '{script_hash}'; style-src '{style_hash}'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p id="facts">{facts}</p>
</header>
<main>
{rows}
</main>
<noscript><p>These are the final texts. The steps that led to them play with JavaScript.</p></noscript>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""
ROW = """<section class="text" aria-labelledby="row-{number}">
<h2 id="row-{number}">{name}</h2>
<p class="cost">{cost}</p>
<div class="tokens">{text}</div>
</section>"""


def trace_to_html(
    output: LoopMDMGenerationOutput,
    tokenizer: Any,
    title: str = "How it was written",
    names: Sequence[str] | None = None,
    columns: int | None = None,
) -> str:
    """
    An HTML file that shows every denoising step of a generation: the guesses and their confidence, which tokens were
    committed and which were remasked, and blocks, loops and cost, for all rows.

    Args:
        output ([`LoopMDMGenerationOutput`]): The output of `generate` with `return_dict_in_generate=True` and
            `output_trace=True`.
        tokenizer: The tokenizer, which decodes the tokens.
        title (`str`, defaults to `"How it was written"`): Heading of the page.
        names (`Sequence[str]`, *optional*, defaults to "Text 1", "Text 2", ...): The name of each row.
        columns (`int`, *optional*): Show the tokens of a row as a board with this many columns, and not as text.

    Returns:
        `str`: The contents of the file. It loads nothing else, and texts in it are escaped. 2,000 tokens over 256
        steps take 1 to 2 MB.

    Raises:
        ValueError: There is no trace, or it is empty; or `names` or `columns` do not fit.
    """
    if output.trace is None:
        raise ValueError("The output has no trace; give `generate` `return_dict_in_generate` and `output_trace`.")
    num_rows = len(output.sequences)
    if len(output.trace) == 0 or num_rows == 0:
        raise ValueError("The trace holds no denoising step, so there is nothing to show.")
    if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 1):
        raise ValueError(f"`columns` is {columns!r}; it must be an integer of at least 1.")
    if names is not None and len(names) != num_rows:
        raise ValueError(f"`names` has {len(names)} entries for {num_rows} rows; give one for each.")
    names = [f"Text {i + 1}" for i in range(num_rows)] if names is None else names
    words = _Vocabulary(tokenizer)
    rows = [_trace_row(output, row, words) for row in range(num_rows)]
    steps = [{"block": step.block, "step": step.step} for step in output.trace]
    data = {"steps": steps, "columns": columns, "tokens": words.texts, "rows": rows}
    folder = Path(__file__).parent
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("trace.js", "trace.css"))
    sections = (_section(output, row, name, rows[row], words) for row, name in enumerate(names))
    return PAGE.format(
        title=escape(title),
        facts=escape(_facts(output)),
        rows="\n".join(sections),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        # "</script" would end the script element even inside a string.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )


class _Vocabulary:
    """The tokens of a page, numbered from 0 in order of appearance, and their texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.numbers, self.texts = tokenizer, {-1: -1}, []

    def number(self, tokens: np.ndarray) -> np.ndarray:
        """The numbers of token ids of any shape, int32; -1 stays -1."""
        unique, index = np.unique(tokens, return_inverse=True)
        for token in unique.tolist():
            if token not in self.numbers:
                self.numbers[token] = len(self.texts)
                self.texts.append(self._text(token))
        return np.array([self.numbers[token] for token in unique.tolist()], dtype="<i4")[index].reshape(tokens.shape)

    def _text(self, token: int) -> str:
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # Tokenizers like Llama's drop the first space of a text.
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def _trace_row(output: LoopMDMGenerationOutput, row: int, words: _Vocabulary) -> dict[str, Any]:
    """
    The data of a row. `packed` holds three arrays of shape (steps, length), concatenated and compressed: the kind of
    each position (uint8), the number of the token shown there (int32), and its confidence in percent (uint8).
    """
    trace = output.trace

    def stack(name: str) -> np.ndarray:
        return np.stack([getattr(step, name)[row].cpu().numpy() for step in trace])

    committed, remasked, confidence = stack("committed"), stack("remasked"), stack("confidence")
    looked_at = np.isfinite(confidence)
    to_denoise = looked_at.any(0) | committed.any(0)
    is_real = np.ones_like(to_denoise)
    if output.attention_mask is not None:
        is_real = output.attention_mask[row].cpu().numpy().astype(bool)
    is_kept = is_real | to_denoise  # shows tokens behind the end, but not the padding of the input
    # How often each position has been committed more than remasked, after every step
    balance = committed.astype(np.int64).cumsum(0) - remasked.astype(np.int64).cumsum(0)
    is_filled = balance > 0
    was_filled = np.concatenate((np.zeros_like(is_filled[:1]), is_filled[:-1]))
    tokens = stack("tokens")
    before = np.concatenate((tokens[:1], tokens[:-1]))
    kinds = np.where(to_denoise, np.where(is_filled, KEPT, np.where(looked_at, GUESSED, WAITING)), GIVEN)
    kinds = np.where(committed, COMMITTED, np.where(remasked, REMASKED, kinds)).astype(np.uint8)
    shown = np.where(to_denoise & ~is_filled, stack("predictions"), tokens)
    shown = np.where(remasked & was_filled, before, shown)
    # A committed token keeps the confidence of that step.
    sure = np.where(looked_at, np.round(confidence.clip(0, 1) * 100), NOT_KNOWN)
    for step in range(1, len(trace)):
        sure[step] = np.where(was_filled[step] & is_filled[step], sure[step - 1], sure[step])
    blocks = np.array([step.block for step in trace])
    block_of = np.where(looked_at.any(0), blocks[looked_at.argmax(0)], -1)[is_kept]
    planes = (kinds[:, is_kept], words.number(shown[:, is_kept]), sure[:, is_kept].astype(np.uint8))
    packed = zlib.compress(b"".join(np.ascontiguousarray(plane).tobytes() for plane in planes), 9)
    return {
        "length": int(is_kept.sum()),
        "loops": [int(step.loops[row]) for step in trace],
        "blocks": block_of.tolist(),
        "end": int(is_real.sum()),  # what the model wrote behind it does not count
        "final": words.number(output.sequences[row].cpu().numpy()[is_real]).tolist(),
        "packed": base64.b64encode(packed).decode("ascii"),
    }


def _section(output: LoopMDMGenerationOutput, row: int, name: str, traced: dict[str, Any], words: _Vocabulary) -> str:
    """The HTML of a row, with its final text."""
    cost = []
    for what in ("forward_passes", "loops", "flops"):
        values = output.get(what)
        if values is not None:
            value = int(values[row])
            cost.append(f"{value / 1e9:,.3g} GFLOP" if what == "flops" else f"{value:,} {what.replace('_', ' ')}")
    text = "".join(words.texts[number] for number in traced["final"])
    return ROW.format(number=row, name=escape(name), cost=escape(", ".join(cost)), text=escape(text))


def _facts(output: LoopMDMGenerationOutput) -> str:
    """One line on the whole generation."""
    blocks = len({step.block for step in output.trace})
    parts = [f"{len(output.trace)} denoising steps" if len(output.trace) > 1 else "1 denoising step"]
    parts += [f"{blocks} blocks"] if blocks > 1 else []
    if output.seconds is not None:
        parts.append(f"{output.seconds:.2f} s")
    if output.tokens_per_second is not None:
        parts.append(f"{output.tokens_per_second:,.1f} tokens/s")
    return ", ".join(parts)


def _hash(text: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def write_html(path: str | Path, html: str) -> None:
    """Writes a page to `path`, atomically."""
    write_atomically(Path(path), html)
