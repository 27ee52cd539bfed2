"""Walking a table by hand-made rounds."""

from __future__ import annotations

import numpy as np
import pytest
from selfspec_search.replay.rounds import Drafting, agreement, rounds_of
from selfspec_search.replay.table import Table


def one_text(agreed: list[list[int]], allowed: int | None = None) -> Table:
    """A table of one text from rows by start."""
    written = len(agreed)
    return Table(np.array([agreed], dtype=np.float32), np.array([written]), np.array([allowed or written]))


def test_a_round_leads_to_the_token_behind_its_recovered_or_bonus_token() -> None:
    table = one_text([[1, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    # From 0 one is accepted, on to 2; there both, on to 5; there none; the last token is never drafted.
    assert rounds_of(table, [Drafting(2)]).history(0) == [[(2, 1), (2, 2), (1, 0), (0, 0)]]
    assert rounds_of(table, [Drafting(1)]).history(0) == [[(1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]]
    assert rounds_of(table, [Drafting(0)]).history(0) == [[(0, 0)] * 7]


def test_ways_of_drafting_do_not_mix() -> None:
    generator = np.random.default_rng(0)
    agreed = np.cumprod(generator.random((3, 11, 4)) < 0.7, axis=2).astype(np.float32)
    table = Table(agreed, np.array([11, 5, 8]), np.array([11, 11, 8]))
    ways = [Drafting(gamma) for gamma in (0, 1, 3, 4)]
    together = rounds_of(table, ways)
    for index, way in enumerate(ways):
        assert together.history(index) == rounds_of(table, [way]).history(0)


def test_the_first_depth_s_estimate_reads_later_starts_as_depths() -> None:
    table = one_text([[1, 0], [1, 0], [0, 0], [1, 0]])
    estimate = table.from_first_depth()
    assert estimate.weight[0].tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]


def test_expected_rounds_are_those_of_many_simulated_ones() -> None:
    # Acceptance of each drafted token is a coin of its own; means of 4,000 simulations lie within 5 standard errors.
    generator = np.random.default_rng(1)
    weight = generator.random((1, 9, 3)).astype(np.float32)
    table = Table(weight, np.array([9]), np.array([9]))
    replayed = rounds_of(table, [Drafting(3)])
    runs = np.array([simulate(weight[0], generator) for _ in range(4000)])
    expected = np.array([replayed.visits[0].sum(), (replayed.visits[0] * replayed.accepted[0]).sum()])
    assert np.abs(runs.mean(axis=0) - expected).max() < 5 * (runs.std(axis=0) / np.sqrt(len(runs))).max()


def simulate(weight: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Rounds and accepted tokens of one run over a text of nine tokens."""
    start = rounds = total = 0
    while start < 9:
        accepted = 0
        while accepted < min(3, 8 - start) and generator.random() < weight[start, accepted]:
            accepted += 1
        rounds, total, start = rounds + 1, total + accepted, start + accepted + 1
    return rounds, total


def test_a_table_survives_storage() -> None:
    generator = np.random.default_rng(0)
    weight = (generator.random((3, 11, 4)) < 0.5).astype(np.float32)
    table = Table(weight, np.array([11, 5, 8]), np.array([11, 11, 8]))
    again = Table.from_bytes(table.to_bytes())
    assert (again.weight == table.weight).all()
    assert (again.written == table.written).all()
    assert (again.allowed == table.allowed).all()


def test_what_was_not_replayed_is_estimated_from_the_first_depth() -> None:
    table = one_text([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    shallow = table.shallow(1).extended(3)
    assert shallow.weight[0].tolist() == table.weight[0].tolist()
    kept = table.shallow(2).extended(3)
    assert kept.weight[0].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert table.extended(2) is table


def test_predicted_agreement_is_what_the_rounds_give() -> None:
    # Rounds at 0 (both accepted), 3 (one of two), 5 (none; the last token is never drafted).
    table = one_text([[1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]])
    assert rounds_of(table, [Drafting(2)]).history(0) == [[(2, 2), (2, 1), (1, 0), (0, 0)]]
    assert agreement(table, Drafting(2)) == pytest.approx([2 / 3, 1 / 2])


def test_drafts_behind_the_end_of_a_text_do_not_count_as_reached() -> None:
    # Three tokens written, then a stop token ended the text though ten were allowed.
    table = one_text([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], allowed=10)
    assert agreement(table, Drafting(4)) == pytest.approx([1, 1, 1, 0])
