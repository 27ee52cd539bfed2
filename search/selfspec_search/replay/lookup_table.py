"""LookupTable: what prompt lookup would have drafted at every start, and how many of these tokens are accepted.

The table needs no pass of any model. The q of a looked-up draft is one-hot, so given the text, the draft is accepted
for as long as the draft equals the text, for greedy decoding and for sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfspec_search.replay.texts import Text

MAX_NGRAM = 8
"""Tokens: the longest match that is searched for. Longer matches would hardly change which place is copied."""
MIN_NGRAMS = (1, 2, 3, 4)
"""Tokens: the shortest matches that the search compares."""


@dataclass(frozen=True, eq=False)
class LookupTable:
    """`matched` and `runs`, `b s` each: the best earlier match of each start's last tokens.

    `matched` is the length of the match, up to `MAX_NGRAM` tokens, or 0 without a match. `runs` counts the tokens after
    the match that equal the text's next tokens.
    """

    matched: NDArray[np.int64]
    runs: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[Text], depths: int) -> LookupTable:
        """The table for drafts of at most `depths` tokens."""
        shape = (len(texts), max(text.written for text in texts))
        matched, runs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(texts):
            _fill(matched[row], runs[row], text, depths)
        return cls(matched, runs)

    def only(self, texts: Sequence[int]) -> LookupTable:
        """The table of some of the texts."""
        return LookupTable(self.matched[list(texts)], self.runs[list(texts)])


def _fill(matched: NDArray[np.int64], runs: NDArray[np.int64], text: Text, depths: int) -> None:
    """Fill the rows of one text."""
    tokens = text.tokens.numpy(force=True)
    n, steps = len(tokens), np.arange(depths)
    ending = np.zeros(n + 1, dtype=np.int64)  # at place e: how many tokens before e equal the context's last tokens
    for length in range(1, n):  # of the context
        ending[1:] = np.where(tokens == tokens[length - 1], ending[:-1] + 1, 0)
        start = length - text.prompt
        if start < 0 or length < 2:
            continue
        counted = np.minimum(ending[1:length], MAX_NGRAM)  # places 1..length - 1
        place = length - 1 - int(counted[::-1].argmax())  # the latest of the longest matches
        matched[start] = counted[place - 1]
        if matched[start]:
            copied = tokens[place + steps[: n - length] % (length - place)]
            wrong = copied != tokens[length : length + depths]
            runs[start] = wrong.argmax() if wrong.any() else len(copied)
