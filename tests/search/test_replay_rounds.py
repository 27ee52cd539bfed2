"""Rounds and agreement of small tables whose results are known."""

from __future__ import annotations

import numpy as np
import pytest
from selfspec_search.replay.rounds import Drafting, agreement, rounds_of
from selfspec_search.replay.table import Table


def one_text(agreed: list[list[int]], allowed: int | None = None) -> Table:
    """A table of one text; `agreed` has a row for each start."""
    written = len(agreed)
    return Table(np.array([agreed], dtype=np.float32), np.array([written]), np.array([allowed or written]))


def test_a_round_begins_after_the_recovered_or_bonus_token_of_the_round_before() -> None:
    table = one_text([[1, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    # Start 0: one token accepted. Start 2: both. Start 5: none. The last token is never drafted.
    assert rounds_of(table, [Drafting(2)]).history(0) == [[(2, 1), (2, 2), (1, 0), (0, 0)]]
    assert rounds_of(table, [Drafting(1)]).history(0) == [[(1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]]
    assert rounds_of(table, [Drafting(0)]).history(0) == [[(0, 0)] * 7]


def test_ways_of_drafting_are_independent() -> None:
    generator = np.random.default_rng(0)
    agreed = np.cumprod(generator.random((3, 11, 4)) < 0.7, axis=2).astype(np.float32)
    table = Table(agreed, np.array([11, 5, 8]), np.array([11, 11, 8]))
    ways = [Drafting(gamma) for gamma in (0, 1, 3, 4)]
    together = rounds_of(table, ways)
    for index, way in enumerate(ways):
        assert together.history(index) == rounds_of(table, [way]).history(0)


def test_the_estimate_of_depth_d_is_the_first_depth_d_starts_later() -> None:
    table = one_text([[1, 0], [1, 0], [0, 0], [1, 0]])
    estimate = table.from_first_depth()
    assert estimate.weight[0].tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]


def test_expected_rounds_are_those_of_many_simulated_ones() -> None:
    # Means of 4,000 simulations lie within 5 standard errors (a false alarm: 1 in a million).
    generator = np.random.default_rng(1)
    weight = generator.random((1, 9, 3)).astype(np.float32)
    table = Table(weight, np.array([9]), np.array([9]))
    replayed = rounds_of(table, [Drafting(3)])
    runs = np.array([simulate(weight[0], generator) for _ in range(4000)])
    expected = np.array([replayed.visits[0].sum(), (replayed.visits[0] * replayed.accepted[0]).sum()])
    assert np.abs(runs.mean(axis=0) - expected).max() < 5 * (runs.std(axis=0) / np.sqrt(len(runs))).max()


def simulate(weight: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Rounds and accepted tokens of one simulated decoding of a text of nine tokens."""
    start = rounds = total = 0
    while start < 9:
        accepted = 0
        while accepted < min(3, 8 - start) and generator.random() < weight[start, accepted]:
            accepted += 1
        rounds, total, start = rounds + 1, total + accepted, start + accepted + 1
    return rounds, total


def test_a_greedy_table_is_read_back_exactly() -> None:
    generator = np.random.default_rng(0)
    weight = (generator.random((3, 11, 4)) < 0.5).astype(np.float32)
    table = Table(weight, np.array([11, 5, 8]), np.array([11, 11, 8]))
    again = Table.from_bytes(table.to_bytes())
    assert (again.weight == table.weight).all()
    assert (again.written == table.written).all()
    assert (again.allowed == table.allowed).all()


def test_depths_that_were_not_replayed_are_estimated_from_the_first_depth() -> None:
    table = one_text([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    shallow = table.shallow(1).extended(3)
    assert shallow.weight[0].tolist() == table.weight[0].tolist()
    kept = table.shallow(2).extended(3)
    assert kept.weight[0].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert table.extended(2) is table


def test_agreement_is_accepted_over_drafted_by_position() -> None:
    # Start 0: both tokens accepted. Start 3: one of two. Start 5: none.
    table = one_text([[1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]])
    assert rounds_of(table, [Drafting(2)]).history(0) == [[(2, 2), (2, 1), (1, 0), (0, 0)]]
    assert agreement(table, Drafting(2)) == pytest.approx([2 / 3, 1 / 2])


def test_drafted_tokens_after_the_end_of_a_text_do_not_count_for_agreement() -> None:
    # Of ten allowed tokens, three were written before the stop token.
    table = one_text([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], allowed=10)
    assert agreement(table, Drafting(4)) == pytest.approx([1, 1, 1, 0])
