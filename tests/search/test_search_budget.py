"""A search keeps its budget, says what it cut short, and loses no good draft by racing."""

from __future__ import annotations

from typing import Any

import pytest
from models import ENDS_SKIPPED, LAYERS, damped_model
from profiles import costs_of, measuring, profile_of
from replays import random_prompts, texts_of
from selfspec_search import Progress, SearchSettings, search
from selfspec_search.budget import SHARES, Budget
from selfspec_search.confirm.confirm import _affordable
from selfspec_search.profile import profile
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.texts import TextSeconds
from selfspec_search.study.objective import Prices, ceiling
from selfspec_search.study.race import COMPARED_FIRST, LEAST_TEXTS, Race, few_texts
from transformers import PreTrainedModel

from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.runtime import Runtime

SETTINGS: dict[str, Any] = {
    "trials": 9, "gamma_max": 3, "new_tokens": 19, "confirm": 2, "repeats": 1, "confirm_texts": 2, "draft": "skip"
}  # fmt: skip
CHEAP_DRAFTS = profile_of(costs_of(attention=0.003, mlp=0.002))
CALIBRATION, HELD_OUT = random_prompts(5, 11, 2, 7, seed=0), random_prompts(3, 13, 6, seed=1)


class Clock:
    """A clock that advances by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


# --- The budget ---


def test_phases_share_the_budget_and_trials_get_the_rest() -> None:
    clock = Clock()
    budget = Budget(seconds=100.0, clock=clock)
    assert budget.share("profile") == 100 * SHARES["profile"]
    assert budget.until("confirm") == 100 * (1 - SHARES["confirm"])
    clock.now += 90.0
    assert budget.left == pytest.approx(10.0)
    assert budget.share("profile") == pytest.approx(10.0)
    assert budget.until("confirm") == 0.0
    clock.now += 90.0
    assert budget.left == 0.0


def test_without_a_limit_nothing_is_cut() -> None:
    budget = Budget()
    assert not budget.is_limited
    assert budget.share("texts") == budget.until("confirm") == float("inf")
    assert _affordable(budget, 1e9, 3, 8) == (3, 8)
    assert budget.cuts == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1000.0, (3, 8)), (170.0, (3, 4)), (60.0, (1, 4)), (30.0, (1, 3)), (0.5, (1, 3))],
)
def test_confirmation_decodes_what_the_time_left_allows(seconds: float, expected: tuple[int, int]) -> None:
    budget = Budget(seconds=seconds, clock=Clock())
    assert _affordable(budget, 8.0, 3, 8) == expected
    assert bool(budget.cuts) == (expected != (3, 8))


def test_new_tokens_within_a_time() -> None:
    assert TextSeconds(prefill=2.0, token=0.5).tokens_within(12.0) == 20


class SlowSubject:
    """Stands for the subject of a profile whose calls take a second each."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ran = clock, list[Any]()

    def calls(self) -> dict[Any, Any]:
        return {name: lambda name=name: self._call(name) for name in [(1, 0), (1, 1), (2, 0), (2, 1)]}

    def _call(self, name: Any) -> None:
        self.clock.now += 1.0
        self.ran.append(name)

    def fewest(self, names: Any) -> list[Any]:
        return [name for name in names if name[0] == 1]


