# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The final number of an answer, GSM8K style."""

import re
from decimal import Decimal

# A sign counts where no number or word stands before it, as in "= -3" but not in "7-3".
NUMBER = re.compile(r"(?<![\w.,])[-\u2212+]?\$?(?:\d[\d,]*)?\.?\d+|\d[\d,]*(?:\.\d+)?")


def final_number(text: str, strict: bool = False) -> Decimal | None:
    """
    The number behind the last `####`, or else the last number of the text. Thousands commas, dollar signs and trailing
    zeros do not matter: `$1,234.50` equals `1234.5`.

    Args:
        text (`str`): An answer.
        strict (`bool`, defaults to `False`): Accept only a number behind `####`.

    Returns:
        `Decimal`, or None if there is no number.
    """
    _, marker, marked = text.rpartition("####")
    if marker:
        found = NUMBER.search(marked)
    elif strict:
        return None
    else:
        found = next(iter(list(NUMBER.finditer(text))[-1:]), None)
    if found is None:
        return None
    return Decimal(found.group().replace(",", "").replace("$", "").replace("\u2212", "-"))
