"""Bill: what our search will spend, estimated from what preparing took on the same core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfspec_search.study.proposals import FULL_TRIALS_FIRST

from selfspec import InputError

LEAST_TRIALS = FULL_TRIALS_FIRST
"""With fewer, a search has hardly begun: these run whole, the many behind them are mostly ended early."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Seconds: of writing the texts, of the profile, of recording the texts for replay, of the confirmation; of the
    pass over all sub-layers that comes before the trials, and of one trial that runs whole."""

    texts: float
    profile: float
    recording: float
    confirmation: float
    sensitivity: float
    trial: float

    @property
    def beside_trials(self) -> float:
        """All that a search spends before its first trial and after its last."""
        return self.texts + self.profile + self.recording + self.confirmation

    @property
    def least(self) -> float:
        """The smallest budget that holds a search."""
        return self.beside_trials + self.sensitivity + LEAST_TRIALS * self.trial

    def left_of(self, budget: float) -> float:
        """What a budget leaves for trials. Raises `InputError` if that is next to nothing."""
        if budget < self.least:
            raise InputError(
                f"a budget of {budget:g} s cannot hold our search: texts, profile and confirmation take about "
                f"{self.beside_trials:.0f} s here, and {LEAST_TRIALS} trials {self.least - self.beside_trials:.0f} s; "
                f"give --budget {math.ceil(self.least)} or more"
            )
        return budget - self.beside_trials
