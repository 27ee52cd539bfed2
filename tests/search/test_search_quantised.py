"""Searches with quantised drafts: savings of draft weights, the space, and whole searches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import quantised_models
import torch
from hypothesis import example, given
from profiles import measuring, profile_of
from quantised_models import TOKENS, quantisable_model
from selfspec_search import SearchResult, SearchSettings, load_study, repick, search
from selfspec_search.confirm.confirm import pass_lengths_of
from selfspec_search.profile.costs import Costs, Savings
from selfspec_search.profile.draft_costs import FORMATS, UNPADDED, fit_draft_weights, quantised_variants
from selfspec_search.profile.pass_lengths import draft_padding, suggested_lengths, target_padding
from selfspec_search.profile.timing import TimedCalls
from selfspec_search.replay.texts import Text
from selfspec_search.report import make_page, read_source
from selfspec_search.space import OWN_HEAD
from selfspec_search.study.build_space import build_space, frequent_tokens, most_draft_weight_bytes
from selfspec_search.study.constraints import Limits
from selfspec_search.study.objective import Prices
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import InputError, QuantisedSet, SkipSet, SubVocabulary, draft_bytes, wrap
from selfspec.plan.draft_spec import INT4, INT8, DraftSpec, Quantised
from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.runtime import Runtime

LAYERS = 7
SETTINGS = {"trials": 12, "gamma_max": 3, "new_tokens": 19, "confirm": 2, "repeats": 1, "confirm_texts": 2}
WITHOUT_LOOKUP = SETTINGS | {"lookup": False}
SAVINGS = Savings(attention=0.002, mlp=0.0015, head=0.003, vocabulary=0.001)
COSTS = Costs(
    num_layers=LAYERS,
    fixed=0.005,
    layer=0.001,
    attention=0.003,
    mlp=0.002,
    rounds=(0.047,) * 4,
    prefill=0.01,
    compiled=False,
    unpadded=1.25,
    vocabulary=TOKENS,
    vocabulary_saved=0.004,
    formats={INT4.code: SAVINGS, INT8.code: SAVINGS.model_copy(update={"attention": -0.001, "mlp": 0.001})},
)
PROFILE = profile_of(
    COSTS,
    pass_lengths=PassLengths(rows=1, target=[3, 3, 3, 4], draft=2),
    slower_formats={"int4/64": "1.30 of the time of full precision"},
)


@pytest.fixture
def model() -> PreTrainedModel:
    return quantised_models.damped_model("llama")


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", measuring(PROFILE))
    monkeypatch.setattr("selfspec_search.profile.round_costs.CYCLES", 1)


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, TOKENS, (length,), generator=generator) for length in lengths]


CALIBRATION, HELD_OUT = prompts(5, 11, 3, 7), prompts(3, 13, 6, seed=1)


def find(model: PreTrainedModel, **changes: Any) -> SearchResult:
    """A short search without prompt lookup; `changes` are settings."""
    return search(model, CALIBRATION, HELD_OUT, SearchSettings(**WITHOUT_LOOKUP | changes))


TEXTS = [Text(tokens=torch.tensor([7, 7, 7, 5, 5, 2]), prompt=2, allowed=4)]


# --- Savings ---


def test_a_quantised_step_costs_an_unpadded_step_minus_the_savings() -> None:
    skip_set = SkipSet(attn={1, 2}, mlp={2})
    bare = 0.005 + 6 * 0.001 + 5 * 0.003 + 6 * 0.002
    assert COSTS.draft_step(skip_set) == pytest.approx(bare)
    quantised = Quantised(format=INT4, sublayers=QuantisedSet(attn={0, 3, 4}, mlp={5}))
    unpadded = 1.25 * bare - 3 * 0.002 - 0.0015
    assert COSTS.draft_step(DraftSpec(skip_set=skip_set, quantised=quantised)) == pytest.approx(unpadded)
    with_head = Quantised(format=INT4, sublayers=quantised.sublayers, head=True)
    assert COSTS.draft_step(DraftSpec(skip_set=skip_set, quantised=with_head)) == pytest.approx(unpadded - 0.003)
    quarter = SubVocabulary.of(range(TOKENS // 4), TOKENS)
    trimmed = DraftSpec(skip_set=skip_set, quantised=with_head, vocabulary=quarter)
    assert COSTS.draft_step(trimmed) == pytest.approx(unpadded - 0.003 - 0.75 * 0.001)
    own_head = DraftSpec(skip_set=skip_set, quantised=quantised, vocabulary=quarter)
    assert COSTS.draft_step(own_head) == pytest.approx(unpadded - 0.75 * 0.004)
    assert COSTS.draft_step(DraftSpec(vocabulary=quarter)) == pytest.approx(
        COSTS.draft_step(DraftSpec()) - 0.75 * 0.004 / 1.25
    )


def test_savings_larger_than_a_step_leave_a_positive_cost() -> None:
    absurd = COSTS.model_copy(update={"formats": {INT4.code: SAVINGS.model_copy(update={"mlp": 1.0})}})
    assert absurd.draft_step(DraftSpec(quantised=Quantised.everything(INT4, LAYERS))) > 0


UNFITTED = COSTS.model_copy(
    update={"fixed": 0.001, "layer": 0.0, "attention": 0.0005, "mlp": 0.0005, "unpadded": 1.0, "formats": {}}
)
"""Costs of a padded step of 8 ms."""
QUANTISABLE = quantisable_model("llama")
PARTS = ("attention", "MLPs", "head", "everything", "everything, a quarter of the head")


def fit(whole: float, trimmed: float, *parts: float) -> Costs:
    """Costs fitted to milliseconds of the whole model's step, unpadded; with a trimmed head; and of `PARTS` in int4."""
    steps = {"nothing": 8.0, UNPADDED: whole, "a quarter of the head": trimmed}
    steps |= {f"int4/32 {part}": step for part, step in zip(PARTS, parts, strict=True)}
    assert steps.keys() == {"nothing", *quantised_variants(QUANTISABLE, [INT4])}
    fitted = fit_draft_weights(QUANTISABLE, [INT4], {name: step / 1000 for name, step in steps.items()}, UNFITTED)
    return UNFITTED.model_copy(update=fitted)