@pytest.mark.parametrize(("seconds", "names", "cycles"), [(1000.0, 4, 15), (31.0, 4, 6), (16.0, 2, 7), (1.0, 2, 5)])
def test_a_slow_profile_drops_cycles_then_contexts(
    monkeypatch: pytest.MonkeyPatch, seconds: float, names: int, cycles: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(profile, "perf_counter", clock)
    budget, subject = Budget(seconds=1e4, clock=clock), SlowSubject(clock)
    calls, number = profile._affordable(subject, clock.now + seconds, budget)  # type: ignore[arg-type]
    assert (len(calls), number) == (names, cycles)
    assert sorted(subject.ran) == sorted(calls), "every call that is timed ran once before"
    assert len(budget.cuts) == (names < 4) + (cycles < 15)


# --- Racing ---


def test_the_few_texts_hold_enough_positions_and_spread_over_the_lengths() -> None:
    lengths = [Length(50, 60 + 7 * index % 200) for index in range(40)]
    chosen = few_texts(lengths, 300)  # type: ignore[arg-type]
    assert len(chosen) == len(set(chosen)) == 6
    spread = sorted(len(lengths[index]) for index in chosen)
    assert spread[0] < 100 < 200 < spread[-1]
    assert len(few_texts(lengths, 1)) == LEAST_TEXTS  # type: ignore[arg-type]
    assert few_texts(lengths[:3], 10**6) == [0, 1, 2]  # type: ignore[arg-type]


class Length:
    def __init__(self, written: int, length: int) -> None:
        self.written, self.length = written, length

    def __len__(self) -> int:
        return self.length


def test_a_draft_is_lost_only_if_the_largest_ratio_seen_would_not_save_it(model: PreTrainedModel) -> None:
    texts = texts_of(Runtime(model), random_prompts(*range(3, 15), seed=2), 60)
    race = Race(Replay(model, texts, 3), Prices.of(CHEAP_DRAFTS, texts, lookup=False))
    assert race.pays
    few, agreement = race.run(DraftSpec.of(ENDS_SKIPPED))
    assert few > 0
    assert 0 < agreement <= 1
    for ratio in (1.0, 0.9, 1.2, 1.0)[: COMPARED_FIRST - 1]:
        race.learn(1.0, ratio)
    assert not race.is_lost(0.1, 10.0), "too few comparisons"
    race.learn(1.0, 1.1)
    assert race.is_lost(1.0, 1.21)
    assert not race.is_lost(1.0, 1.19)
    assert race.expected(2.0) == 2.0


def test_racing_ends_bad_trials_early_and_finds_the_same_best_draft(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(CHEAP_DRAFTS))
    prompts = random_prompts(*range(3, 19), seed=3)
    settings = SearchSettings(**SETTINGS | {"trials": 24, "lookup": False})
    raced = search(model, prompts, HELD_OUT, settings)
    monkeypatch.setattr(Race, "is_lost", lambda self, few, best: False)
    whole = search(model, prompts, HELD_OUT, settings)
    best = [max(one.prediction.speedup for one in result.confirmed) for result in (raced, whole)]
    assert best[0] == pytest.approx(best[1], rel=0.03)


# --- Searches ---


def test_a_search_with_a_tiny_budget_still_writes_a_plan_and_says_what_was_cut(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(CHEAP_DRAFTS))
    seen: list[Progress] = []
    settings = SearchSettings(**SETTINGS | {"budget": 0.01, "trials": 500})
    result = search(model, CALIBRATION, HELD_OUT, settings, seen.append)
    assert any("of 500 drafts were tried" in line for line in result.cuts)
    assert result.plan.provenance is not None
    assert result.plan.provenance.settings["budget"] == 0.01
    assert result.plan.provenance.settings["cut short"] == list(result.cuts)
    assert all(progress.left is not None for progress in seen)
    assert result.differing_texts == 0


def test_the_sensitivity_is_a_phase_of_its_own(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(CHEAP_DRAFTS))
    seen: list[Progress] = []
    search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS), seen.append)
    totals = {progress.total for progress in seen if progress.phase == "sensitivity"}
    assert totals == {2 * LAYERS}
    assert all(progress.left is None for progress in seen)


def test_where_no_draft_can_win_one_trial_suffices(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steep = costs_of(attention=0.003, mlp=0.002)
    steep = steep.model_copy(update={"rounds": tuple(steep.rounds[0] * (n + bool(n) / 2 + 1) for n in range(4))})
    assert ceiling(steep) < 1 < ceiling(costs_of(attention=0.003, mlp=0.002))
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(profile_of(steep)))
    notices: list[str] = []
    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS), on_notice=notices.append)
    assert result.trials_complete + result.trials_pruned == 1
    assert any("no draft can win on this device" in line for line in notices)
