"""Estimates: how often drafted tokens are right, as the text so far tells beside what the plan expects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

MEMORY = 32
"""About so many drafted tokens, at each depth, make up a running estimate."""
PRIOR = 8
"""So many drafted tokens the plan's own figures count for."""
SURPRISE_MEMORY, SURPRISE, KEPT = 8, 3.0, 0.1
"""Where about the last so many rounds are so many standard deviations off, the text has changed: no more than this
share of what was seen before counts from then on."""
MATCH_MEMORY, RUN_MEMORY, MATCH_PRIOR = 24, 64, 4
"""The same of looked-up tokens: a match's first one, the later ones, of which a round tells many; and their prior."""
MATCHES = (1, 2, 3, 5, 8)
"""Matches of prompt lookup are told apart by length: from each of these to the next, less one."""


class Share:
    """A running share: what was seen of late, beside what is expected. The latter `fades` where everything is seen,
    whatever is drafted; elsewhere it stays, lest one bad stretch be the last that is seen."""

    def __init__(self, expected: float, memory: int = MEMORY, prior: float = PRIOR, *, fades: bool = False) -> None:
        self.expected, self._memory, self._prior, self._fades = expected, memory, prior, fades
        self._seen = self._right = 0.0

    @property
    def value(self) -> float:
        return (self._prior * self.expected + self._right) / (self._prior + self._seen)

    def observe(self, seen: int, right: int) -> None:
        """So many were seen, of which so many were right."""
        for one in range(seen):
            self._seen += 1 - self._seen / self._memory
            self._right += (one < right) - self._right / self._memory
            self._prior *= 1 - self._fades / self._memory


class AgreementEstimate:
    """A running estimate of a draft's agreement by depth.

    Depths share one level, the ratio of what was accepted to what the plan expected of it, so that depths which are
    not drafted now follow those that are. A change of the text is told by the odds of what the last rounds brought:
    what was seen before it is forgotten then.

    Args:
        expected: the plan's agreement at depths 0, 1, ...; deeper ones are like the last.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        self._expected = list(expected)
        self._reached = [0.0] * len(expected)
        self._accepted = [0.0] * len(expected)
        self._tokens: list[float] = []
        self._surplus = self._variance = 0.0  # of what was accepted of late, beside what the estimates promised

    def __getitem__(self, depth: int) -> float:
        return self._at(min(depth, len(self._expected) - 1), self._level())

    def observe(self, rows: Sequence[tuple[int, int]]) -> None:
        """A round, in which each row reached so many depths (that is, all before them were accepted), and accepted at
        so many."""
        if not rows:
            return
        self._forget_if_surprised_by(rows)
        for reached, accepted in rows:
            for depth in range(reached):
                at = min(depth, len(self._expected) - 1)
                self._reached[at] += 1 - self._reached[at] / MEMORY
                self._accepted[at] += (depth < accepted) - self._accepted[at] / MEMORY
        self._tokens = []

    def _forget_if_surprised_by(self, rows: Sequence[tuple[int, int]]) -> None:
        """Forget most of what was seen before, where the last rounds are too far from what was to be expected."""
        sums, variances = [0.0], [0.0]  # by how many depths were reached
        for depth in range(max(reached for reached, _ in rows)):
            promised = self[depth]
            sums.append(sums[-1] + promised)
            variances.append(variances[-1] + promised * (1 - promised))
        kept = 1 - 1 / SURPRISE_MEMORY
        surplus = sum(min(accepted, reached) - sums[reached] for reached, accepted in rows)
        self._surplus = kept * self._surplus + surplus
        self._variance = kept * self._variance + sum(variances[reached] for reached, _ in rows)
        # However sure the estimates are, a token and a half is no surprise yet.
        if self._surplus**2 > SURPRISE**2 * (self._variance + 0.25):
            self._reached = [KEPT * seen for seen in self._reached]
            self._accepted = [KEPT * right for right in self._accepted]
            self._surplus = self._variance = 0.0

    def tokens_per_round(self, gamma: int) -> float:
        """Expected of a round that drafts `gamma` tokens: 1 + a0 + a0 a1 + ... (Leviathan et al. 2023, eq. 1)."""
        if gamma >= len(self._tokens):
            self._tokens = self._sums(max(gamma, 8))
        return self._tokens[gamma]

    def _sums(self, longest: int) -> list[float]:
        level, last = self._level(), len(self._expected) - 1
        tokens, all_accepted, sums = 1.0, 1.0, [1.0]
        for depth in range(longest):
            all_accepted *= self._at(min(depth, last), level)
            tokens += all_accepted
            sums.append(tokens)
        return sums

    def _at(self, depth: int, level: float) -> float:
        prior = min(1.0, level * self._expected[depth])
        return (PRIOR * prior + self._accepted[depth]) / (PRIOR + self._reached[depth])

    def _level(self) -> float:
        expected = sum(r * e for r, e in zip(self._reached, self._expected, strict=True))
        return (PRIOR + sum(self._accepted)) / (PRIOR + expected)


class MatchEstimate:
    """A running estimate of prompt lookup, for matches of one length: how often the token behind the match is right,
    and how often the next one is where all before it were."""

    def __init__(self, first: float, later: float) -> None:
        self.first = Share(first, MATCH_MEMORY, MATCH_PRIOR, fades=True)
        self.later = Share(later, RUN_MEMORY, MATCH_PRIOR, fades=True)
        self._tokens: dict[int, float] = {}

    def observe(self, reached: int, accepted: int) -> None:
        """A match of which so many tokens are known to be right or wrong, all but the last one right at any rate, was
        right in so many."""
        self.first.observe(min(1, reached), min(1, accepted))
        self.later.observe(max(0, reached - 1), max(0, accepted - 1))
        self._tokens = {}

    def tokens_per_round(self, n: int) -> float:
        """Expected of a round that takes `n` tokens."""
        if n not in self._tokens:
            later = min(self.later.value, 1 - 1e-9)
            self._tokens[n] = 1 + self.first.value * (1 - later**n) / (1 - later)
        return self._tokens[n]


def match_class(matched: int) -> int:
    """Which of `MATCHES` a match of so many tokens falls under."""
    return bisect_right(MATCHES, matched) - 1


def lengths_of(at: int) -> str:
    """The lengths of the matches that are told apart as one, in words."""
    if at == len(MATCHES) - 1:
        return f"{MATCHES[at]} or more"
    first, last = MATCHES[at], MATCHES[at + 1] - 1
    return str(first) if first == last else f"{first} to {last}"
