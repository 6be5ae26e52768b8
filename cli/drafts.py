# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Text that shows how it comes about: what is finished is bright; the block that is being denoised is dim, and coloured
by how sure the model is.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

MASK = "░"
# Probabilities from which on a token has a colour
COLOURS = ((0.9, "green"), (0.5, "yellow"), (0.0, "red"))
COLOUR_KEY = "Green: the model is at least 90 % sure; yellow: 50 %; red: less"


def colour(confidence: float) -> str:
    """The colour of a token with this probability; none for NaN, which a given token has."""
    return next((name for least, name in COLOURS if confidence >= least), "")


class DraftStreamer:
    """
    A streamer for `generate` that redraws the text in place after every denoising step, and without a terminal prints
    finished blocks as they come. It is a context manager, which leaves the screen in order whatever happens.

    Args:
        tokenizer: Of the model.
        console: Where the text goes.
        skip_prompt: Whether the prompt is left out.
    """

    takes_confidence = True

    def __init__(self, tokenizer: Any, console: Console, skip_prompt: bool = True):
        self.tokenizer, self.console, self.skips = tokenizer, console, skip_prompt
        self.finished: list[int] = []
        self.printed = ""
        # What is longer than the screen shows its end while it is made, and all of it when it is done.
        self.live = Live(console=console, refresh_per_second=12, vertical_overflow="crop", transient=True)

    def __enter__(self) -> "DraftStreamer":
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def put(self, value: Any) -> None:
        """Finished tokens, `(num_tokens,)`; the first ones are the prompt."""
        if self.skips:
            self.skips = False
            return
        self.finished += value.tolist()
        text = self.text()
        if self.console.is_terminal:
            self._draw(Text(text))
        elif not text.endswith("\ufffd"):  # a character is not complete yet
            self.console.print(text[len(self.printed) :], end="", soft_wrap=True, highlight=False)
            self.printed = text

    def put_draft(self, value: Any, confidence: Any) -> None:
        """The block as it stands, and the probability of the token chosen last for each place, `(num_tokens,)`."""
        if self.console.is_terminal:
            self._draw(Text.assemble(self.text(), *self._draft(value.tolist(), confidence.tolist())))

    def end(self) -> None:
        """The text is complete."""
        self.live.stop()
        self.console.print(self.text()[len(self.printed) :], soft_wrap=True, highlight=False)

    def text(self) -> str:
        """What is finished."""
        return self.tokenizer.decode(self.finished, skip_special_tokens=True)

    def _draft(self, tokens: list[int], confidence: list[float]) -> Iterator[tuple[str, str]]:
        """Texts and their styles, a mask or a character at a time, of which several tokens may be needed for one."""
        run: list[int] = []
        shown = ""
        for token, sure in zip(tokens, confidence, strict=True):
            style = f"dim {colour(sure)}"
            if token == self.tokenizer.mask_token_id:
                yield MASK, style
                run, shown = [], ""
                continue
            run.append(token)
            text = self.tokenizer.decode(run, skip_special_tokens=True)  # together, as spaces depend on neighbours
            if not text.endswith("\ufffd"):
                yield text[len(shown) :], style
                shown = text

    def _draw(self, text: Text) -> None:
        if not self.live.is_started:
            self.live.start()
        lines = text.wrap(self.console, self.console.width)
        self.live.update(Text("\n").join(lines[-max(1, self.console.height - 2) :]))
