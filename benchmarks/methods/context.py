"""Context: the input and the output of every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from selfspec_search.profile.costs import Costs
from selfspec_search.replay.texts import Text
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.plan.sublayers import SkipSet

RATIOS = (0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Skip ratios for methods that take a ratio. SWIFT reports 0.45 and 0.5; Draft & Verify's published skip sets have 0.43
(13B) and 0.53 (70B). Models that were trained with layer dropout tolerate ratios up to 0.9."""
JUDGED = 2
"""Skip sets of a method that decode, the best by prediction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The model, its texts of the calibration prompts, and the costs of its sub-layers on this device."""

    model: PreTrainedModel
    texts: Sequence[Text]
    costs: Costs

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def prompts(self) -> list[Tensor]:
        return [text.tokens[: text.prompt] for text in self.texts]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A skip set of a method, and the requested ratio; None if the method chose the ratio."""

    skip_set: SkipSet
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The skip sets that a method offers, and how many it tried; None for a method that constructs its skip sets."""

    offered: list[Candidate]
    tried: int | None = None


class Select(Protocol):
    """A method: finds skip sets at all ratios in about `budget` seconds.

    The same seed gives the same skip sets, as far as a budget in wall time allows.
    """

    def __call__(self, context: Context, budget: float, seed: int) -> Selection: ...


class Stopwatch:
    """Says whether the budget has time for another step, assumed as slow as the slowest step so far."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.began = self.last = perf_counter()
        self.slowest = 0.0

    def allows_another(self, times: float = 1.0) -> bool:
        """Call this between steps; the next step is assumed to take `times` the slowest step."""
        now = perf_counter()
        self.slowest, self.last = max(self.slowest, now - self.last), now
        return now - self.began + times * self.slowest <= self.budget
