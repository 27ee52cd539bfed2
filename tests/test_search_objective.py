"""Predictions from a table and a profile whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from selfspec_search.objective import best, depths_worth_replaying, predict, ways_to_draft
from selfspec_search.profile import Profile, fit_costs, round_lengths
from selfspec_search.table import Table
from selfspec_search.walk import Drafting

from selfspec.skip_set import SkipSet

LAYERS = 7
HALF = SkipSet.early_exit(4, LAYERS)


def profile(*, layer: float = 0.1, fixed: float = 0.2, compiled: bool = False) -> Profile:
    """A round costs 1 whatever its length; a layer's attention costs three times its MLP."""
    return Profile(
        num_layers=LAYERS,
        fixed=fixed,
        layer=0.0,
        attention=0.75 * layer,
        mlp=0.25 * layer,
        confidence=0.0,
        rounds=(1.0,) * 6,
        prefill=0.0,
        compiled=compiled,
        measured={},
    )


def table(agreement: float, texts: int = 5, starts: int = 97, depths: int = 5) -> Table:
    generator = np.random.default_rng(0)
    agreed = np.cumprod(generator.random((texts, starts, depths)) < agreement, axis=2).astype(bool)
    written = np.full(texts, starts)
    return Table(agreed, np.full(agreed.shape, 0.5, dtype=np.float32), written, written)


def test_predicted_speed_is_tokens_over_the_sum_of_steps_and_rounds() -> None:
    always = table(1.0, texts=1, starts=11)
    (prediction,) = predict(always, profile(), HALF, [Drafting(4)])
    # 5 + 5 + 1 tokens in three rounds; 4 + 4 + 0 steps of 0.6 each.
    assert prediction.figures.tokens_per_round == pytest.approx(11 / 3)
    assert prediction.figures.acceptance_rate == 1.0
    assert prediction.figures.tokens_per_second == pytest.approx(11 / (3 + 8 * 0.6))
    assert prediction.speedup == pytest.approx(11 / (3 + 8 * 0.6))


def test_plain_decoding_wins_where_drafts_are_never_right() -> None:
    prediction = best(table(0.0), profile(), HALF)
    assert prediction.drafting == Drafting(1)  # the least harm
    assert prediction.speedup == pytest.approx(1 / 1.6, rel=0.01)


def test_better_drafts_are_drafted_longer() -> None:
    cheap = profile(layer=0.01, fixed=0.02)
    lengths = [best(table(agreement), cheap, HALF).drafting.gamma for agreement in (0.1, 0.5, 0.9)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_of_equal_ways_the_one_without_a_threshold_is_taken() -> None:
    assert best(table(0.8), profile(), HALF).drafting.threshold is None


def test_the_depths_worth_replaying_hold_the_best_way() -> None:
    for agreement in (0.0, 0.5, 0.8, 0.95):
        seen = table(agreement)
        ways = predict(seen, profile(), HALF, ways_to_draft(seen, profile()))
        assert best(seen, profile(), HALF).drafting.gamma < depths_worth_replaying(ways) <= 6


def test_a_compiled_round_has_one_length_whatever_was_drafted() -> None:
    rounds = tuple(float(n) for n in range(1, 7))
    eager, compiled = (Profile(**{**vars(profile(compiled=compiled)), "rounds": rounds}) for compiled in (False, True))
    drafted = np.array([0.0, 1.5, 3.0])
    assert eager.round(drafted, 3).tolist() == [1.0, 2.5, 4.0]
    assert compiled.round(drafted, 3).tolist() == [4.0, 4.0, 4.0]


def test_costs_are_recovered_from_steps_and_never_negative() -> None:
    counts = np.array([[1, 7, 7, 7], [1, 2, 2, 2], [1, 7, 0, 7], [1, 7, 7, 0], [1, 7, 3, 7]], dtype=float)
    costs = np.array([0.5, 0.1, 0.3, 0.2])
    assert fit_costs(counts, counts @ costs) == pytest.approx(costs)
    free = np.array([0.0, 0.1, 0.3, 0.2])
    assert (fit_costs(counts, counts @ free * [1.0, 0.9, 1.0, 1.0, 1.0]) >= 0).all()


def test_compiled_rounds_are_measured_at_few_lengths_from_the_plain_one_to_the_longest() -> None:
    assert round_lengths(11, sparse=False) == list(range(12))
    assert round_lengths(11, sparse=True) == [0, 1, 2, 4, 8, 11]
    assert round_lengths(1, sparse=True) == [0, 1]
