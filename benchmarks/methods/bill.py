"""Bill: the time that our search will spend, estimated from measured steps on the same core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfspec import InputError

TRIALS_SHARE = 0.25
"""The least share of a budget that must be left for trials."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Seconds of the steps of a search."""

    texts: float
    profile: float
    recording: float  # of the texts, for replay
    confirmation: float

    def left_of(self, budget: float) -> float:
        """Seconds that a budget leaves for trials; `InputError` if that is less than `TRIALS_SHARE`."""
        fixed = self.texts + self.profile + self.recording + self.confirmation
        least = math.ceil(fixed / (1 - TRIALS_SHARE))
        if budget < least:
            raise InputError(
                f"a budget of {budget:g} s cannot hold our search: texts, profile and confirmation take about "
                f"{fixed:.0f} s here; give --budget {least} or more"
            )
        return budget - fixed
