"""Walking a table by hand-made rounds."""

from __future__ import annotations

import numpy as np
import pytest
from selfspec_search.replay.rounds import Drafting, agreement, walk
from selfspec_search.replay.table import Table

NAN = float("nan")


def one_text(agreed: list[list[int]], confidence: list[list[float]] | None = None, allowed: int | None = None) -> Table:
    """A table of one text from rows by start."""
    hits = np.array([agreed], dtype=np.float32)
    known = np.full(hits.shape, 0.5) if confidence is None else np.array([confidence])
    written = len(agreed)
    return Table(hits, known.astype(np.float32), np.array([written]), np.array([allowed or written]))


def test_a_round_leads_to_the_token_behind_its_recovered_or_bonus_token() -> None:
    table = one_text([[1, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    # From 0 one is accepted, on to 2; there both, on to 5; there none; the last token is never drafted.
    assert walk(table, [Drafting(2)]).rounds(0) == [[(2, 1), (2, 2), (1, 0), (0, 0)]]
    assert walk(table, [Drafting(1)]).rounds(0) == [[(1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]]
    assert walk(table, [Drafting(0)]).rounds(0) == [[(0, 0)] * 7]


def test_ways_of_drafting_do_not_mix() -> None:
    generator = np.random.default_rng(0)
    agreed = np.cumprod(generator.random((3, 11, 4)) < 0.7, axis=2).astype(np.float32)
    confidence = generator.random(agreed.shape).astype(np.float32)
    table = Table(agreed, confidence, np.array([11, 5, 8]), np.array([11, 11, 8]))
    ways = [Drafting(gamma, threshold) for gamma in (0, 1, 3, 4) for threshold in (None, 0.3, 0.6)]
    together = walk(table, ways)
    for index, way in enumerate(ways):
        assert together.rounds(index) == walk(table, [way]).rounds(0)


def test_a_threshold_stops_the_draft_before_an_unsure_token() -> None:
    table = one_text([[1, 1, 1]] + [[0, 0, 0]] * 5, [[0.9, 0.4, 0.8]] + [[0.9, NAN, NAN]] * 5)
    walked = walk(table, [Drafting(3, 0.5)])
    assert walked.rounds(0)[0][0] == (1, 1)
    assert walked.steps[0, 0, 0] == 2  # the unsure token cost a pass, though it was not drafted


def test_a_draft_that_went_wrong_goes_on_at_the_rate_seen_on_the_path() -> None:
    # Half of the six steps on the path are unsure, so a wrong draft goes on by 1 + 1/2 steps; half are drafted.
    confidence = [[0.9, NAN, NAN], [0.9, NAN, NAN], [0.9, NAN, NAN], [0.1, NAN, NAN], [0.1, NAN, NAN], [0.1, NAN, NAN]]
    walked = walk(one_text([[0, 0, 0]] * 6, confidence), [Drafting(3, 0.5), Drafting(3)])
    assert walked.steps[0, 0, 0] == pytest.approx(2.5)
    assert walked.drafted[0, 0, 0] == pytest.approx(1.75)
    assert (walked.steps[1, 0, 0], walked.drafted[1, 0, 0]) == (3, 3)


def test_thresholds_lie_between_observed_confidences() -> None:
    table = one_text([[0], [0], [0], [0]], [[0.2], [0.4], [0.8], [NAN]])
    assert table.thresholds(1) == pytest.approx([0.6])
    assert all(0.2 < threshold < 0.8 for threshold in table.thresholds(9))


def test_the_first_depth_s_estimate_reads_later_starts_as_depths() -> None:
    table = one_text([[1, 0], [1, 0], [0, 0], [1, 0]])
    estimate = table.from_first_depth()
    assert estimate.weight[0].tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]
    assert np.isnan(estimate.confidence[0, 2, 1])


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_expected_rounds_are_those_of_many_simulated_ones(threshold: float | None) -> None:
    # Acceptance of each drafted token is a coin of its own; means of 4,000 simulations lie within 5 standard errors.
    generator = np.random.default_rng(1)
    weight = generator.random((1, 9, 3)).astype(np.float32)
    table = Table(weight, generator.random(weight.shape).astype(np.float32), np.array([9]), np.array([9]))
    way = Drafting(3, threshold)
    walked = walk(table, [way])
    stops = table.stops(threshold)[0]
    runs = np.array([simulate(weight[0], stops, generator) for _ in range(4000)])
    expected = np.array([walked.visits[0].sum(), (walked.visits[0] * walked.accepted[0]).sum()])
    assert np.abs(runs.mean(axis=0) - expected).max() < 5 * (runs.std(axis=0) / np.sqrt(len(runs))).max()


def simulate(weight: np.ndarray, stops: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Rounds and accepted tokens of one run over a text of nine tokens."""
    start = rounds = total = 0
    while start < 9:
        accepted = 0
        while accepted < min(3, stops[start], 8 - start) and generator.random() < weight[start, accepted]:
            accepted += 1
        rounds, total, start = rounds + 1, total + accepted, start + accepted + 1
    return rounds, total


def test_a_table_survives_storage() -> None:
    generator = np.random.default_rng(0)
    confidence = np.where(generator.random((3, 11, 4)) < 0.5, np.nan, generator.random((3, 11, 4))).astype(np.float32)
    weight = (generator.random((3, 11, 4)) < 0.5).astype(np.float32)
    table = Table(weight, confidence, np.array([11, 5, 8]), np.array([11, 11, 8]))
    again = Table.from_bytes(table.to_bytes())
    assert (again.weight == table.weight).all()
    assert np.allclose(again.confidence, table.confidence, atol=1e-3, equal_nan=True)
    assert (again.written == table.written).all()
    assert (again.allowed == table.allowed).all()


def test_what_was_not_replayed_is_estimated_from_the_first_depth() -> None:
    table = one_text(
        [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]],
        [[0.9, 0.8, 0.7], [0.6, 0.5, NAN], [0.4, NAN, NAN], [0.3, NAN, NAN]],
    )
    shallow = table.shallow(1).extended(3)
    assert shallow.weight[0].tolist() == table.weight[0].tolist()
    kept = table.shallow(2).extended(3)
    assert kept.weight[0].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert kept.confidence[0, 0].tolist() == pytest.approx([0.9, 0.8, 0.4])  # two replayed, one from the third start
    assert np.isnan(kept.confidence[0, 2, 2])
    assert table.extended(2) is table


def test_predicted_agreement_is_what_the_rounds_give() -> None:
    # Rounds at 0 (both accepted), 3 (one of two), 5 (none; the last token is never drafted).
    table = one_text([[1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]])
    assert walk(table, [Drafting(2)]).rounds(0) == [[(2, 2), (2, 1), (1, 0), (0, 0)]]
    assert agreement(table, Drafting(2)) == pytest.approx([2 / 3, 1 / 2])


def test_drafts_behind_the_end_of_a_text_do_not_count_as_reached() -> None:
    # Three tokens written, then a stop token ended the text though ten were allowed.
    table = one_text([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], allowed=10)
    assert agreement(table, Drafting(4)) == pytest.approx([1, 1, 1, 0])
