"""Rounds: the rounds that decoding would have gone through, for many ways of drafting at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfspec.plan.lookup import PromptLookup
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.table import Table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Drafting:
    """A way of drafting: at most `gamma` tokens by layer skipping, or by prompt lookup where `lookup` finds a match.

    With `gamma` 0, prompt lookup is the only drafter.
    """

    gamma: int
    lookup: PromptLookup | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a round drafts."""
        return max(self.gamma, self.lookup.gamma if self.lookup else 0)


@dataclass(frozen=True, eq=False)
class Rounds:
    """The rounds of `c` ways of drafting over a table's texts; every array is `c b s`.

    `visits` is the probability that a round begins at a start. The other arrays hold expectations for a round that
    begins there; `steps` counts passes of the draft. For greedy decoding, all arrays are exact.
    """

    visits: Floats
    accepted: Floats
    drafted: Floats
    steps: Floats

    def history(self, way: int) -> list[list[tuple[float, int]]]:
        """(drafted, accepted) of each round of each text for greedy decoding, as in `Stats.history`."""
        visits = self.visits[way] > 0.5
        return [
            [(float(d), round(a)) for d, a in zip(drafted[at], accepted[at], strict=True)]
            for drafted, accepted, at in zip(self.drafted[way], self.accepted[way], visits, strict=True)
        ]


def rounds_of(table: Table, ways: Sequence[Drafting], lookup: LookupTable | None = None) -> Rounds:
    """The rounds of every text for each way of drafting. Ways with prompt lookup need the texts' lookup table."""
    left = _left(table)
    hits, found, offered = _looked_up(ways, lookup, left)
    limits = np.minimum(left, np.array([min(way.gamma, table.depths) for way in ways])[:, None, None])  # c b s
    sums = np.cumsum(table.reach, axis=2, dtype=np.float64) - 1  # b s n+1, expected accepted tokens of k drafted
    b, s, n = sums.shape
    by_layers = sums.reshape(-1, n)[np.arange(b * s), limits.reshape(-1, b * s)].reshape(limits.shape)
    accepted, drafted = np.where(hits, found, by_layers), np.where(hits, offered, limits).astype(np.float64)
    visits = _path(accepted, table.written) if table.is_certain else _visits(table, limits, np.where(hits, found, -1))
    return Rounds(visits, accepted, drafted, np.where(hits, 0.0, drafted))


def agreement(table: Table, way: Drafting, lookup: LookupTable | None = None) -> list[float]:
    """Agreement by draft position: the accepted share of the tokens drafted after an accepted prefix, as in `Stats`."""
    visits, left, starts = rounds_of(table, [way], lookup).visits[0], _left(table), np.arange(table.weight.shape[1])
    (hits,), (accepted,), (drafted,) = _looked_up([way], lookup, left)
    longest = np.minimum(left, min(way.gamma, table.depths))
    shares = []
    for place in range(way.longest):
        at = min(place, table.depths - 1)
        going = visits * (starts + place < table.written[:, None])  # b s: the text has not ended before
        by_layers = going * ~hits * (place < longest)
        looked_up = going * hits * (place < drafted) * (place <= accepted)
        reached = (by_layers * table.reach[..., at]).sum() + looked_up.sum()
        passed = (by_layers * table.reach[..., at + 1]).sum() + (looked_up * (place < accepted)).sum()
        shares.append(float(passed / reached) if reached else 0.0)
    return shares


def _left(table: Table) -> Ints:
    """The most tokens worth drafting at each start, `b s`: the request's last token is never drafted."""
    left: Ints = (table.allowed[:, None] - np.arange(table.weight.shape[1]) - 1).clip(min=0)
    return left


def _looked_up(
    ways: Sequence[Drafting], lookup: LookupTable | None, left: Ints
) -> tuple[NDArray[np.bool_], Ints, Ints]:
    """Where prompt lookup drafts, and how many tokens are accepted and drafted there; `c b s` each."""
    shape = (len(ways), *left.shape)
    hits, accepted, drafted = np.zeros(shape, dtype=np.bool_), np.zeros(shape, int), np.zeros(shape, int)
    for index, way in enumerate(ways):
        if way.lookup is not None:
            assert lookup is not None, "ways with prompt lookup need a lookup table"
            drafted[index] = np.minimum(left, way.lookup.gamma)
            accepted[index] = np.minimum(lookup.runs, drafted[index])
            hits[index] = (lookup.matched >= way.lookup.min_ngram) & (drafted[index] > 0)
    return hits, accepted, drafted


def _path(accepted: Floats, written: Ints) -> Floats:
    """Where rounds begin, `c b s`, if the number of accepted tokens is certain: 1 at these starts, else 0."""
    c, b, s = accepted.shape
    ahead = accepted.reshape(c * b, s).astype(np.int64) + 1
    visits, ends = np.zeros((c * b, s)), np.tile(written, c)
    lines, places = np.arange(c * b), np.zeros(c * b, dtype=np.int64)
    while len(lines):
        visits[lines, places] = 1
        places = places + ahead[lines, places]
        going = places < ends[lines]
        lines, places = lines[going], places[going]
    return visits.reshape(c, b, s)


def _visits(table: Table, longest: Ints, certain: Ints) -> Floats:
    """The probability that a round begins at each start, `c b s`.

    The first round begins at start 0. A round at s that accepts k tokens leads to s + k + 1. The round accepts exactly
    k < longest tokens with probability reach[k] - reach[k + 1], and all `longest` tokens with reach[longest]. Rounds of
    prompt lookup accept `certain` tokens; `certain` is -1 for all other rounds.
    """
    c, b, s = longest.shape
    columns = np.arange(max(table.depths, int(certain.max(initial=0))) + 1)
    n = len(columns)
    reach = np.pad(table.reach, ((0, 0), (0, 0), (0, n - table.depths)))  # b s n+1
    exactly, at_least = reach[..., :-1] - reach[..., 1:], reach[..., :-1]  # b s n
    visits = np.zeros((c, b, s + n + 1))
    visits[..., 0] = 1
    inside = np.arange(s) < table.written[:, None]  # b s
    for start in range(s):
        here = visits[..., start] * inside[:, start]  # c b
        visits[..., start] = here
        ends, sure = longest[..., start, None], certain[..., start, None]  # c b 1
        chances = np.where(columns < ends, exactly[:, start], np.where(columns == ends, at_least[:, start], 0))
        chances = np.where(sure >= 0, columns == sure, chances)  # c b n
        visits[..., start + 1 : start + 1 + n] += here[..., None] * chances
    return visits[..., :s]
