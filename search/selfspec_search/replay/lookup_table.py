"""Lookup: what prompt lookup would have drafted at every start, and how much of it would have been accepted.

Token arithmetic alone: no pass of any model. A looked-up draft is a certain one (q is one-hot), so given the text it is
accepted for as long as it equals the text, whether decoding is greedy or samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfspec_search.replay.texts import Text

MAX_NGRAM = 8
"""The longest match looked for: a longer one would hardly choose another place."""
MIN_NGRAMS = (1, 2, 3, 4)
"""The shortest match taken seriously: each of these competes."""


@dataclass(frozen=True, eq=False)
class LookupTable:
    """The best earlier match of each start's last tokens, and how many tokens behind it equal the text's, `b s` each.

    A match counts up to `MAX_NGRAM` tokens, 0 where there is none.
    """

    matched: NDArray[np.int64]
    runs: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[Text], depths: int) -> LookupTable:
        """For drafts of at most `depths` tokens."""
        shape = (len(texts), max(text.written for text in texts))
        matched, runs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(texts):
            matched[row, : text.written], runs[row, : text.written] = _one_text(text, depths)
        return cls(matched, runs)

    def only(self, texts: Sequence[int]) -> LookupTable:
        """Some of the texts."""
        return LookupTable(self.matched[list(texts)], self.runs[list(texts)])


def _one_text(text: Text, depths: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens = text.tokens.numpy(force=True)
    n, steps = len(tokens), np.arange(depths)
    matched, runs = np.zeros(text.written, dtype=np.int64), np.zeros(text.written, dtype=np.int64)
    ending = np.zeros(n + 1, dtype=np.int64)  # at place e: how many tokens before e equal the context's last ones
    for length in range(1, n):  # of the context
        ending[1:] = np.where(tokens == tokens[length - 1], ending[:-1] + 1, 0)
        start = length - text.prompt
        if start < 0 or length < 2:
            continue
        counted = np.minimum(ending[1:length], MAX_NGRAM)  # places 1..length - 1
        place = length - 1 - int(counted[::-1].argmax())  # of the longest the latest
        matched[start] = counted[place - 1]
        if matched[start]:
            copied = tokens[place + steps[: n - length] % (length - place)]
            wrong = copied != tokens[length : length + depths]
            runs[start] = wrong.argmax() if wrong.any() else len(copied)
    return matched, runs
