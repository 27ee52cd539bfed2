"""AdaptivePolicy: in each round the choice that gains most over going on at the present speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from selfspec.policy.choice import Choice, Choices, Estimates, Row
from selfspec.policy.estimates import lengths_of, match_class

ROUNDS = 32
"""About so many rounds make up the present speed."""
HYSTERESIS = 0.02
"""Another choice must promise so much more, relatively."""
MOST_CHANGES = 200
"""So many are noted."""
FIRST_PROBE = 8
"""Rounds without any draft by layers before a probe whether they pay again; more after probes in vain."""
PROBING = 0.005
"""... until these cost no larger share of what is decoded."""


class Seen(NamedTuple):
    """What a round brought a row: tokens drafted by layers (0 if others drafted), how many of them were accepted, and
    how many were committed; how many looked-up tokens there were, for a match of what length, and how many of them
    would have been right."""

    drafted: int
    accepted: int
    committed: int
    found: int = 0
    matched: int = 0
    right: int = 0


@dataclass
class AdaptivePolicy:
    """Chooses who drafts how far, from what drafts cost and how often they were right of late.

    A round is worth the tokens that it promises, less what its time would bring at the present speed (the renewal
    reward theorem: the choice that maximises this in every situation maximises tokens per second). A choice stays, for
    rows in the same situation, until another one promises distinctly more.

    Layers teach nothing while they do not draft, so they are probed now and then, the more seldom the more often in
    vain, and again at once where that succeeds; but not where they would lose even if all that they drafted were right.
    Prompt lookup is judged in every round, whether it drafts or not.

    Args:
        choices: what there is to choose from.
        first: the choice to begin with.
    """

    choices: Choices
    first: Choice

    changes: list[str] = field(default_factory=list)
    """Whenever a situation got a choice, another one, or a probe: when, and what each gains by the estimates."""

    def __post_init__(self) -> None:
        self.estimates = Estimates.of(self.choices.outlook)
        self._incumbents: dict[int, Choice] = {}
        self._rounds = 0
        nothing = Counter({Row(0, 0, len(self.choices.outlook.rounds)): self.choices.outlook.rows})
        speeds = [self._speed(choice, nothing) / nothing.total() for choice in self.choices.by_layers]
        self._seconds = self.choices.seconds(self.choices.by_layers[0], nothing)  # of an average round
        self._tokens = max(speeds) * self._seconds
        self._idle, self._wait, self._again, self.probing = 0, float(FIRST_PROBE), False, False
        self._at_stake = 0.0  # what a row gains by the choice that a probe stands in for

    @property
    def speed(self) -> float:
        """Tokens of a row per priced second, of late: how many rows go on does not matter, a pass takes all of them."""
        return self._tokens / self._seconds

    def choose(self, rows: Sequence[Row]) -> Choice:
        """For the next round of these unfinished rows."""
        counted = Counter(rows)
        situation = self._situation(rows)
        best, best_gain = self.choices.best(counted, self.estimates, self.speed * len(rows))
        before = self._incumbents.get(situation)
        chosen = before or (self.first if situation < 0 else best)
        if chosen != best and best_gain > self._gain(chosen, counted) + HYSTERESIS * self._expected(best, counted):
            chosen = best
        if chosen != before:
            instead = "at first" if before is None else f"after {self._promise(before, counted)}"
            self._note(situation, chosen, instead, counted)
            self._incumbents[situation] = chosen
        if chosen.layers:
            self._idle, self._wait, self._again = 0, float(FIRST_PROBE), False
        self.probing = not chosen.layers and self._is_time_to_probe(chosen, counted)
        if self.probing and self._probe is not None:
            self._at_stake = self._gain(chosen, counted) / len(rows)
            self._note(situation, self._probe, "to see whether layers pay again", counted)
            chosen = self._probe
        self._now = chosen, counted
        return chosen

    def observe(self, rows: Sequence[Seen]) -> None:
        """What came of the round that was chosen last."""
        choice, counted = self._now
        drafted = [row for row in rows if row.drafted]
        self.estimates.layers.observe(
            [(min(row.drafted, row.accepted + 1, row.committed), row.accepted) for row in drafted]
        )
        for row in rows:
            if row.found and self.estimates.matches:
                reached = min(row.found, row.right + 1, row.committed)
                self.estimates.matches[match_class(row.matched)].observe(reached, min(row.right, reached))
        decay = 1 - 1 / ROUNDS
        self._tokens = decay * self._tokens + (1 - decay) * sum(row.committed for row in rows) / len(rows)
        self._seconds = decay * self._seconds + (1 - decay) * self.choices.seconds(choice, counted)
        self._rounds += 1
        if self.probing:
            self._judge(rows)
            self._idle = 0
        else:
            self._idle += 1

    @property
    def _probe(self) -> Choice | None:
        return next((choice for choice in self.choices.by_layers if choice.layers), None)

    def _is_time_to_probe(self, chosen: Choice, rows: Counter[Row]) -> bool:
        """Whether layers have not drafted for long, and could win if they were always right."""
        if self._probe is None or not (self._again or self._idle >= self._wait):
            return False
        left, by_layers = max(row.left for row in rows), self.choices.by_layers
        most = (
            rows.total() * (1 + min(choice.layers, left) - self.speed * self.choices.seconds(choice, rows))
            for choice in by_layers
            if choice.layers
        )
        return max(most) > self._gain(chosen, rows)

    def _judge(self, probe: Sequence[Seen]) -> None:
        """Set the wait for the next probe: twice as long after one in vain, and shorter on average only where probes
        bring more than they cost; else text on which they are right often, but not often enough, would be probed for
        ever. One that was right, and as good as what it stood in for, is followed by another at once."""
        choice, counted = self._now
        drafted, accepted = sum(row.drafted for row in probe), sum(row.accepted for row in probe)
        # Accepted in each row, to gain as much as the choice whose turn it was.
        needed = max(1e-6, self._at_stake + self.speed * self.choices.seconds(choice, counted) - 1)
        longest = max(FIRST_PROBE, needed / (PROBING * self._tokens))
        self._wait = min(longest, max(0.5, self._wait * 2 ** (1 - accepted / max(1, len(probe)) / needed)))
        self._again = 2 * accepted >= drafted > 0 and accepted >= needed * len(probe)

    def _situation(self, rows: Sequence[Row]) -> int:
        """The length class of a single row's match, or of the batch's best; -1 without any."""
        return max((match_class(row.matched) for row in rows if row.found), default=-1)

    def _gain(self, choice: Choice, rows: Counter[Row]) -> float:
        return self._expected(choice, rows) - self.speed * rows.total() * self.choices.seconds(choice, rows)

    def _expected(self, choice: Choice, rows: Counter[Row]) -> float:
        return self.choices.tokens(choice, rows, self.estimates)

    def _speed(self, choice: Choice, rows: Counter[Row]) -> float:
        return self._expected(choice, rows) / self.choices.seconds(choice, rows)

    def _promise(self, choice: Choice, rows: Counter[Row]) -> str:
        return f"{choice} ({self._gain(choice, rows):+.2f})"

    def _note(self, situation: int, chosen: Choice, why: str, rows: Counter[Row]) -> None:
        if len(self.changes) < MOST_CHANGES:
            where = f"behind a match of {lengths_of(situation)}" if situation >= 0 else "without a match"
            present = f"tokens a round beside {self.speed:.4g} tokens/s in each row"
            self.changes.append(f"round {self._rounds}, {where}: {self._promise(chosen, rows)} {why}, {present}")
