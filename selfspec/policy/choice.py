"""Choice: one way to draft in a round; Choices: all there are, what each costs and promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from selfspec.plan import Outlook
from selfspec.policy.estimates import MATCHES, AgreementEstimate, MatchEstimate, match_class

TRIED = 3
"""So many choices for rows without a match are tried beside lookup."""


class Row(NamedTuple):
    """What is known of a row before a round: how many tokens were looked up, for a match of what length, and how many
    it may draft at all."""

    found: int
    matched: int
    left: int


class Choice(NamedTuple):
    """Up to `lookup` looked-up tokens in rows with a match of `least` tokens or more; in the others `layers` tokens
    by layer skipping."""

    layers: int = 0
    lookup: int = 0
    least: int = 1

    def __str__(self) -> str:
        by_layers = f"layers {self.layers}"
        if not self.lookup:
            return by_layers if self.layers else "none"
        shortest = f" from matches of {self.least}" if self.least > 1 else ""
        return f"lookup {self.lookup}{shortest}" + (f", else {by_layers}" if self.layers else "")


@dataclass
class Estimates:
    """What is expected of drafts by layers, and of looked-up ones by the match's length."""

    layers: AgreementEstimate
    matches: list[MatchEstimate]

    @classmethod
    def of(cls, outlook: Outlook) -> Estimates:
        matches = [MatchEstimate(*pair) for pair in outlook.matches]
        return cls(AgreementEstimate(outlook.agreement), matches)

    def by_layers(self, choice: Choice, left: int) -> float:
        """Tokens expected of a row that drafts by layers."""
        return self.layers.tokens_per_round(min(choice.layers, left))

    def by_lookup(self, row: Row, most: int) -> float:
        """Tokens expected of a row that takes up to `most` looked-up tokens."""
        return self.matches[match_class(row.matched)].tokens_per_round(min(row.found, most))


@dataclass(frozen=True)
class Choices:
    """All ways to draft, at an outlook's prices.

    Args:
        layers: draft lengths by layers; 0 for none.
        lookups: draft lengths by lookup; 0 for none.
        static: every draft is padded to the length that was chosen.
        leasts: the shortest matches that may count.
    """

    outlook: Outlook
    layers: Sequence[int]
    lookups: Sequence[int] = (0,)
    static: bool = False
    leasts: Sequence[int] = MATCHES
    _known: dict[int, list[float]] = field(default_factory=dict, repr=False)

    @cached_property
    def by_layers(self) -> list[Choice]:
        """All that do not look up, shortest first."""
        longest = len(self.outlook.rounds) - 1
        return [Choice(n) for n in self.layers if n <= longest]

    def best(self, rows: Counter[Row], estimates: Estimates, speed: float) -> tuple[Choice, float]:
        """The choice that gains most for these rows, and what: its tokens, less those that its time brings at `speed`.

        What looks up is tried with the few choices for the other rows that are best without.
        """
        lefts = Counter[int]()
        for row, count in rows.items():
            lefts[row.left] += count
        costs = self._seconds_by_layers(max(lefts))
        gains = {
            choice: sum(count * estimates.by_layers(choice, left) for left, count in lefts.items()) - speed * seconds
            for choice, seconds in zip(self.by_layers, costs, strict=True)
        }
        few = [self.by_layers[0], *sorted(gains, key=gains.__getitem__, reverse=True)[:TRIED]]
        gains |= self._with_lookup(list(dict.fromkeys(few)), rows, estimates, speed)
        best = max(gains, key=gains.__getitem__)
        return best, gains[best]

    def _with_lookup(
        self, few: Sequence[Choice], rows: Counter[Row], estimates: Estimates, speed: float
    ) -> Iterator[tuple[Choice, float]]:
        """Every length and shortest match of lookup, with each of `few` for the rows that have none; and its gain."""
        matched = {row.matched for row in rows if row.found}
        for least in sorted({max((n for n in self.leasts if n <= one), default=0) for one in matched} - {0}):
            hits = [(row, count) for row, count in rows.items() if row.found and row.matched >= least]
            others = Counter({row: count for row, count in rows.items() if not row.found or row.matched < least})
            promised = {choice: self.tokens(choice, others, estimates) for choice in few} if others else {few[0]: 0.0}
            longest = max(row.found for row, _ in hits)
            for n in self._lookups_up_to(longest):
                tokens = sum(count * estimates.by_lookup(row, n) for row, count in hits)
                for choice, beside in promised.items():
                    both = Choice(choice.layers, n, least)
                    yield both, tokens + beside - speed * self._seconds(both, min(n, longest), others)

    def _lookups_up_to(self, longest: int) -> list[int]:
        """Lengths that differ where no more was found; at least one."""
        lookups = [n for n in self.lookups if n]
        return [n for n in lookups if n <= longest] or lookups[:1]

    def _seconds_by_layers(self, left: int) -> list[float]:
        """What each choice without lookup costs, where rows may draft up to `left` tokens."""
        if left not in self._known:
            self._known[left] = [self._seconds(choice, 0, [Row(0, 0, left)]) for choice in self.by_layers]
        return self._known[left]

    def seconds(self, choice: Choice, rows: Counter[Row]) -> float:
        """What a round costs, all rows together."""
        hits = [row.found for row in rows if choice.lookup and row.found and row.matched >= choice.least]
        others = rows if not hits else {row for row in rows if not row.found or row.matched < choice.least}
        return self._seconds(choice, min(choice.lookup, max(hits, default=0)), others)

    def _seconds(self, choice: Choice, width: int, others: Collection[Row]) -> float:
        """The same, where lookup drafts `width` tokens and these other rows have no match."""
        outlook = self.outlook
        steps = 0
        if choice.layers and others:
            steps = choice.layers if self.static else min(choice.layers, max(row.left for row in others))
        width = max(choice.lookup if self.static else width, steps)
        seconds = outlook.rounds[min(width, len(outlook.rounds) - 1)] + outlook.looking
        return seconds + steps * outlook.draft_step

    def tokens(self, choice: Choice, rows: Counter[Row], estimates: Estimates) -> float:
        """What it promises, all rows together."""
        return sum(
            count
            * (
                estimates.by_lookup(row, choice.lookup)
                if choice.lookup and row.found and row.matched >= choice.least
                else estimates.by_layers(choice, row.left)
            )
            for row, count in rows.items()
        )
