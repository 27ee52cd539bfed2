"""AgreementEstimate: how often drafted tokens are right, from the plan's figures onwards."""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 24
"""Tokens: the window of each moving average."""
PER_ROW = 3
"""Tokens of a row: the least window. Batches of 16 and 64 rows gain 3 % over a window of one token of each row."""
PRIOR = 8
"""Tokens: the weight of the plan's own figures. It fades as tokens are seen."""


class AgreementEstimate:
    """Running agreement by depth: exponential moving averages, in counts, of drafts by layers or of looked-up drafts.

    All depths share one level, right tokens over expected ones, so that depths which are not drafted now follow those
    that are. Where all drafts are wrong, the level saves 1.5 % of the time.

    Args:
        expected: the plan's agreement at depths 0, 1, ...; deeper ones are like the last.
        longest: the longest draft.
        rows: how many rows are decoded together.

    Attributes:
        tokens: expected tokens of a round by draft length: 1 + a0 + a0 a1 + ... (Leviathan et al. 2023, eq. 1).
    """

    def __init__(self, expected: Sequence[float], longest: int, rows: int = 1) -> None:
        self._expected, self._longest, self._memory = list(expected[:longest]), longest, max(MEMORY, PER_ROW * rows)
        self._prior = [float(PRIOR)] * len(self._expected)
        self._seen, self._right = [0.0] * len(self._expected), [0.0] * len(self._expected)
        self._update()

    def __getitem__(self, depth: int) -> float:
        return self._agreement[min(depth, len(self._agreement) - 1)]

    def observe(self, rows: Sequence[tuple[int, int]]) -> None:
        """Learn from a round: by row, how many of the first tokens the target judged, and how many were right."""
        for judged, right in rows:
            for token in range(judged):
                depth = min(token, len(self._expected) - 1)
                self._prior[depth] -= self._prior[depth] / self._memory
                self._seen[depth] += 1 - self._seen[depth] / self._memory
                self._right[depth] += (token < right) - self._right[depth] / self._memory
        self._update()

    def _update(self) -> None:
        expected = sum(seen * expected for seen, expected in zip(self._seen, self._expected, strict=True))
        level = (PRIOR + sum(self._right)) / (PRIOR + expected)
        counts = zip(self._expected, self._prior, self._seen, self._right, strict=True)
        self._agreement = [(prior * min(1.0, level * e) + right) / (prior + seen) for e, prior, seen, right in counts]
        self.tokens, reached = [1.0], 1.0
        for depth in range(self._longest):
            reached *= self[depth]
            self.tokens.append(self.tokens[-1] + reached)
