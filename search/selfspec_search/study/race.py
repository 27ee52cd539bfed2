"""Race: a draft spec is replayed on a few texts first, and on all texts only while it may still be the best."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from selfspec.plan.draft_spec import DraftSpec
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.texts import Text
from selfspec_search.study.objective import Prices, evaluate

POSITIONS = 300
"""Tokens: what the few texts hold together, about. An agreement of 0.9 over 300 tokens is known to 2 %."""
LEAST_TEXTS = 4
"""Texts: the fewest that stand for all."""
COMPARED_FIRST = 5
"""Draft specs: the number compared on few and on all texts before any draft spec is dropped."""


def few_texts(texts: Sequence[Text], positions: int = POSITIONS) -> list[int]:
    """Indices of texts that hold about `positions` written tokens, spread over all lengths."""
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    mean = sum(text.written for text in texts) / len(texts)
    count = min(len(texts), max(LEAST_TEXTS, round(positions / mean)))
    return sorted(by_length[place * len(texts) // count] for place in range(count))


class Race:
    """Speedups estimated from the first depth on a few texts, and how they relate to estimates on all texts."""

    def __init__(self, replay: Replay, prices: Prices) -> None:
        chosen = few_texts(replay.texts)
        self.pays = 2 * len(chosen) <= len(replay.texts)
        """Whether the few texts are few enough for a race to save time."""
        self._replay, self._prices = replay.only(chosen), prices.only(chosen)
        self._ratios: list[float] = []  # estimates on all texts / on few texts

    def run(self, draft_spec: DraftSpec) -> tuple[float, float]:
        """Estimated speedup and agreement of a draft spec on the few texts."""
        table = self._replay.first_depth(draft_spec)
        return max(way.speedup for way in evaluate(table, self._prices, draft_spec)), table.agreement

    def learn(self, few: float, whole: float) -> None:
        """Compare the estimates of one draft spec on few and on all texts."""
        self._ratios.append(whole / few)

    def expected(self, few: float) -> float:
        """The estimate on all texts to expect from the estimate on few texts."""
        return few * (median(self._ratios) if self._ratios else 1.0)

    def is_lost(self, few: float, best: float) -> bool:
        """Whether a draft spec would stay below `best` on all texts even with the largest ratio seen so far."""
        return len(self._ratios) >= COMPARED_FIRST and few * max(self._ratios) < best