def test_savings_sum_to_the_saving_of_the_fully_quantised_draft() -> None:
    costs = fit(10.0, 9.4, 8.5, 7.0, 9.5, 4.0, 3.9)  # together 1 ms more than the parts
    assert costs.draft_step(DraftSpec()) == pytest.approx(0.008)
    assert costs.draft_step(DraftSpec(quantised=Quantised.everything(INT4, LAYERS))) == pytest.approx(0.004)
    savings = costs.formats["int4/32"]
    share = 1 / (4.375 + 4.375 + 0.8 - 5)  # of what is left below the costs
    assert 7000 * savings.attention == pytest.approx(1.5 + share * (4.375 - 1.5))
    assert 7000 * savings.mlp == pytest.approx(3.0 + share * (4.375 - 3.0))
    assert 1000 * savings.head == pytest.approx(0.5 + share * (0.8 - 0.5))
    costs = fit(10.0, 9.4, 8.5, 7.0, 9.5, 7.5, 7.5)  # together half of the parts
    assert costs.formats["int4/32"].mlp == pytest.approx(2 * costs.formats["int4/32"].attention)
    assert costs.draft_step(DraftSpec(quantised=Quantised.everything(INT4, LAYERS))) == pytest.approx(0.0075)


STEP = st.floats(1.0, 60.0)


