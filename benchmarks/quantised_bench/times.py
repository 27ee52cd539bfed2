"""Times: seconds of calls that took turns, repeat by repeat, and ratios of two of them with their spread."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TypeVar

import torch
from gpu_bench.timing import Call, seconds_of

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A ratio of times: the median over repeats, the least and the greatest."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Times:
    """Seconds of one call in each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def over(self, other: Times) -> Spread:
        """Each repeat's time over that of the other call in the same repeat."""
        ratios = [one / another for one, another in zip(self.seconds, other.seconds, strict=True)]
        return Spread(value=median(ratios), low=min(ratios), high=max(ratios))


def take_turns(calls: Mapping[Key, Call], device: torch.device, *, repeats: int, in_a_row: int) -> dict[Key, Times]:
    """Time stretches of `in_a_row` calls, `repeats` of each, after one that warms up.

    All take turns, so that what drifts (clocks, heat, neighbours) drifts for all.
    """

    def stretch(call: Call) -> None:
        for _ in range(in_a_row):
            call()

    for call in calls.values():
        stretch(call)
    timed: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            timed[name].append(seconds_of(lambda call=call: stretch(call), device) / in_a_row)
    return {name: Times(tuple(seconds)) for name, seconds in timed.items()}
