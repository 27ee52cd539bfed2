"""A whole search on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest
import torch
from models import ENDS_SKIPPED, LAYERS, VOCABULARY, damped_model
from selfspec_search import Progress, SearchResult, SearchSettings, search
from selfspec_search.profile import Profile, measure
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import InputError, Plan, SkipSet
from selfspec.drafting import LayerSkipDrafter
from selfspec.request import Request
from selfspec.sampling import Draft

SETTINGS = {"trials": 9, "gamma_max": 3, "new_tokens": 19, "confirm": 2, "repeats": 1, "confirm_texts": 2}


CHEAP_DRAFTS = Profile(
    num_layers=LAYERS,
    fixed=0.001,
    layer=0.001,
    attention=0.003,
    mlp=0.002,
    confidence=0.0,
    rounds=(0.04,) * 4,
    prefill=0.01,
    compiled=False,
    measured={},
)
"""What a search would measure on a machine that does not depend on the hour."""


@pytest.fixture(autouse=True)
def _profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: object, on_cycle: Callable[[int, int], None], **kwargs: object) -> Profile:
        on_cycle(1, 1)
        return CHEAP_DRAFTS

    monkeypatch.setattr("selfspec_search.run.measure", measured)


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


CALIBRATION, HELD_OUT = prompts(5, 11, 2, 7), prompts(3, 13, 6, seed=1)


def test_a_search_confirms_its_plans_by_decoding(model: PreTrainedModel) -> None:
    seen: list[Progress] = []
    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS), seen.append)
    assert result.trials_complete + result.trials_pruned == SETTINGS["trials"]
    assert len(result.confirmed) == 2
    assert result.rounds_equal
    assert result.differing_texts == 0
    for confirmed in result.confirmed:
        assert confirmed.tokens_per_round_replayed == confirmed.tokens_per_round_decoded > 1
        assert confirmed.measured.texts == 2
        assert confirmed.predicted_on_held_out.texts == 3
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["texts", "profile", "trials", "confirm"]
    for phase in phases:
        counts = [progress.done for progress in seen if progress.phase == phase]
        assert counts == sorted(counts)
        last = [progress for progress in seen if progress.phase == phase][-1]
        assert last.done == last.total


def test_the_plan_says_what_was_predicted_and_measured_and_can_be_read_back(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    plan = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS)).plan
    plan.save(tmp_path / "plan.json")
    read = Plan.from_pretrained(tmp_path / "plan.json")
    assert read == plan
    read.check_fits(model.config)
    assert plan.provenance is not None
    assert plan.provenance.conditions.dtype == "float32"
    assert plan.provenance.predicted is not None
    assert plan.provenance.predicted.texts == len(CALIBRATION)
    assert plan.provenance.predicted_on_held_out is not None
    assert plan.provenance.measured is not None
    assert plan.provenance.measured.texts == 2


def test_where_plain_decoding_wins_the_plan_does_not_speculate(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(LayerSkipDrafter):
        def draft(self, request: Request) -> Draft:
            sleep(0.03)
            return super().draft(request)

    monkeypatch.setattr("selfspec_search.confirm.LayerSkipDrafter", Slow)
    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS))
    assert not result.plan.speculates
    assert not result.plan.skip_set
    assert result.winner is None
    assert result.held_out_figures.speedup == 1.0
    assert len(result.confirmed) == 2
    assert "plain decoding won" in result.summary()


def test_a_profile_is_measured_with_the_real_runtime(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.profile.CYCLES", 2)
    cycles: list[tuple[int, int]] = []
    profile = measure(
        model, CALIBRATION, gamma_max=3, slots=40, on_cycle=lambda done, total: cycles.append((done, total))
    )
    assert cycles == [(0, 2), (1, 2), (2, 2)]
    assert len(profile.rounds) == 4
    assert min(profile.rounds) > 0
    assert profile.draft_step(SkipSet()) == pytest.approx(profile.measured["nothing"])
    assert profile.draft_step(SkipSet()) >= profile.draft_step(ENDS_SKIPPED) > 0


def test_ctrl_c_during_trials_keeps_the_best_so_far(model: PreTrainedModel) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == "trials" and progress.done == 3:
            raise KeyboardInterrupt

    result = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS), interrupt)
    assert result.interrupted
    assert result.trials_complete + result.trials_pruned == 3
    assert result.confirmed


def test_a_search_resumes_what_its_storage_holds(model: PreTrainedModel, tmp_path: Path) -> None:
    import optuna

    settings = SearchSettings(**SETTINGS, storage=str(tmp_path / "trials.db"), study_name="twice")
    for searches in (1, 2):
        search(model, CALIBRATION, HELD_OUT, settings)
        study = optuna.load_study(study_name="twice", storage=f"sqlite:///{tmp_path / 'trials.db'}")
        assert len(study.trials) == searches * settings.trials


def test_a_search_with_other_settings_does_not_mix_with_a_stored_one(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "trials.db")
    search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, storage=storage, study_name="mine"))
    other = SearchSettings(**SETTINGS | {"gamma_max": 2}, storage=storage, study_name="mine")
    with pytest.raises(InputError, match=r"study 'mine' in .* is about another model, other prompts or other settings"):
        search(model, CALIBRATION, HELD_OUT, other)


def test_a_search_that_tried_nothing_says_so_instead_of_advising_against_speculation(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="ended before it had tried one skip set; give it more time"):
        search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS, timeout=1e-9))


def test_results_print_as_rows_and_a_summary(model: PreTrainedModel) -> None:
    result: SearchResult = search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS))
    rows = result.rows()
    assert len(rows) == 3
    assert len({tuple(row) for row in rows}) == 1
    assert sum(row["plan"] == "plain decoding" for row in rows) == 1
    assert "equal in every round" in result.summary()


def test_settings_that_make_no_sense_are_named() -> None:
    with pytest.raises(InputError, match="trials is 0, but it must be at least 1"):
        SearchSettings(trials=0)
    with pytest.raises(InputError, match="gamma_max is 65"):
        SearchSettings(gamma_max=65)
    with pytest.raises(InputError, match="seed is -1"):
        SearchSettings(seed=-1)
    with pytest.raises(InputError, match="timeout is 0 seconds"):
        SearchSettings(timeout=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no calibration prompts were given"),
        ([torch.zeros(0, dtype=torch.long)], "calibration prompt 0 is torch.int64 of shape \\(0,\\)"),
        ([torch.tensor([3, VOCABULARY])], "outside the model's vocabulary of 0..210"),
    ],
    ids=["none", "empty", "unknown token"],
)
def test_prompts_that_cannot_be_used_are_named(model: PreTrainedModel, bad: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(model, bad, HELD_OUT)
