"""Whole searches on a tiny model."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import pytest
import torch
from models import ENDS_SKIPPED, FIRST_DROPPED, VOCABULARY, damped_model, tiny_model
from profiles import costs_of, measuring, profile_of
from replays import random_prompts, texts_of
from selfspec_search import OnProgress, Progress, Sampling, SearchResult, SearchSettings, load_study, repick, search
from selfspec_search.confirm.confirm import _batches
from selfspec_search.confirm.contender import Contender
from selfspec_search.confirm.plan_writer import Phases, PlanWriter
from selfspec_search.replay.rounds import Drafting
from selfspec_search.replay.text_cache import CACHE_VARIABLE, TextCache, model_fingerprint
from selfspec_search.replay.texts import Text
from selfspec_search.space import Space
from selfspec_search.study.objective import Prediction, Prices, ranked
from selfspec_search.study.proposals import Findings
from selfspec_search.study.study import Study
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import InputError, Plan, PlanError, PromptLookup, SkipSet
from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import NoDrafter
from selfspec.decoding.request import Request
from selfspec.drafters.build import drafter_of
from selfspec.drafters.layer_skip import LayerSkipDrafter
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.provenance import Figures
from selfspec.runtime.runtime import Runtime

SETTINGS = {"trials": 9, "gamma_max": 3, "new_tokens": 19, "confirm": 2, "repeats": 1, "confirm_texts": 2}
CHEAP_DRAFTS = profile_of(costs_of(attention=0.003, mlp=0.002))


@pytest.fixture(autouse=True)
def _profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(CHEAP_DRAFTS))
    monkeypatch.setattr("selfspec_search.profile.round_costs.CYCLES", 1)


@pytest.fixture
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


def find(model: PreTrainedModel, on_progress: OnProgress | None = None, **changes: object) -> SearchResult:
    """A short search; `changes` are settings."""
    return search(model, CALIBRATION, HELD_OUT, SearchSettings(**SETTINGS | changes), on_progress)


CALIBRATION, HELD_OUT = random_prompts(5, 11, 2, 7, seed=0), random_prompts(3, 13, 6, seed=1)


def test_a_search_confirms_its_plans_by_decoding(model: PreTrainedModel) -> None:
    seen: list[Progress] = []
    result = find(model, seen.append)
    assert result.trials_complete + result.trials_pruned == SETTINGS["trials"]
    assert len(result.confirmed) in (2, 3)  # the third is prompt lookup alone
    assert result.rounds_equal
    assert result.differing_texts == 0
    for confirmed in result.confirmed:
        assert confirmed.tokens_per_round_replayed == confirmed.tokens_per_round_decoded > 1
        assert abs(confirmed.errors["tokens_per_round"]) < 1e-9
        assert confirmed.measured.agreement == pytest.approx(confirmed.expected_here.agreement)
        assert len(confirmed.measured.agreement) == confirmed.prediction.drafting.longest
        low, middle, high = confirmed.measured.spread
        assert low <= middle <= high
        assert confirmed.measured.texts == 2
        assert confirmed.predicted_on_held_out.texts == 3
    rows = result.rows()
    assert len(rows) == 1 + len(result.confirmed)
    assert sum(row["plan"] == "plain decoding" for row in rows) == 1
    assert {row["differing texts"] for row in rows} == {"0"}
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["texts", "profile", "trials", "sensitivity", "confirm"]
    for phase in phases:
        counts = [progress.done for progress in seen if progress.phase == phase]
        assert counts == sorted(counts)
        last = [progress for progress in seen if progress.phase == phase][-1]
        assert last.done == last.total


def test_round_costs_without_lookup_hold_no_matches(model: PreTrainedModel) -> None:
    settings = SearchSettings(**SETTINGS | {"lookup": False})
    result = search(model, CALIBRATION, HELD_OUT, settings)
    writer = PlanWriter(model=model, settings=settings, profile=result.profile, phases=Phases(on_progress=print))
    texts = [Text(tokens=torch.zeros(31, dtype=torch.long), prompt=13, allowed=18)]
    (round_costs,) = writer._round_costs(result.confirmed[0], texts)
    assert round_costs.rounds == list(result.profile.costs[0].rounds)
    step = result.profile.costs[0].draft_step(result.confirmed[0].prediction.skip_set)
    assert round_costs.draft_step == pytest.approx(step)
    assert round_costs.agreement == result.confirmed[0].by_layers
    assert (round_costs.matches, round_costs.lookup) == ([], 0.0)


def test_the_plan_holds_predicted_and_measured_figures(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = find(model).plan
    plan.save(tmp_path / "plan.json")
    read = Plan.from_pretrained(tmp_path / "plan.json")
    assert read == plan
    read.check_fits(model.config)
    assert [costs.rows for costs in plan.round_costs] == [1] * plan.speculates
    assert all(costs.matches for costs in plan.round_costs)
    assert plan.provenance.conditions.dtype == "float32"
    assert plan.provenance.predicted.texts == len(CALIBRATION)
    assert plan.provenance.predicted_on_held_out.texts == len(HELD_OUT)
    assert plan.provenance.measured.texts == 2


def test_the_plan_does_not_speculate_if_plain_decoding_is_faster(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(LayerSkipDrafter):
        def draft(self, request: Request, n: int) -> Draft:
            sleep(0.03)
            return super().draft(request, n)

    def slow_drafter_of(plan: Plan, runtime: Runtime) -> Slow:
        return Slow(runtime, plan.gamma, plan.exit_threshold)

    monkeypatch.setattr("selfspec_search.confirm.confirm.drafter_of", slow_drafter_of)
    result = find(model)
    assert not result.plan.speculates
    assert not result.plan.skip_set
    assert result.winner is None
    assert result.plan.provenance.measured.speedup == 1.0
    assert len(result.confirmed) >= 2
    assert result.plan.provenance.errors["speedup"] < 0, "the plan names the error of the prediction"


def test_figures_count_no_token_after_an_accepted_stop_token() -> None:
    model = tiny_model("llama")
    draft = SkipSet(attn={6})
    runtime = Runtime(model, draft)
    (free,) = texts_of(runtime, random_prompts(5, seed=0), 23)
    model.generation_config.eos_token_id = int(free.tokens[free.prompt + 9])
    (text,) = texts_of(runtime, random_prompts(5, seed=0), 23)
    settings, plan = SearchSettings(), Plan(skip_set=draft, gamma=5)
    ours, plain = (Contender(runtime, one, settings.sampling) for one in (drafter_of(plan, runtime), NoDrafter()))
    ours.decode(0, [text])
    plain.decode(0, [text])
    figures, (rounds,) = ours.figures(plain, 1), ours.rounds()
    assert sum(accepted + 1 for _, accepted in rounds) == text.written + 1, "the stop token was accepted"
    assert figures.spread == [text.written / len(rounds)] * 3
    assert figures.tokens_per_round == figures.spread[0]


@pytest.mark.parametrize(
    ("estimate", "gap", "hopeless"), [(1.09, 0.1, True), (1.1, 0.1, False), (1.19, 0.0, True), (1.2, 0.0, False)]
)
def test_a_trial_is_hopeless_if_the_largest_gap_leaves_it_below_the_best(
    estimate: float, gap: float, hopeless: bool
) -> None:
    findings = Findings(prices=Prices(costs=CHEAP_DRAFTS.costs[0]), largest_gap=gap)
    figures = Figures(tokens_per_round=2.0, acceptance_rate=0.5, tokens_per_second=9.0, speedup=1.2, texts=1)
    found = [Prediction(draft_spec=s, drafting=Drafting(1), figures=figures) for s in Space(num_layers=2).every()]
    findings.found = {prediction.draft_spec: prediction for prediction in found[:5]}
    assert findings.is_hopeless(estimate) is hopeless
    findings.found.popitem()
    assert not findings.is_hopeless(estimate), "too few complete trials to know the gap"


def test_the_largest_gap_counts_gaps_of_either_sign(model: PreTrainedModel, tmp_path: Path) -> None:
    storage, gaps = str(tmp_path / "trials.db"), []
    plain = Findings.add

    def noted(self: Findings, skip_set: SkipSet, prediction: Prediction | None, estimate: float) -> None:
        plain(self, skip_set, prediction, estimate)
        gaps.append((prediction and abs(prediction.speedup / estimate - 1), self.largest_gap))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Findings, "add", noted)
        find(model, trials=20, storage=storage)
    assert gaps[-1][1] == max(gap for gap, _ in gaps if gap is not None) > 0
    trials = load_study(storage).trials
    assert 5 <= sum(trial.value is not None for trial in trials) < 20, "trials were pruned, but none of the first five"


def test_ctrl_c_during_trials_confirms_the_best_so_far(model: PreTrainedModel) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == "trials" and progress.done == 3:
            raise KeyboardInterrupt

    result = find(model, interrupt)
    assert result.interrupted
    assert result.trials_complete + result.trials_pruned == 3
    assert result.confirmed


@pytest.mark.slow
def test_a_search_resumes_what_its_storage_holds(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "trials.db")
    seen: list[Progress] = []
    for trials, added in ((4, 4), (4, 0), (9, 5)):
        seen.clear()
        result = find(model, seen.append, trials=trials, storage=storage, study_name="again")
        assert result.trials_complete + result.trials_pruned == trials
        assert sum(progress.phase == "trials" for progress in seen) == added + 1
        assert len({trial.draft_spec for trial in load_study(storage, "again").trials}) == trials
    assert all(progress.phase not in ("texts", "profile") for progress in seen), "the study stores both"


def test_a_search_without_time_tries_one_draft_spec(model: PreTrainedModel) -> None:
    result = find(model, timeout=1e-9)
    assert result.trials_complete == 1


def test_a_search_without_a_finished_trial_says_so(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Study, skip_set: SkipSet) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_try", interrupt)
    with pytest.raises(InputError, match="ended before its first trial; give the search more time"):
        find(model)


@pytest.mark.slow
def test_a_plan_speculates_only_if_it_is_faster_beyond_doubt(model: PreTrainedModel) -> None:
    result = find(model, repeats=3, confirm_texts=3)
    for confirmed in result.confirmed:
        low, high = confirmed.measured.interval
        assert low <= confirmed.measured.speedup <= high
        assert not confirmed.is_faster or low > 1
    assert result.winner == next((c for c in result.confirmed if c.is_faster), None)
    assert result.plan.speculates == (result.winner is not None)
    assert [c.rank for c in result.confirmed] == sorted(c.rank for c in result.confirmed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 0}, "trials is 0, but it must be at least 1"),
        ({"gamma_max": 65}, "gamma_max is 65"),
        ({"seed": -1}, "seed is -1"),
        ({"timeout": 0}, "timeout is 0 seconds"),
        ({"rows": 0}, "rows is 0, but it must be at least 1"),
        ({"sampler": "best"}, "sampler is 'best', but it must be one of tpe, gp, random"),
        ({"max_draft_cost": 1.5}, "max_draft_cost is 1.5, but it must be above 0 and at most 1"),
        ({"draft": "all"}, "draft is 'all', but it must be one of both, skip, quantised"),
        ({"draft_memory": 0}, "draft_memory is 0, but it must be at least 1 byte"),
        ({"more_rows": [4, 0]}, "more_rows holds 0, but there is at least 1 row"),
        ({"lookup_max": 65}, "lookup_max is 65, but it must be between 1 and 64"),
        ({"lookup_max": 0}, "lookup_max is 0, but it must be between 1 and 64"),
        ({"lookup_max": 7, "lookup": False}, "lookup_max is 7, but prompt lookup takes no part"),
    ],
)
def test_invalid_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchSettings(**settings)


def test_the_longest_draft_is_that_of_layers_or_of_lookup() -> None:
    assert SearchSettings(gamma_max=8).longest_draft == 16
    assert SearchSettings(gamma_max=8, lookup=False).longest_draft == 8
    assert SearchSettings(gamma_max=8, lookup_max=3).longest_draft == 8
    assert SearchSettings(gamma_max=40).longest_draft == 64


# --- Other settings ---


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_every_sampler_finishes_a_search(model: PreTrainedModel, sampler: str) -> None:
    result = find(model, trials=13, sampler=sampler)
    assert result.trials_complete + result.trials_pruned == 13
    assert result.rounds_equal


def test_a_draft_above_the_cost_limit_is_neither_replayed_nor_chosen(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "trials.db")
    result = find(model, trials=15, max_draft_cost=0.4, storage=storage)
    costs = CHEAP_DRAFTS.costs[0]
    for confirmed in result.confirmed:
        step = costs.draft_step(confirmed.prediction.skip_set) / costs.draft_step(SkipSet())
        assert confirmed.prediction.drafting.gamma == 0 or step <= 0.4
    trials = load_study(storage).trials
    for trial in trials:
        assert ("table" in trial.record) == (trial.record["draft_cost"] <= 0.4)
    assert any(trial.record["draft_cost"] > 0.4 for trial in trials)
    with pytest.raises(InputError, match=r"no draft that was tried costs at most 0.001"):
        find(model, max_draft_cost=0.001)


def test_sampled_rounds_are_about_as_predicted(model: PreTrainedModel) -> None:
    result = find(model, confirm_texts=3, sampling=Sampling(do_sample=True, temperature=0.8, top_k=20))
    assert result.plan.provenance.conditions.sampling == {"do_sample": True, "temperature": 0.8, "top_k": 20}
    for confirmed in result.confirmed:
        assert confirmed.rounds_equal is None
        assert confirmed.tokens_per_round_replayed == pytest.approx(confirmed.tokens_per_round_decoded, rel=0.4)


def test_a_search_for_several_rows_decodes_batches(model: PreTrainedModel) -> None:
    result = find(model, confirm_texts=3, rows=3)
    assert result.rounds_equal
    assert result.differing_texts == 0
    for confirmed in result.confirmed:
        assert confirmed.measured.texts == confirmed.expected_here.texts == 3, "each text counts once"


@pytest.mark.parametrize(
    ("texts", "rows", "limit", "expected"),
    [
        (5, 1, 2, [[0], [2]]),
        (5, 1, None, [[0], [1], [2], [3], [4]]),
        (5, 2, 1, [[0, 1], [2, 3], [4, 0]]),
        (2, 3, 8, [[0, 1, 0]]),
        (16, 2, 3, [[0, 2], [4, 6], [8, 10], [12, 14]]),
    ],
)
def test_each_held_out_text_is_in_one_batch_except_texts_that_fill_the_last_batch(
    texts: int, rows: int, limit: int | None, expected: list[list[int]]
) -> None:
    some = [Text(tokens=torch.zeros(3), prompt=2, allowed=1)] * texts
    assert _batches(some, SearchSettings(rows=rows, confirm_texts=limit)) == expected


def test_draft_specs_to_start_from_are_tried_first(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "trials.db")
    find(model, trials=3, start_from=[ENDS_SKIPPED], storage=storage)
    assert load_study(storage).trials[0].draft_spec.skip_set == ENDS_SKIPPED
    find(model, trials=4, start_from=[ENDS_SKIPPED, FIRST_DROPPED], storage=storage)
    assert load_study(storage).trials[3].draft_spec.skip_set == FIRST_DROPPED, "even after the study's seeds"


def test_the_timeout_ends_a_search_without_a_feasible_draft(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="raise max_draft_cost"):
        find(model, trials=10**6, timeout=0.5, max_draft_cost=1e-9)


def test_every_draft_of_a_small_model_is_tried_once_but_never_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At these costs, which only noise could show, the whole model would be the fastest draft.
    changes = {"num_layers": 2, "rounds": (0.04, *[0.001] * 3)}
    storage, costs = str(tmp_path / "trials.db"), CHEAP_DRAFTS.costs[0].model_copy(update=changes)
    profile = CHEAP_DRAFTS.model_copy(update={"num_layers": 2, "costs": (costs,)})
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *_, **__: profile)
    small = tiny_model("llama", num_hidden_layers=2)
    result = find(small, trials=40, storage=storage, start_from=[DraftSpec()])
    tried = [trial.draft_spec for trial in load_study(storage).trials]
    assert len(tried) == len(set(tried)) == result.trials_complete + result.trials_pruned == 2**4 - 1
    assert {*tried, DraftSpec()} == set(Space(num_layers=2).every())


def test_a_study_in_which_an_earlier_release_tried_the_whole_model_never_ranks_that_draft() -> None:
    figures = Figures(tokens_per_round=2.0, acceptance_rate=1.0, tokens_per_second=9.0, speedup=1.13, texts=1)
    cascade = Drafting(3, PromptLookup(gamma=5))
    ways = [(DraftSpec(), Drafting(1)), (DraftSpec.of(FIRST_DROPPED), Drafting(2)), (DraftSpec(), cascade)]
    predictions = [Prediction(draft_spec=draft, drafting=way, figures=figures) for draft, way in ways]
    assert ranked(predictions) == predictions[1:2]


@pytest.mark.slow
def test_texts_are_read_from_the_cache_for_the_same_model_prompts_and_settings(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    wrote = []
    for change in ({}, {}, {"new_tokens": 17}, {}):
        seen: list[Progress] = []
        find(model, seen.append, **{"trials": 2} | change)
        wrote.append(any(progress.phase == "texts" for progress in seen))
    assert wrote == [True, False, True, False]
    for file in (tmp_path / "texts").iterdir():
        file.write_bytes(b"no texts")
    seen = []
    find(model, seen.append, trials=2)
    assert seen[0].phase == "texts", "an unreadable file is replaced"


def test_a_changed_weight_or_dtype_changes_the_fingerprint(model: PreTrainedModel) -> None:
    before = model_fingerprint(model)
    assert before == model_fingerprint(damped_model("llama", ENDS_SKIPPED))
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.001)
    assert model_fingerprint(model) != before
    assert model_fingerprint(model.double()) != before


def test_other_settings_or_another_generation_config_do_not_join_the_study(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    settings = {"trials": 2, "storage": str(tmp_path / "trials.db"), "study_name": "one"}
    find(model, **settings)
    with pytest.raises(InputError, match=r"study 'one' in .* gamma_max 3 \(here 2\)"):
        find(model, **settings, gamma_max=2)
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(InputError, match="was made with generation config"):
        find(model, **settings)
    keys = set()
    for penalty in (1.0, 1.5):
        model.generation_config.repetition_penalty = penalty
        keys.add(TextCache().key(model, CALIBRATION, sampling=Sampling().resolved(model)))
    assert len(keys) == 2, "texts are written again"


def test_a_start_from_that_does_not_fit_the_model_is_refused_first(model: PreTrainedModel) -> None:
    seen: list[Progress] = []
    with pytest.raises(PlanError, match="40"):
        find(model, seen.append, start_from=[SkipSet(attn={40})])
    assert not seen


# --- Repicking ---


@pytest.mark.slow
def test_repick_chooses_other_skip_sets_at_other_costs(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path / "trials.db")
    first, study = find(model, trials=21, storage=storage), load_study(storage)
    again = repick(model, study, SearchSettings(**SETTINGS))
    best, best_again = (max(c.prediction.speedup for c in result.confirmed) for result in (first, again))
    assert best_again >= 0.99 * best, "at the same costs, repick finds as good a plan"
    # Attention is free and MLPs are expensive, so other skip sets are best.
    costs = CHEAP_DRAFTS.costs[0].model_copy(update={"attention": 0.0, "mlp": 0.005})
    other = CHEAP_DRAFTS.model_copy(update={"costs": (costs,), "rows": 2})
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *args, **kwargs: other)
    moved = repick(model, study, SearchSettings(**SETTINGS, rows=2))
    assert moved.plan.provenance.conditions.rows == 2
    assert {c.prediction.skip_set for c in moved.confirmed} != {c.prediction.skip_set for c in first.confirmed}
    assert "texts" not in moved.seconds
    assert moved.rounds_equal


def test_repick_refuses_a_study_of_another_model(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "trials.db")
    find(model, storage=storage)
    with pytest.raises(InputError, match="is about another model than the one given"):
        repick(damped_model("llama", FIRST_DROPPED), load_study(storage))


@pytest.mark.slow
def test_a_worker_on_another_device_repicks_with_its_own_profile(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path / "trials.db")
    elsewhere = CHEAP_DRAFTS.model_copy(update={"device": "a large accelerator"})
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *args, **kwargs: elsewhere)
    find(model, storage=storage)
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *args, **kwargs: CHEAP_DRAFTS)
    here = find(model, storage=storage)
    assert here.plan.provenance.conditions.device == "cpu"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no calibration prompts were given"),
        ([torch.zeros(1, dtype=torch.long)], "calibration prompt 0 is torch.int64 of shape \\(1,\\); .* at least two"),
        ([torch.tensor([3, VOCABULARY])], "outside the model's vocabulary of 0..210"),
    ],
    ids=["none", "empty", "unknown token"],
)
def test_unusable_prompts_are_refused(model: PreTrainedModel, bad: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(model, bad, HELD_OUT)
