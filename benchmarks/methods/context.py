"""Context: what every method of selection is given, and what it gives back."""

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
"""Skip ratios for the methods that take one. SWIFT reports 0.45 and 0.5 and looks at ratios around them; the sets that
Draft & Verify published leave out 0.43 (13B) and 0.53 (70B). Models trained with layer dropout bear more, up to 0.9."""
JUDGED = 2
"""So many of a method's sets, the best by prediction, decode for real."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The model, what it wrote after the calibration prompts, and what its sub-layers cost on this device."""

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
    """A skip set that a method came up with, and the ratio that it was asked for; None where it chose by itself."""

    skip_set: SkipSet
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a method offers, and how many sets it tried one by one; None where it builds its sets and tries none."""

    offered: list[Candidate]
    tried: int | None = None


class Select(Protocol):
    """A method: skip sets found in about `budget` seconds, at every ratio that it can be asked for.

    The same seed gives the same sets, as far as a budget in wall time allows.
    """

    def __call__(self, context: Context, budget: float, seed: int) -> Selection: ...


class Stopwatch:
    """Whether there is time for another step that takes as long as the slowest one so far."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.began = self.last = perf_counter()
        self.slowest = 0.0

    def allows_another(self, times: float = 1.0) -> bool:
        """Call it between steps; the next one takes `times` times as long as the slowest one."""
        now = perf_counter()
        self.slowest, self.last = max(self.slowest, now - self.last), now
        return now - self.began + times * self.slowest <= self.budget
