"""Walk: the rounds that decoding would have gone through, for many ways of drafting at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfspec.plan import PromptLookup
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.table import Table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Drafting:
    """How to draft: at most `gamma` tokens with the draft.

    Where `lookup` finds a match, it drafts instead; with `gamma` 0 it is the only one to draft.
    """

    gamma: int
    lookup: PromptLookup | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a round drafts."""
        return max(self.gamma, self.lookup.gamma if self.lookup else 0)


@dataclass(frozen=True, eq=False)
class Walk:
    """Rounds of `c` ways of drafting over a table's texts, `c b s` each.

    `visits` is the chance that a round begins at a start; the others are what is expected of a round that does. For
    greedy decoding, visits are 0 or 1 and `accepted` is exact. `steps` are passes of the draft.
    """

    visits: Floats
    accepted: Floats
    drafted: Floats
    steps: Floats

    def rounds(self, way: int) -> list[list[tuple[float, int]]]:
        """(drafted, accepted) of each round of each text of greedy decoding, as `Stats.history` has them."""
        visits = self.visits[way] > 0.5
        return [
            [(float(d), round(a)) for d, a in zip(drafted[at], accepted[at], strict=True)]
            for drafted, accepted, at in zip(self.drafted[way], self.accepted[way], visits, strict=True)
        ]


def walk(table: Table, ways: Sequence[Drafting], lookup: LookupTable | None = None) -> Walk:
    """Go through every text's rounds in each of these ways; those that look up need the texts' lookup table."""
    left = (table.allowed[:, None] - np.arange(table.weight.shape[1]) - 1).clip(min=0)  # b s, the most worth drafting
    hits, looked_up = _looked_up(ways, lookup, left)
    gammas = np.array([min(way.gamma, table.depths) for way in ways])[:, None, None]
    limits = np.minimum(left, gammas)  # c b s
    drafted = limits.astype(np.float64)
    sums = np.cumsum(table.reach, axis=2, dtype=np.float64) - 1  # b s n+1, expected accepted of drafts of k
    steps, accepted = np.where(hits, 0.0, drafted), _at(sums, limits)
    if hits.any():
        accepted, drafted = np.where(hits, looked_up[0], accepted), np.where(hits, looked_up[1], drafted)
    if table.is_certain:
        return Walk(_path(accepted, table.written), accepted, drafted, steps)
    certain = np.where(hits, looked_up[0], -1)
    return Walk(_visits(table, limits, certain), accepted, drafted, steps)


def agreement(table: Table, way: Drafting, lookup: LookupTable | None = None) -> list[float]:
    """By draft position: the share accepted of tokens drafted there behind an accepted prefix, as `Stats` has it."""
    visits, starts = walk(table, [way], lookup).visits[0], np.arange(table.weight.shape[1])  # b s, s
    left = (table.allowed[:, None] - starts - 1).clip(min=0)
    looking, (taken, offered) = _looked_up([way], lookup, left)
    hits, accepted, drafted = looking[0], taken[0], offered[0]
    longest = np.minimum(left, min(way.gamma, table.depths))
    shares = []
    for place in range(way.longest):
        at = min(place, table.depths - 1)
        going = visits * (starts + place < table.written[:, None])  # else the row ended before
        by_layers = going * ~hits * (place < longest)
        looked_up = going * hits * (place < drafted) * (place <= accepted)
        reached = (by_layers * table.reach[..., at]).sum() + looked_up.sum()
        passed = (by_layers * table.reach[..., at + 1]).sum() + (looked_up * (place < accepted)).sum()
        shares.append(float(passed / reached) if reached else 0.0)
    return shares


def _at(values: NDArray[np.floating], depths: Ints) -> Floats:
    """`values` (`b s n`) at each start's own depth, `c b s`."""
    b, s, n = values.shape
    return values.reshape(-1, n)[np.arange(b * s), depths.reshape(-1, b * s)].reshape(depths.shape).astype(np.float64)


def _looked_up(
    ways: Sequence[Drafting], lookup: LookupTable | None, left: Ints
) -> tuple[NDArray[np.bool_], tuple[Ints, Ints]]:
    """Where lookup drafts, and how many tokens are accepted and drafted there, `c b s` each."""
    shape = (len(ways), *left.shape)
    hits, accepted, drafted = np.zeros(shape, dtype=np.bool_), np.zeros(shape, int), np.zeros(shape, int)
    for index, way in enumerate(ways):
        if way.lookup is not None:
            assert lookup is not None, "ways that look up need a lookup table"
            drafted[index] = np.minimum(left, way.lookup.gamma)
            accepted[index] = np.minimum(lookup.runs, drafted[index])
            hits[index] = (lookup.matched >= way.lookup.min_ngram) & (drafted[index] > 0)
    return hits, (accepted, drafted)


def _path(accepted: Floats, written: Ints) -> Floats:
    """Where rounds begin, `c b s`, if it is certain how many tokens each accepts: the first start, and so on."""
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
    """The chance that a round begins at each start, `c b s`: at the first, and from there where its tokens lead to.

    A round at s that accepts k tokens leads to s + k + 1. It accepts exactly k < longest with probability
    reach[k] - reach[k + 1], and all `longest` with reach[longest]; `certain` ones of those that were looked up.
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
