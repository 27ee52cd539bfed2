"""AgreementEstimate: running agreement by draft position, which starts from the plan's figures."""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 24
"""Tokens: the window of each moving average."""
PER_ROW = 3
"""Tokens of each row: the shortest window. Batches of 16 and 64 rows gain 3 % over one token of each row."""
PRIOR = 8
"""Tokens: the initial weight of the plan's figures. The weight decays as the target checks drafted tokens."""


class AgreementEstimate:
    """Agreement by depth (draft position): exponential moving averages of checked and accepted tokens.

    All depths share one level, accepted tokens over expected ones, so depths that are not drafted follow the others.
    The level saves 1.5 % of the time where all drafts are wrong. `expected` is the plan's agreement at depths 0, 1 and
    so on; deeper depths equal the last. `tokens` are a round's expected tokens by draft length, up to `longest`:
    1 + a0 + a0 a1 + ... (Leviathan et al. 2023, eq. 1).
    """

    def __init__(self, expected: Sequence[float], longest: int, rows: int = 1) -> None:
        self._expected, self._longest, self._memory = list(expected[:longest]), longest, max(MEMORY, PER_ROW * rows)
        self._prior = [float(PRIOR)] * len(self._expected)
        self._checked, self._accepted = [0.0] * len(self._expected), [0.0] * len(self._expected)
        self._update()

    def __getitem__(self, depth: int) -> float:
        return self._agreement[min(depth, len(self._agreement) - 1)]

    def observe(self, rows: Sequence[tuple[int, int]]) -> None:
        """Learn from a round: how many drafted tokens the target checked in each row, and how many it accepted."""
        for checked, accepted in rows:
            for token in range(checked):
                depth = min(token, len(self._expected) - 1)
                self._prior[depth] -= self._prior[depth] / self._memory
                self._checked[depth] += 1 - self._checked[depth] / self._memory
                self._accepted[depth] += (token < accepted) - self._accepted[depth] / self._memory
        self._update()

    def _update(self) -> None:
        expected = sum(checked * share for checked, share in zip(self._checked, self._expected, strict=True))
        level = (PRIOR + sum(self._accepted)) / (PRIOR + expected)
        counts = zip(self._expected, self._prior, self._checked, self._accepted, strict=True)
        self._agreement = [(prior * min(1.0, level * e) + right) / (prior + seen) for e, prior, seen, right in counts]
        self.tokens, reached = [1.0], 1.0
        for depth in range(self._longest):
            reached *= self[depth]
            self.tokens.append(self.tokens[-1] + reached)
