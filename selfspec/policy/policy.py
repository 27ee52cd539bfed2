"""AdaptivePolicy: chooses for each round the way to draft that is expected to gain most tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from selfspec.plan.round_costs import MATCHES, RoundCosts, match_class
from selfspec.policy.estimates import AgreementEstimate

SPEED_ROUNDS = 32
"""Rounds: the window of the current speed."""
HYSTERESIS = 0.02
"""Share of its tokens that a new choice must gain over the last choice to replace it."""
FIRST_WAIT, LONGEST_WAIT = 8, 128
"""Rounds without a draft by layers: before the first probe, and at most between two probes."""
MOST_CHANGES = 200
"""Lines: the most that `changes` holds."""


class Row(NamedTuple):
    """A row before a round: prompt lookup found `found` tokens, after a match of `matched` tokens."""

    found: int = 0
    matched: int = 0


class RowOutcome(NamedTuple):
    """A row after a round. The target wrote the first `right` of the `found` tokens, whoever drafted in the row."""

    drafted: int  # by layers
    accepted: int  # by layers
    committed: int
    found: int = 0
    matched: int = 0
    right: int = 0


class Choice(NamedTuple):
    """A way to draft: `lookup` tokens in rows with a match of `least` tokens or more, `layers` tokens in the others."""

    layers: int = 0
    lookup: int = 0
    least: int = 1

    def __str__(self) -> str:
        parts = [f"lookup {self.lookup} from matches of {self.least}"] if self.lookup else []
        return ", else ".join(parts + ([f"layers {self.layers}"] if self.layers else [])) or "none"


@dataclass
class AdaptivePolicy:
    """Chooses drafter and draft length from round costs and from the tokens of recent rounds.

    A choice gains its expected tokens minus the tokens that its seconds bring at the current speed. The choice that
    gains most maximises tokens per second (renewal reward theorem). Hysteresis keeps the last choice, separately for
    each length class of the batch's longest match. Every round shows how good lookup is. Only drafts by layers show how
    good layers are, so the policy probes layers.

    Gains in priced decoding, of the drafters benchmark and of simulated texts: length classes 1 % (6 % with 64 rows),
    `leasts` 1 % with 64 rows, hysteresis 1 % with 16 rows, no probes where layers cannot win 1 to 4 %.
    """

    round_costs: RoundCosts
    layers: Sequence[int]  # draft lengths by layers, 0 first
    lookups: Sequence[int] = ()  # draft lengths by lookup, shortest first; empty without lookup
    leasts: Sequence[int] = MATCHES  # the shortest matches that lookup may draft from
    static: bool = False  # every draft is padded to the chosen length
    changes: list[str] = field(default_factory=list)  # each new choice and probe: round, gain, replaced choice

    def __post_init__(self) -> None:
        longest, rows = len(self.round_costs.rounds) - 1, self.round_costs.rows
        self.agreement = AgreementEstimate(self.round_costs.agreement, longest, rows)
        self.matches = [AgreementEstimate(shares, longest, rows) for shares in self.round_costs.matches]
        self._chosen: dict[int, Choice] = {}  # by the class of the longest match, -1 without a match
        self._rounds, self._idle, self._wait, self._probing = 0, 0.0, float(FIRST_WAIT), False
        self._seconds = self.seconds(Choice())
        self._tokens = self._seconds * max(self.agreement.tokens[n] / self.seconds(Choice(n)) for n in self.layers)

    @property
    def speed(self) -> float:
        """Tokens of a row per priced second, averaged over recent rounds."""
        return self._tokens / self._seconds

    def seconds(self, choice: Choice, found: int | None = None) -> float:
        """Priced seconds of a round in which lookup found at most `found` tokens in a row."""
        lookup = choice.lookup if found is None or self.static else min(choice.lookup, found)
        verify = self.round_costs.rounds[max(lookup, choice.layers)]
        return verify + self.round_costs.lookup + choice.layers * self.round_costs.draft_step

    def choose(self, rows: Sequence[Row]) -> Choice:
        """The choice for the next round of the unfinished rows."""
        gains = self._gains(rows)
        chosen = max(gains, key=gains.__getitem__)
        match = max((match_class(row.matched) for row in rows if row.found), default=-1)
        last = self._chosen.get(match)
        tokens = gains[chosen] + self.speed * len(rows) * self.seconds(chosen)
        if last in gains and gains[last] >= gains[chosen] - HYSTERESIS * tokens:
            chosen = last
        elif chosen != last:
            self._note(match, chosen, gains, f"instead of {last}")
        self._chosen[match] = chosen
        self._at_stake = gains[chosen] / len(rows)
        if chosen.layers:
            self._idle, self._wait = 0.0, float(FIRST_WAIT)
        most = (1 + n - self.speed * self.seconds(Choice(n)) for n in self.layers if n)  # if all drafts were accepted
        self._probing = self._idle >= self._wait and max(most, default=-inf) > self._at_stake
        if self._probing:
            chosen = Choice(self.layers[1])
            self._note(match, chosen, gains, "as a probe")
        self._cost = self.seconds(chosen, max(row.found for row in rows))
        return chosen

    def observe(self, rows: Sequence[RowOutcome]) -> None:
        """Learn from the round that followed the last choice."""
        by_layers = [row for row in rows if row.drafted]
        self.agreement.observe([(min(row.drafted, row.accepted + 1, row.committed), row.accepted) for row in by_layers])
        for row in rows:
            if row.found and self.matches:
                checked = min(row.found, row.right + 1, row.committed)
                self.matches[match_class(row.matched)].observe([(checked, row.right)])
        committed = sum(row.committed for row in rows) / len(rows)
        self._idle += 1
        if self._probing:  # a probe that gained what was at stake halves the wait, and the next probe follows at once
            won = committed - self.speed * self._cost >= self._at_stake
            self._wait = max(FIRST_WAIT, self._wait / 2) if won else min(LONGEST_WAIT, self._wait * 2)
            self._idle = self._wait if won else 0.0
        self._tokens += (committed - self._tokens) / SPEED_ROUNDS
        self._seconds += (self._cost - self._seconds) / SPEED_ROUNDS
        self._rounds += 1

    def _gains(self, rows: Sequence[Row]) -> dict[Choice, float]:
        """The expected gain of every choice, in tokens of all rows together."""
        price, by_layers = self.speed * len(rows), self.agreement.tokens
        gains = {Choice(n): len(rows) * by_layers[n] - price * self.seconds(Choice(n)) for n in self.layers}
        found = Counter(row for row in rows if row.found and self.lookups)
        leasts = {max((least for least in self.leasts if least <= row.matched), default=0) for row in found}
        for least in sorted(leasts - {0}):
            hits = {row: count for row, count in found.items() if row.matched >= least}
            others, longest = len(rows) - sum(hits.values()), max(row.found for row in hits)
            for shorter, n in zip((0, *self.lookups), self.lookups, strict=False):
                if shorter < longest:  # else lookup drafts no more tokens than with `shorter`
                    by_lookup = sum(c * self.matches[match_class(m)].tokens[min(n, f)] for (f, m), c in hits.items())
                    for layers in self.layers if others else [0]:
                        choice = Choice(layers, n, least)
                        cost = price * self.seconds(choice, longest)
                        gains[choice] = by_lookup + others * by_layers[layers] - cost
        return gains

    def _note(self, match: int, chosen: Choice, gains: dict[Choice, float], why: str) -> None:
        if len(self.changes) < MOST_CHANGES:
            where = f"match of {MATCHES[match]} or more" if match >= 0 else "no match"
            self.changes.append(f"round {self._rounds}, {where}: {chosen} ({gains[chosen]:+.2f} tokens) {why}")
