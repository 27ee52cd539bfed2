"""Walking a table by hand-made rounds."""

from __future__ import annotations

import numpy as np
import pytest
from selfspec_search.table import Table
from selfspec_search.walk import Drafting, walk

NAN = float("nan")


def one_text(agreed: list[list[int]], confidence: list[list[float]] | None = None, allowed: int | None = None) -> Table:
    """A table of one text from rows by start."""
    hits = np.array([agreed], dtype=bool)
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
    agreed = np.cumprod(generator.random((3, 11, 4)) < 0.7, axis=2).astype(bool)
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
    assert estimate.agreed[0].tolist() == [[True, True], [True, False], [False, False], [True, False]]
    assert np.isnan(estimate.confidence[0, 2, 1])
