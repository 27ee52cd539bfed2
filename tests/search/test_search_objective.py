"""Predictions from tables and costs whose results are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from selfspec_search.profile.costs import Costs
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.rounds import Drafting, rounds_of
from selfspec_search.replay.table import Table
from selfspec_search.study.objective import (
    Prediction,
    Prices,
    best,
    depths_worth_replaying,
    plain_figures,
    predict,
    ways_to_draft,
)

from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.sublayers import SkipSet

LAYERS = 7
HALF = DraftSpec.of(SkipSet.early_exit(4, LAYERS))


def costs(*, layer: float = 0.1, fixed: float = 0.2) -> Costs:
    """A round of any length costs 1; an attention costs three times an MLP."""
    return Costs(
        num_layers=LAYERS,
        fixed=fixed,
        layer=0.0,
        attention=0.75 * layer,
        mlp=0.25 * layer,
        rounds=(1.0,) * 6,
        prefill=0.0,
        compiled=False,
    )


PRICES = Prices(costs=costs())


def table(agreement: float, texts: int = 5, starts: int = 97, depths: int = 5) -> Table:
    generator = np.random.default_rng(0)
    agreed = np.cumprod(generator.random((texts, starts, depths)) < agreement, axis=2).astype(np.float32)
    written = np.full(texts, starts)
    return Table(agreed, written, written)


def test_predicted_speed_is_tokens_over_the_sum_of_steps_and_rounds() -> None:
    always = table(1.0, texts=1, starts=11)
    (prediction,) = predict(always, PRICES, HALF, [Drafting(4)])
    # 5 + 5 + 1 tokens in three rounds; 4 + 4 + 0 steps of 0.6 each.
    assert prediction.figures.tokens_per_round == pytest.approx(11 / 3)
    assert prediction.figures.acceptance_rate == 1.0
    assert prediction.figures.tokens_per_second == pytest.approx(11 / (3 + 8 * 0.6))
    assert prediction.speedup == pytest.approx(11 / (3 + 8 * 0.6))


def test_plain_decoding_is_faster_than_drafts_that_are_never_accepted() -> None:
    prediction = best(table(0.0), PRICES, HALF)
    assert prediction.drafting == Drafting(1)  # the smallest loss
    assert prediction.speedup == pytest.approx(1 / 1.6, rel=0.01)


def test_higher_agreement_gives_longer_drafts() -> None:
    cheap = Prices(costs=costs(layer=0.01, fixed=0.02))
    lengths = [best(table(agreement), cheap, HALF).drafting.gamma for agreement in (0.1, 0.5, 0.9)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_depths_worth_replaying_include_the_best_draft_length() -> None:
    for agreement in (0.0, 0.5, 0.8, 0.95):
        seen = table(agreement)
        ways = predict(seen, PRICES, HALF, ways_to_draft(seen, PRICES))
        assert best(seen, PRICES, HALF).drafting.gamma < depths_worth_replaying(ways) <= 6


def test_every_draft_length_that_was_replayed_and_priced_is_a_way_to_draft() -> None:
    assert [way.gamma for way in ways_to_draft(table(0.8), PRICES)] == [1, 2, 3, 4, 5]
    assert [way.gamma for way in ways_to_draft(table(0.8, depths=3), PRICES)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [1.0, 2.5, 4.0]), ({"captured": True}, [4.0] * 3), ({"compiled": True}, [4.0] * 3)],
    ids=["eager", "captured", "compiled"],
)
def test_a_captured_or_compiled_round_costs_the_longest_draft(changes: dict[str, bool], expected: list[float]) -> None:
    priced = costs().model_copy(update={"rounds": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)} | changes)
    assert priced.round(np.array([0.0, 1.5, 3.0]), 3).tolist() == expected


# --- Rows, lookup ---


def test_a_batch_takes_the_rounds_of_its_slowest_row() -> None:
    # Drafts of one text are always accepted (3 rounds of 11 tokens), of the other never (11 rounds): 11 passes in all.
    seen = table(1.0, texts=2, starts=11)
    seen.weight[1] = 0
    two = Prices(costs=costs(), rows=2)
    (prediction,) = predict(seen, two, HALF, [Drafting(4)])
    replayed = rounds_of(seen, [Drafting(4)])
    shares = replayed.visits[0].ravel() / replayed.visits[0].sum()
    steps = replayed.steps[0].ravel()
    steps = float((np.outer(shares, shares) * np.maximum.outer(steps, steps)).sum())
    assert prediction.figures.tokens_per_second == pytest.approx(22 / (11 * (1 + steps * 0.6)))
    assert plain_figures(seen, two).tokens_per_second == pytest.approx(22 / 11)


def test_texts_repeat_to_fill_the_last_batch() -> None:
    one, prices = table(0.7, texts=1), Prices(costs=costs(), rows=3)
    three_times = one.only([0, 0, 0])
    alone, filled = (predict(some, prices, HALF, [Drafting(2)])[0].figures for some in (one, three_times))
    assert (alone.texts, filled.texts) == (1, 3)
    assert alone.tokens_per_second == pytest.approx(filled.tokens_per_second)
    assert alone.speedup == pytest.approx(filled.speedup)


def lookups(matched: int, runs: int, texts: int = 5, starts: int = 97) -> LookupTable:
    return LookupTable(np.full((texts, starts), matched), np.full((texts, starts), runs))


def test_prompt_lookup_is_chosen_if_its_drafts_are_accepted() -> None:
    way = PromptLookup(gamma=5, min_ngram=2)
    right, wrong = (Prices(costs=costs(), lookup=lookups(3, runs), lookups=(way,)) for runs in (5, 0))
    assert best(table(0.8), right, HALF).drafting.lookup == way
    assert best(table(0.8), wrong, HALF).drafting.lookup is None
    assert best(table(0.8), right, HALF).figures.tokens_per_round == pytest.approx(5.7, abs=0.1)


def test_layer_skipping_drafts_if_the_match_is_too_short() -> None:
    way = PromptLookup(gamma=5, min_ngram=4)
    prices = Prices(costs=costs(), lookup=lookups(3, 5), lookups=(way,))
    with_lookup, without = predict(table(0.8), prices, HALF, [Drafting(3, way), Drafting(3)])
    assert with_lookup.figures.tokens_per_round == without.figures.tokens_per_round


def test_a_prediction_is_read_back_exactly() -> None:
    way = Drafting(3, PromptLookup(gamma=5, min_ngram=2))
    prices = Prices(costs=costs(), lookup=lookups(3, 2))
    (prediction,) = predict(table(0.8), prices, HALF, [way])
    assert Prediction.from_dict(HALF, json.loads(json.dumps(prediction.to_dict()))) == prediction
