"""Bill: the time that our search will spend, estimated from measured steps on the same core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfspec_search.study.proposals import FULL_TRIALS_FIRST

from selfspec import InputError

LEAST_TRIALS = FULL_TRIALS_FIRST
"""Trials: the fewest that make a search."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Seconds of the steps of a search."""

    texts: float
    profile: float
    recording: float  # of the texts, for replay
    confirmation: float
    sensitivity: float  # replay of each sub-layer, before the trials
    trial: float  # one complete trial

    def left_of(self, budget: float) -> float:
        """Seconds that a budget leaves for trials; `InputError` if that is too little."""
        fixed = self.texts + self.profile + self.recording + self.confirmation
        trials = self.sensitivity + LEAST_TRIALS * self.trial
        if budget < fixed + trials:
            raise InputError(
                f"a budget of {budget:g} s cannot hold our search: texts, profile and confirmation take about "
                f"{fixed:.0f} s here, and {LEAST_TRIALS} trials {trials:.0f} s; "
                f"give --budget {math.ceil(fixed + trials)} or more"
            )
        return budget - fixed
