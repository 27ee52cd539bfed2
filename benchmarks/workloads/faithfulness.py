"""Faithfulness: which written tokens are true copies of the prompt, and which are loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST = 8
"""Tokens: the shortest copy, as long as the longest match class of prompt lookup."""
LOOP = 20
"""Tokens: the longest block whose repetition is a loop. A function with its marker is longer."""


def faithful(prompt: Sequence[int], written: Sequence[int]) -> NDArray[np.bool_]:
    """Which written tokens are copied and not looped."""
    return copied(prompt, written) & ~looped(written)


def copied(prompt: Sequence[int], written: Sequence[int]) -> NDArray[np.bool_]:
    """Which written tokens belong to a run of `LEAST` tokens or more that the prompt contains."""
    known = {tuple(prompt[at : at + LEAST]) for at in range(len(prompt) - LEAST + 1)}
    found = np.zeros(len(written), dtype=np.bool_)
    for at in range(len(written) - LEAST + 1):
        if tuple(written[at : at + LEAST]) in known:
            found[at : at + LEAST] = True
    return found


def looped(written: Sequence[int]) -> NDArray[np.bool_]:
    """Which tokens repeat the preceding block of at most `LOOP` tokens, three tokens or more in a row."""
    found = np.zeros(len(written), dtype=np.bool_)
    for period in range(1, LOOP + 1):
        run = 0
        for at in range(period, len(written)):
            run = run + 1 if written[at] == written[at - period] else 0
            if run >= max(period, 3):
                found[at - run + 1 : at + 1] = True
    return found