@given(whole=st.floats(7.0, 12.0), trimmed=STEP, parts=st.tuples(STEP, STEP, STEP, STEP, STEP))
@example(whole=7.0, trimmed=6.0, parts=(25.0, 19.0, 1.0, 5.0, 5.0))  # the head "saves" 6 ms of a 7 ms step
@example(whole=8.0, trimmed=7.0, parts=(9.0, 7.5, 7.499, 4.0, 3.0))  # the parts' savings almost sum to zero
@example(whole=8.0, trimmed=9.0, parts=(9.0, 9.0, 9.0, 4.0, 3.0))  # only everything together is faster
def test_noise_never_makes_draft_weights_save_more_than_what_they_replace(
    whole: float, trimmed: float, parts: tuple[float, ...]
) -> None:
    costs = fit(whole, trimmed, *parts)
    savings, unpadded, slack = costs.formats["int4/32"], costs.unpadded, 1e-12
    assert -slack <= savings.attention <= unpadded * 0.0005 + slack
    assert -slack <= savings.mlp <= unpadded * 0.0005 + slack
    head = min(max(0.0, (whole - trimmed) / 750), unpadded * 0.001)
    assert costs.vocabulary_saved == pytest.approx(head)
    assert min(savings.head, savings.vocabulary) >= -slack
    assert savings.head + savings.vocabulary <= head + slack
    step, least = unpadded * 0.008, unpadded * 0.001 - head  # of the least, embedding and launches are left
    measured = step - (whole - parts[3]) / 1000
    everything = costs.draft_step(DraftSpec(quantised=Quantised.everything(INT4, LAYERS)))
    floor = 0.02 * 0.008  # of any draft step
    assert everything == pytest.approx(max(floor, least, min(measured, step)))


# --- Padding ---

