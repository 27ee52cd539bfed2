"""AdaptivePolicy: each round, the choice that is expected to gain most over decoding on at the present speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from selfspec.plan import MATCHES, RoundCosts, match_class
from selfspec.policy.estimates import AgreementEstimate

ROUNDS = 32
"""Rounds: the window of the present speed."""
HYSTERESIS = 0.02
"""Share of its tokens that another choice must gain over the last choice to replace it."""
FIRST_WAIT, LONGEST_WAIT = 8, 128
"""Rounds without a draft by layers before the first probe, and the most between two probes."""
MOST_CHANGES = 200
"""Lines that `changes` holds."""


class Row(NamedTuple):
    """A row before a round: how many tokens lookup found, and how long the match before them is."""

    found: int = 0
    matched: int = 0


class Seen(NamedTuple):
    """A row after a round. Of the tokens that lookup found, `right` were right, whoever drafted in the row."""

    drafted: int  # by layers
    accepted: int  # of those
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


class AdaptivePolicy:
    """Chooses drafter and draft length from what rounds cost and what they brought of late.

    A choice gains its expected tokens less those that its seconds would bring at the present speed. The choice that
    gains most maximises tokens per second (renewal reward theorem). Batches with a longest match of one length class
    have a choice of their own. Lookup is judged in every round, layers only when they draft, so layers are probed.

    Each part is kept for what it gains in priced decodings of the drafters benchmark and of simulated texts: length
    classes of matches 1 % (6 % with 64 rows), `leasts` 1 % with 64 rows, hysteresis 1 % with 16 rows, and no probes
    where layers cannot win 1 to 4 % where lookup is often right.

    Args:
        round costs: the plan's round costs and expected agreement.
        layers: draft lengths by layers, 0 first.
        lookups: draft lengths by lookup, shortest first; none without lookup.
        leasts: the shortest matches that lookup may draft from.
        static: every draft is padded to the chosen length.
    """

    def __init__(
        self,
        round_costs: RoundCosts,
        layers: Sequence[int],
        lookups: Sequence[int] = (),
        *,
        leasts: Sequence[int] = MATCHES,
        static: bool = False,
    ) -> None:
        self.round_costs, self.layers, self.lookups, self.leasts, self.static = (
            round_costs,
            layers,
            lookups,
            leasts,
            static,
        )
        longest = len(round_costs.rounds) - 1
        self.agreement = AgreementEstimate(round_costs.agreement, longest, round_costs.rows)
        self.matches = [AgreementEstimate(shares, longest, round_costs.rows) for shares in round_costs.matches]
        self.changes: list[str] = []
        """Each new choice and each probe: when, what it gains by the estimates, and instead of what."""
        self._chosen: dict[int, Choice] = {}  # by the class of the longest match, -1 without a match
        self._rounds, self._idle, self._wait, self._probing = 0, 0.0, float(FIRST_WAIT), False
        self._seconds = self.seconds(Choice())
        self._tokens = self._seconds * max(self.agreement.tokens[n] / self.seconds(Choice(n)) for n in layers)

    @property
    def speed(self) -> float:
        """Tokens of a row per priced second, of late."""
        return self._tokens / self._seconds

    def seconds(self, choice: Choice, found: int | None = None) -> float:
        """Priced seconds of a round, where lookup found at most `found` tokens."""
        lookup = choice.lookup if found is None or self.static else min(choice.lookup, found)
        verify = self.round_costs.rounds[max(lookup, choice.layers)]
        return verify + self.round_costs.lookup + choice.layers * self.round_costs.draft_step

    def choose(self, rows: Sequence[Row]) -> Choice:
        """The choice for the next round of these unfinished rows."""
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
        self._probing = self._idle >= self._wait and self._may_win()
        if self._probing:
            chosen = Choice(self.layers[1])
            self._note(match, chosen, gains, "as a probe")
        self._cost = self.seconds(chosen, max(row.found for row in rows))
        return chosen

    def observe(self, rows: Sequence[Seen]) -> None:
        """Learn what the round of the last choice brought."""
        by_layers = [row for row in rows if row.drafted]
        self.agreement.observe([(min(row.drafted, row.accepted + 1, row.committed), row.accepted) for row in by_layers])
        for row in rows:
            if row.found and self.matches:
                judged = min(row.found, row.right + 1, row.committed)
                self.matches[match_class(row.matched)].observe([(judged, row.right)])
        committed = sum(row.committed for row in rows) / len(rows)
        self._idle += 1
        if self._probing:  # wait half as long and probe again if it gained as much as was at stake, else twice as long
            won = committed - self.speed * self._cost >= self._at_stake
            self._wait = max(FIRST_WAIT, self._wait / 2) if won else min(LONGEST_WAIT, self._wait * 2)
            self._idle = self._wait if won else 0.0
        self._tokens += (committed - self._tokens) / ROUNDS
        self._seconds += (self._cost - self._seconds) / ROUNDS
        self._rounds += 1

    def _gains(self, rows: Sequence[Row]) -> dict[Choice, float]:
        """Every choice, and what it is expected to gain in all rows together."""
        price, by_layers = self.speed * len(rows), self.agreement.tokens
        gains = {Choice(n): len(rows) * by_layers[n] - price * self.seconds(Choice(n)) for n in self.layers}
        found = Counter(row for row in rows if row.found and self.lookups)
        leasts = {max((least for least in self.leasts if least <= row.matched), default=0) for row in found}
        for least in sorted(leasts - {0}):
            hits = {row: count for row, count in found.items() if row.matched >= least}
            others, longest = len(rows) - sum(hits.values()), max(row.found for row in hits)
            for shorter, n in zip((0, *self.lookups), self.lookups, strict=False):
                if shorter < longest:  # else n tokens are the same as fewer
                    tokens = (c * self.matches[match_class(m)].tokens[min(n, f)] for (f, m), c in hits.items())
                    by_lookup = sum(tokens)
                    for layers in self.layers if others else [0]:
                        choice = Choice(layers, n, least)
                        cost = price * self.seconds(choice, longest)
                        gains[choice] = by_lookup + others * by_layers[layers] - cost
        return gains

    def _may_win(self) -> bool:
        """Whether layers would gain more than the choice of this round if all that they drafted were accepted."""
        most = [1 + n - self.speed * self.seconds(Choice(n)) for n in self.layers if n]
        return bool(most) and max(most) > self._at_stake

    def _note(self, match: int, chosen: Choice, gains: dict[Choice, float], why: str) -> None:
        if len(self.changes) < MOST_CHANGES:
            where = f"match of {MATCHES[match]} or more" if match >= 0 else "no match"
            self.changes.append(f"round {self._rounds}, {where}: {chosen} ({gains[chosen]:+.2f} tokens) {why}")
