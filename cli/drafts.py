# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Text that shows how it comes about: what is finished is bright, the block that is being denoised dim."""

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

MASK = "░"


class DraftStreamer:
    """
    A streamer for `generate` that redraws the text in place after every denoising step, and without a terminal prints
    finished blocks as they come. It is a context manager, which leaves the screen in order whatever happens.

    Args:
        tokenizer: Of the model.
        console: Where the text goes.
        skip_prompt: Whether the prompt is left out.
    """

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

    def put_draft(self, value: Any) -> None:
        """The tokens of the block as it stands, `(num_tokens,)`."""
        if self.console.is_terminal:
            self._draw(Text.assemble(self.text(), (self._decode_draft(value.tolist()), "dim")))

    def end(self) -> None:
        """The text is complete."""
        self.live.stop()
        self.console.print(self.text()[len(self.printed) :], soft_wrap=True, highlight=False)

    def text(self) -> str:
        """What is finished."""
        return self.tokenizer.decode(self.finished, skip_special_tokens=True)

    def _decode_draft(self, tokens: list[int]) -> str:
        """Runs of tokens between masks are decoded together, since a character may take several."""
        mask, parts, run = self.tokenizer.mask_token_id, [], []
        for token in [*tokens, mask]:
            if token != mask:
                run.append(token)
                continue
            parts.append(self.tokenizer.decode(run, skip_special_tokens=True) if run else "")
            parts.append(MASK)
            run = []
        return "".join(parts[:-1])

    def _draw(self, text: Text) -> None:
        if not self.live.is_started:
            self.live.start()
        lines = text.wrap(self.console, self.console.width)
        self.live.update(Text("\n").join(lines[-max(1, self.console.height - 2) :]))