NO_PADDING = PassLengths(rows=3, target=[])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of a timed call are what the call returns."""
    monkeypatch.setattr("selfspec_search.profile.pass_lengths.timed_task", lambda call, device: call)


def repeating(*seconds: float) -> Callable[[], float]:
    return cycle(seconds).__next__


@pytest.mark.parametrize(
    ("seconds", "suggested"),
    [
        ({1: 1.4, 2: 1.1, 3: 1.0, 4: 1.2}, {1: 3, 2: 3}),
        ({1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}, {}),
        ({1: 1.0, 2: 0.99, 3: 0.98, 4: 0.97}, {}),
        ({1: 1.4, 3: 1.0, 4: 1.2}, {1: 3}),
    ],
    ids=["faster", "slower", "noise", "unmeasured"],
)
def test_paddings_are_suggested_if_longer_passes_are_faster(
    seconds: dict[int, float], suggested: dict[int, int]
) -> None:
    assert suggested_lengths(seconds) == suggested


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("unpadded", "padded", "gain"),
    [
        ([1.4, 1.5, 1.3], [1.05, 1.1, 1.0], 1.4 / 1.05),
        ([9.8, 1.4, 1.4], [7.0, 1.0, 1.0], 1.4),
        ([1.0], [1.0], None),
        ([1.02], [1.0], None),
        ([1.0, 1.4, 1.2, 0.9], [1.1, 1.0, 1.3, 1.0], None),
        ([1.0], [1.4], None),
    ],
    ids=["faster", "faster beside other work", "equal", "2 % faster", "as often slower", "slower"],
)
def test_a_padding_is_adopted_only_if_new_paired_timings_show_a_gain_beyond_the_noise(
    unpadded: list[float], padded: list[float], gain: float | None
) -> None:
    rounds = {0: repeating(*unpadded), 1: repeating(1.2), 2: repeating(*padded)}
    found = target_padding(NO_PADDING, rounds, {0: 1.4, 1: 1.01, 2: 1.0}, torch.device("cpu"))  # these suggest 1 to 3
    assert (found.rows, found.draft) == (3, 1)
    assert found.target == ([3, 2, 3] if gain else [1, 2, 3])
    if gain is None:
        assert found.gains is None
    else:
        value, low, high = found.gains["target 1"]
        assert value == pytest.approx(gain, abs=1e-4)
        assert 1 < low <= value <= high


def test_quantised_drafts_are_unpadded() -> None:
    lengths = PassLengths(rows=1, target=[3, 2], draft=2, gains={"target 1": [1.2, 1.1, 1.3], "draft": [1.4, 1.3, 1.5]})
    assert pass_lengths_of(DraftSpec(skip_set=SkipSet(attn={1})), lengths) == lengths
    unpadded = PassLengths(rows=1, target=[3, 2], gains={"target 1": [1.2, 1.1, 1.3]})
    assert pass_lengths_of(DraftSpec(quantised=Quantised.everything(INT4, LAYERS)), lengths) == unpadded


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("unpadded", "draft"), [(1.2, 2), (1.03, 1)])
def test_draft_passes_are_padded_by_the_same_rule(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, unpadded: float, draft: int
) -> None:
    runtime = Runtime(model)
    runtime.reserve(1, 13)
    seconds = {1: unpadded, 2: 1.0, 3: 1.1}
    monkeypatch.setattr(TimedCalls, "draft", lambda *_: lambda: seconds[runtime.passes.lengths.draft])
    monkeypatch.setattr("selfspec_search.profile.pass_lengths.median_seconds", lambda *_, **__: {1: 1.4, 2: 1.0})
    found = draft_padding(runtime, TimedCalls(torch.tensor([[3, 5]])))
    assert (found.draft, found.target) == (draft, [])
    assert found.gains == ({"draft": [1.2] * 3} if draft > 1 else None)
    assert target_padding(found, {0: repeating(1.0)}, {0: 1.0}, torch.device("cpu")) == found.model_copy(
        update={"target": [1]}
    )


# --- The space ---


def test_only_faster_choices_are_offered(model: PreTrainedModel) -> None:
    space = build_space(model, PROFILE, TEXTS, "both")
    every = set(range(LAYERS))
    assert space.formats[INT4.code] == QuantisedSet(attn=every, mlp=every)
    assert space.formats[INT8.code] == QuantisedSet(mlp=every), "attention is slower in int8"
    assert build_space(model, PROFILE, TEXTS, "skip").choices["attn_0"] == ["keep", "skip"]
    assert build_space(model, PROFILE, TEXTS, "quantised").choices["attn_0"] == ["keep", "quantise"]


def test_only_skips_are_offered_if_no_format_is_faster(model: PreTrainedModel) -> None:
    nothing = PROFILE.model_copy(update={"costs": (COSTS.model_copy(update={"formats": {}}),)})
    space = build_space(model, nothing, TEXTS, "both")
    assert all(choices == ["keep", "skip"] for choices in space.choices.values())
    with pytest.raises(InputError, match=r"no quantised draft is faster here \(int4 .* 64: 1.30 of the.*--draft skip"):
        build_space(model, nothing, TEXTS, "quantised")


def test_a_format_is_offered_for_the_head_alone(model: PreTrainedModel) -> None:
    by_head = {INT8.code: SAVINGS.model_copy(update={"attention": -0.001, "mlp": -0.001})}
    profile = PROFILE.model_copy(update={"costs": (COSTS.model_copy(update={"formats": by_head}),)})
    space = build_space(model, profile, TEXTS, "both")
    assert space.choices["attn_0"] == ["keep", "skip"]
    first = next(space.seeds())
    assert first.quantised == Quantised(format=INT8, head=True)
    assert space.from_params(space.to_params(first)) == first
    nothing = {INT8.code: by_head[INT8.code].model_copy(update={"head": -0.001})}
    profile = profile.model_copy(
        update={"costs": (COSTS.model_copy(update={"formats": nothing}),), "slower_formats": {}}
    )
    with pytest.raises(InputError, match="neither a sub-layer nor the head gains"):
        build_space(model, profile, TEXTS, "quantised")


def test_trimmed_heads_keep_the_frequent_tokens_of_the_texts(model: PreTrainedModel) -> None:
    assert frequent_tokens(TEXTS, TOKENS)[:5] == [7, 5, 2, 0, 1]
    heads = build_space(model, PROFILE, TEXTS, "both").heads
    assert list(heads) == [OWN_HEAD, "quantised", "quantised, 128 tokens"]
    kept = heads["quantised, 128 tokens"].vocabulary
    assert {2, 5, 7} < set(kept.tokens)
    assert len(kept) == 128


def test_limits_compare_cost_and_memory(model: PreTrainedModel) -> None:
    prices = Prices(costs=COSTS)
    small, large = (DraftSpec(quantised=Quantised(format=INT4, sublayers=QuantisedSet(mlp=m))) for m in ({0}, range(7)))
    taken = {small: 500, large: 3000, DraftSpec(): 0}
    limits = Limits(memory=1000, bytes_of=lambda draft_spec: taken[draft_spec])
    feasible = [limits.check(draft_spec, prices).is_feasible for draft_spec in (DraftSpec(), small, large)]
    assert feasible == [True, True, False]
    assert limits.check(large, prices).excess == {"draft_memory": 2.0}
    assert limits.check(small, prices).draft_bytes == 500
    unknown = Prices(costs=COSTS.model_copy(update={"formats": {}}))
    assert not Limits().check(small, unknown).is_feasible, "a draft without a cost is not feasible"


def test_the_most_draft_weight_bytes_are_those_of_all_formats(model: PreTrainedModel) -> None:
    both = sum(
        draft_bytes(model, quantised_models.drafting(format).model_copy(update={"skip_set": SkipSet(), "quantised": q}))
        for format in (INT8, INT4)
        for q in [Quantised.everything(format, LAYERS)]
    )
    assert most_draft_weight_bytes(model, FORMATS) == both


# --- Searching ---


@pytest.mark.usefixtures("profiled")
def test_quantised_rounds_are_equal_in_replay_and_decoding(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "plan.db")
    result = find(model, storage=storage, draft="quantised")
    assert result.rounds_equal
    assert result.differing_texts == 0
    assert all(not confirmed.prediction.skip_set for confirmed in result.confirmed)
    assert any(confirmed.draft_bytes > 0 for confirmed in result.confirmed)
    study = load_study(storage)
    assert study.trials[0].draft_spec == study.space.quantised(INT4.code), "the fully quantised draft is tried first"
    assert {trial.draft_spec.format for trial in study.trials} >= {INT4, INT8}
    assert all(trial.record["draft_bytes"] > 0 for trial in study.trials if trial.draft_spec.quantised)
    plan = result.confirmed[0].prediction.plan
    spec, given = wrap(model, plan), HELD_OUT[0][None]
    expected = model.generate(given, max_new_tokens=17, do_sample=False)
    assert torch.equal(spec.generate(given, max_new_tokens=17, do_sample=False), expected)


@pytest.mark.usefixtures("profiled")
@pytest.mark.slow
def test_drafts_that_quantise_and_skip_are_stored_and_repicked(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "plan.db")
    given = DraftSpec(skip_set=SkipSet(attn={3}), quantised=Quantised(format=INT4, sublayers=QuantisedSet(mlp={1, 3})))
    find(model, storage=storage, start_from=[given], trials=16)
    trials = load_study(storage).trials
    assert trials[0].draft_spec == given
    assert any(trial.draft_spec.quantised and trial.draft_spec.skip_set for trial in trials[1:])
    again = find(model, storage=storage, start_from=[given], trials=19)
    draft_specs = [trial.draft_spec for trial in load_study(storage).trials]
    assert len(draft_specs) == len(set(draft_specs)) == 19
    assert again.trials_complete + again.trials_pruned == 19
    picked = repick(model, load_study(storage), SearchSettings(**WITHOUT_LOOKUP))
    assert {c.prediction.draft_spec for c in picked.confirmed} == {c.prediction.draft_spec for c in again.confirmed}


@pytest.mark.usefixtures("profiled")
def test_no_draft_above_the_memory_limit_is_chosen(model: PreTrainedModel) -> None:
    whole = most_draft_weight_bytes(model, [INT4])
    result = find(model, draft_memory=whole // 3)
    assert all(confirmed.draft_bytes <= whole // 3 for confirmed in result.confirmed)
    with pytest.raises(InputError, match=r"no draft that was tried takes at most 1 B of memory; raise draft_memory"):
        find(model, draft="quantised", draft_memory=1)


@pytest.mark.usefixtures("profiled")
def test_repick_says_why_no_trial_can_be_used(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path / "plan.db")
    find(model, trials=2, draft="quantised", storage=storage)
    study = load_study(storage)
    with pytest.raises(InputError, match="none is within draft_memory; raise the limit"):
        repick(model, study, SearchSettings(draft_memory=1))
    slow = PROFILE.model_copy(update={"costs": (COSTS.model_copy(update={"formats": {}}),)})
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *args, **kwargs: slow)
    with pytest.raises(InputError, match=r"their formats are no faster \(int4 .* 64: 1.30 .*\); search on this device"):
        repick(model, study, SearchSettings())


@pytest.mark.usefixtures("profiled")
def test_the_report_shows_what_is_quantised(model: PreTrainedModel, tmp_path: Path) -> None:
    storage = str(tmp_path / "plan.db")
    find(model, storage=storage, draft="quantised")
    html = make_page(read_source(storage)).html
    assert 'class="quantise"' in html
    assert "in int4" in html or "in int8" in html
