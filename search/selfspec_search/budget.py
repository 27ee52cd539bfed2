"""Budget: the seconds of a search, and what each phase may take of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

SHARES = {"texts": 0.2, "profile": 0.2, "sensitivity": 0.12, "confirm": 0.25}
"""Share of the budget that a phase may take. The trials get what the other phases leave."""


@dataclass(kw_only=True)
class Budget:
    """The time that a search may take. The clock starts when the budget is made.

    Attributes:
        seconds: the whole budget; infinite without a limit.
        cuts: what was cut short to keep the budget, a line each.
    """

    seconds: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    cuts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def is_limited(self) -> bool:
        return self.seconds < float("inf")

    @property
    def left(self) -> float:
        """Seconds until the end of the budget; never negative."""
        return max(0.0, self.seconds - (self.clock() - self._start))

    def share(self, phase: str) -> float:
        """Seconds that a phase which begins now may take."""
        return min(self.left, SHARES[phase] * self.seconds)

    def until(self, phase: str) -> float:
        """Seconds until a later phase must begin to have its share."""
        return max(0.0, self.left - SHARES[phase] * self.seconds) if self.is_limited else self.left

    def cut(self, line: str) -> None:
        """Note what is cut short."""
        self.cuts.append(line)
