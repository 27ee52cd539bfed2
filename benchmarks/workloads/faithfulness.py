"""Faithfulness: how much of what was written is a true copy of the prompt, and no loop."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workloads.editing import Function

LEAST = 8
"""Tokens in a row that make a copy: as many as the longest match that lookup counts."""
LOOP = 20
"""Tokens. A block of this length or less that follows itself is a loop. A function with its marker is longer."""


def faithful(prompt: Sequence[int], written: Sequence[int]) -> NDArray[np.bool_]:
    """Which written tokens are part of `LEAST` or more in a row that stand in the prompt, and of no loop."""
    return copied(prompt, written) & ~looped(written)


def copied(prompt: Sequence[int], written: Sequence[int]) -> NDArray[np.bool_]:
    """Which written tokens are part of `LEAST` or more in a row that stand in the prompt."""
    known = {tuple(prompt[at : at + LEAST]) for at in range(len(prompt) - LEAST + 1)}
    found = np.zeros(len(written), dtype=np.bool_)
    for at in range(len(written) - LEAST + 1):
        if tuple(written[at : at + LEAST]) in known:
            found[at : at + LEAST] = True
    return found


def looped(written: Sequence[int]) -> NDArray[np.bool_]:
    """Which tokens repeat a block of at most `LOOP` tokens right behind it, three tokens or more in a row."""
    found = np.zeros(len(written), dtype=np.bool_)
    for period in range(1, LOOP + 1):
        run = 0
        for at in range(period, len(written)):
            run = run + 1 if written[at] == written[at - period] else 0
            if run >= max(period, 3):
                found[at - run + 1 : at + 1] = True
    return found


def whole_copies(function: Function, text: str) -> int:
    """How often the text holds the whole function, header and body to the letter, with some docstring of one line."""
    function_again = f'{re.escape(function.header)}\n +"""[^\n]*"""\n{re.escape(function.body)}\n'
    return len(re.findall(function_again, text))
