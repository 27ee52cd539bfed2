"""The profile: measured on a tiny model, written, read, and interpolated."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from models import ENDS_SKIPPED, LAYERS, VOCABULARY, tiny_model
from selfspec_search.profile.costs import Costs, at_another_context, fit_costs, fit_step, variants
from selfspec_search.profile.profile import Profile, ProfileSettings, default_contexts, measure
from selfspec_search.profile.subject import costs_at, round_lengths
from selfspec_search.profile.timing import STEPS
from selfspec_search.replay.sampling_settings import Sampling
from transformers import PreTrainedModel, TopKLogitsWarper

from selfspec import InputError, SkipSet
from selfspec.runtime.runtime import Runtime

ATTENTION = 2  # index of attention in a fit


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 2)


def costs(*, scale: float = 1.0, compiled: bool = False) -> Costs:
    return Costs(
        num_layers=LAYERS,
        fixed=0.5 * scale,
        layer=0.1 * scale,
        attention=0.3 * scale,
        mlp=0.2 * scale,
        rounds=(1.0 * scale, 2.0 * scale, 5.0 * scale),
        prefill=11.0 * scale,
        lookup=0.03 * scale,
        compiled=compiled,
        measured={"nothing": 4.7 * scale},
    )


def profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "device": "cpu",
        "threads": 3,
        "dtype": "bfloat16",
        "rows": 5,
        "compiled": False,
        "backend": "sdpa",
        "num_layers": LAYERS,
        "gamma_max": 2,
        "versions": {"torch": "2.13"},
        "contexts": (7, 17, 97),
        "costs": (costs(), costs(scale=1 / 3), costs(scale=3.0)),
    }
    return Profile(**fields | changes)


def numbers(costs: Costs) -> list[float]:
    return [value for _, value in costs if isinstance(value, float)] + list(costs.rounds)


# --- Measuring ---


def test_at_every_context_the_cost_of_a_full_step_is_the_measured_step(model: PreTrainedModel) -> None:
    cycles: list[tuple[int, int]] = []
    measured = measure(model, gamma_max=3, contexts=(61, 5, 29), on_cycle=lambda *cycle: cycles.append(cycle))
    assert cycles == [(0, 2), (1, 2), (2, 2)]
    assert measured.contexts == (5, 29, 61)
    assert (measured.rows, measured.backend, measured.dtype, measured.device) == (1, "sdpa", "float32", "cpu")
    for here in measured.costs:
        assert here.draft_step(SkipSet()) == pytest.approx(here.measured["nothing"])
        assert here.draft_step(SkipSet()) >= here.draft_step(ENDS_SKIPPED) > 0
        assert len(here.rounds) == 4
        assert min(*here.rounds, here.prefill, here.lookup) > 0
    assert Profile.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Runtime, int, tuple[Any, ...]]]:
    """Records each pass: the runtime, the least length in its cache, and (view, rows, tokens)."""
    recorded, plain = [], Runtime.run

    def run(self: Runtime, view: Any, tokens: torch.Tensor) -> torch.Tensor:
        recorded.append((self, int(self.cache.lengths.min()), (view, *tokens.shape)))
        return plain(self, view, tokens)

    monkeypatch.setattr(Runtime, "run", run)
    return recorded


def test_several_rows_are_measured_together(model: PreTrainedModel, passes: list[Any]) -> None:
    assert measure(model, gamma_max=2, contexts=[11], settings=ProfileSettings(rows=3)).rows == 3
    assert all(length >= 11 for _, length, _ in passes)
    assert {shape for _, _, shape in passes} == {("draft", 3, 1), *(("target", 3, t) for t in (1, 2, 3))}


def test_all_variants_share_one_cache_and_do_not_change_the_users_model(
    model: PreTrainedModel, passes: list[Any]
) -> None:
    tokens = torch.arange(1, 24)[None]
    before = model(tokens).logits
    measure(model, gamma_max=1, contexts=[5])
    runtimes = {runtime for runtime, _, _ in passes}
    assert len(runtimes) == len(variants(LAYERS)) + 1, "the variants, and the unpadded runtime"
    assert len({runtime.cache for runtime in runtimes}) == 1
    assert torch.equal(model(tokens).logits, before)


def test_steps_and_rounds_for_sampling_are_measured_with_processors(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = set(), TopKLogitsWarper.__call__

    def recorded(self: TopKLogitsWarper, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.add(len(scores))
        return plain(self, tokens, scores)

    monkeypatch.setattr(TopKLogitsWarper, "__call__", recorded)
    assert measure(model, gamma_max=2, contexts=[5]).sampling == {}
    assert not seen
    sampling = ProfileSettings(sampling=Sampling(do_sample=True, top_k=7))
    measured = measure(model, gamma_max=2, contexts=[5], settings=sampling)
    assert measured.sampling == {"do_sample": True, "top_k": 7}
    assert measured.conditions.endswith(", sampling")
    assert seen == {1, 2, 3}  # a step, and rounds over one and two drafted tokens


def test_the_default_context_is_the_median_prompt(model: PreTrainedModel) -> None:
    prompts = [torch.randint(1, VOCABULARY, (length,)) for length in (3, 31, 13)]
    assert measure(model, prompts, gamma_max=1).contexts == (12,)
    assert measure(model, [torch.tensor([5])], gamma_max=1).contexts == (1,)


def test_default_contexts_leave_room_for_a_round() -> None:
    assert default_contexts(None, 8) == [128, 512, 2048]
    assert default_contexts(1024, 8) == [128, 512, 1015]
    assert default_contexts(97, 8) == [88]
    assert default_contexts(5, 8) == [1]


@pytest.mark.parametrize(
    ("contexts", "rows", "message"),
    [
        ([0, 5], 1, "a context of 0 tokens was given, but it must be at least 1"),
        ([512], 1, "positions end at 512; give at most 511"),
        ([5], 0, "rows is 0, but it must be at least 1"),
    ],
)
def test_contexts_and_rows_that_cannot_be_measured_are_refused(
    model: PreTrainedModel, contexts: list[int], rows: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(model, gamma_max=1, contexts=contexts, settings=ProfileSettings(rows=rows))


# --- Files ---


@pytest.mark.parametrize(
    "changes",
    [
        {"contexts": (7, 17)},
        {"contexts": (17, 7, 97)},
        {"gamma_max": 3},
        {"num_layers": LAYERS + 1},
        {"compiled": True},
        {"rows": 0},
        {"colour": "red"},
    ],
)
def test_an_inconsistent_profile_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"not a profile of this release: .*; measure again"):
        Profile.from_dict(profile().to_dict() | changes)


def test_a_profile_with_negative_costs_is_refused() -> None:
    data = profile().to_dict()
    data["costs"][1]["mlp"] = -1e-9
    with pytest.raises(InputError, match=r"costs\.1\.mlp"):
        Profile.from_dict(data)


# --- Interpolating ---


def test_costs_are_linear_between_contexts_and_constant_beyond_them() -> None:
    low, middle, high = profile().costs
    assert profile().at(17) == middle
    assert profile().at(1) == profile().at(7) == low
    assert profile().at(97) == profile().at(10**6) == high
    between = profile().at(37)  # a quarter of the way
    expected = 0.75 * np.array(numbers(middle)) + 0.25 * np.array(numbers(high))
    assert numbers(between) == pytest.approx(expected)
    low_step, high_step = middle.draft_step(ENDS_SKIPPED), high.draft_step(ENDS_SKIPPED)
    assert between.draft_step(ENDS_SKIPPED) == pytest.approx(0.75 * low_step + 0.25 * high_step)
    assert between.measured == {}


def test_a_profile_of_one_context_holds_everywhere() -> None:
    single = profile(contexts=(7,), costs=(costs(),))
    assert single.at(1) == single.at(7) == single.at(1000) == costs()


# --- Fitting ---


def timed(context: int, seconds: Costs, lengths: list[int], *, whole: bool) -> dict[tuple[int, Any], float]:
    """The timings that would give these costs."""
    skip_sets = variants(LAYERS) if whole else {"nothing": SkipSet()}
    calls: dict[Any, float] = {name: STEPS * seconds.draft_step(skip_set) for name, skip_set in skip_sets.items()}
    calls |= {n: STEPS * seconds.rounds[n] for n in lengths}
    calls |= {"prefill": seconds.prefill, "lookup": STEPS * seconds.lookup}
    return {(context, name): value for name, value in calls.items()}


def test_attention_and_rounds_at_other_contexts_follow_from_the_few_timings_there() -> None:
    here = costs().model_copy(update={"rounds": (1.0, 2.0, 5.0, 6.0, 7.0)})
    changes = {"attention": 0.4, "rounds": (2.0, 4.0, 10.0, 15.0, 21.0), "prefill": 23.0, "lookup": 0.05}
    there = here.model_copy(update=changes)
    seen = timed(13, here, [0, 1, 2, 3, 4], whole=True) | timed(29, there, [0, 1, 2, 4], whole=False)
    first, second = costs_at([13, 29], 13, seen, LAYERS, compiled=False)
    assert numbers(first) == pytest.approx(numbers(here))
    assert numbers(second) == pytest.approx(numbers(there))
    assert second.measured == pytest.approx({"nothing": there.draft_step(SkipSet())})


def test_all_costs_shrink_if_a_step_is_shorter_than_the_costs_without_attention() -> None:
    steps = {name: costs().draft_step(skip_set) for name, skip_set in variants(LAYERS).items()}
    fitted = fit_step(LAYERS, steps)
    shrunk = at_another_context(fitted, 1.3, LAYERS)
    assert shrunk[ATTENTION] == 0
    assert shrunk @ [1, LAYERS, LAYERS, LAYERS] == pytest.approx(1.3)
    assert shrunk[0] / shrunk[1] == pytest.approx(5)


def test_a_fit_recovers_costs_and_is_never_negative() -> None:
    counts = np.array([[1, 7, 7, 7], [1, 2, 2, 2], [1, 7, 0, 7], [1, 7, 7, 0], [1, 7, 3, 7]], dtype=float)
    costs = np.array([0.5, 0.1, 0.3, 0.2])
    assert fit_costs(counts, counts @ costs) == pytest.approx(costs)
    free = np.array([0.0, 0.1, 0.3, 0.2])
    assert (fit_costs(counts, counts @ free * [1.0, 0.9, 1.0, 1.0, 1.0]) >= 0).all()


def test_few_round_lengths_are_measured_if_rounds_are_long_or_compiled() -> None:
    assert round_lengths(8, sparse=False) == list(range(9))
    assert round_lengths(23, sparse=False) == [*range(9), 12, 16, 20, 23]
    assert round_lengths(11, sparse=True) == [0, 1, 2, 4, 8, 11]
    assert round_lengths(23, sparse=True) == [0, 1, 2, 4, 8, 16, 23]
    assert round_lengths(1, sparse=True) == [0, 1]
