"""The published methods: dynamic programmes against brute force, and properties of every method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import selection
import torch
from methods import draft_verify as draft_verify_module
from methods import swift as swift_module
from methods.bill import Bill
from methods.clasp import BOTH, growing
from methods.clasp import run_programme as clasp_programme
from methods.context import RATIOS, Candidate, Context, Selection, Stopwatch
from methods.draft_verify import LONGEST_DRAFT, AdaptiveExit, decode_row
from methods.fixed import evenly
from methods.gaussian_process import GaussianProcess
from methods.judging import OURS, best_of_each, enter, predicted_speedup, verdict
from methods.knapspec import ends, weights
from methods.knapspec import run_programme as knapspec_programme
from methods.programme import Way, best_ways
from methods.published import METHODS
from methods.windows import Stack, WindowPass, Windows
from models import ENDS_SKIPPED, LAYERS, VOCABULARY, damped_model
from profiles import costs_of
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.texts import Text, write_texts
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec import InputError
from selfspec.decoding.drafter import NoDrafter
from selfspec.models.draft_view import draft_view
from selfspec.plan.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime

COSTS = costs_of(attention=0.0055, mlp=0.0015)
"""Skipping an attention saves 6 ms, skipping an MLP 2 ms: weights 3 and 1."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


@pytest.fixture(scope="module")
def texts(model: PreTrainedModel) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (5, 11, 2, 7)]
    # Texts longer and shorter than a window of 32 tokens.
    written = {**dict(write_texts(Runtime(model), prompts[:2], 41))}
    written |= {index + 2: text for index, text in write_texts(Runtime(model), prompts[2:], 19)}
    return [written[index] for index in range(4)]


@pytest.fixture
def context(model: PreTrainedModel, texts: list[Text]) -> Context:
    return Context(model=model, texts=texts, costs=COSTS)


@pytest.fixture
def windows(context: Context) -> Windows:
    return Windows.of(context.model, context.texts)


# --- The dynamic programme ---

ANGLES = (0.31, 0.07, 0.23, 0.11, 0.05, 0.29, 0.13)


def turn(angle: float, states: Tensor) -> Tensor:
    rotation = states.new_tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return states @ rotation


def ways_to_turn(angles: Sequence[float], weights: Sequence[int], **options: Any) -> dict[int, Way]:
    """The best ways to skip rotations in a plane: the angle to the target is the sum of the skipped angles."""
    start = states = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    targets = [states := turn(angle, states) for angle in angles]
    return best_ways(
        start,
        targets,
        lambda step, states: turn(angles[step], states),
        weights,
        similarity=lambda one, other: float(nn.functional.cosine_similarity(one, other).mean()),
        **options,
    )


def brute_force(weights: tuple[int, ...], kept: tuple[int, ...]) -> dict[int, float]:
    """The largest cosine by skipped weight, over all subsets of rotations that may be skipped."""
    best: dict[int, float] = {}
    for bits in product(*((0,) if step in kept else (0, 1) for step in range(len(ANGLES)))):
        saved = sum(weight for bit, weight in zip(bits, weights, strict=True) if bit)
        lost = sum(angle for bit, angle in zip(bits, ANGLES, strict=True) if bit)
        best[saved] = max(best.get(saved, -1.0), math.cos(lost))
    return best


@pytest.mark.parametrize("weights", [(1,) * 7, (3, 1, 3, 1, 3, 1, 3), (2, 5, 1, 4, 3, 1, 2)])
@pytest.mark.parametrize("kept", [(), (0, 6)])
def test_the_programme_equals_brute_force_if_losses_add_up(weights: tuple[int, ...], kept: tuple[int, ...]) -> None:
    ways, expected = ways_to_turn(ANGLES, weights, kept=kept), brute_force(weights, kept)
    assert set(ways) == set(expected)
    for saved, way in ways.items():
        assert way.similarity == pytest.approx(expected[saved], abs=1e-9)
        assert sum(weights[step] for step in way.skipped) == saved
        assert math.cos(sum(ANGLES[step] for step in way.skipped)) == pytest.approx(way.similarity, abs=1e-9)


def test_ways_below_the_floor_of_similarity_are_dropped() -> None:
    ways = ways_to_turn((0.4, 0.8), (1, 1), floor=0.9)
    assert {saved: way.skipped for saved, way in ways.items()} == {0: (), 1: (0,)}


def test_clasp_is_near_the_best_of_all_sets_of_layers(context: Context, windows: Windows) -> None:
    stack = Stack(context.model, windows, alone=True)

    def last(skipped: tuple[int, ...]) -> Tensor:
        states = stack.embedded()
        for layer in range(LAYERS):
            states = states if layer in skipped else stack.run(layer, BOTH, states)
        return states[windows.counted]

    target = last(())
    by_count: dict[int, list[float]] = {}
    for bits in product((False, True), repeat=LAYERS):
        skipped = tuple(layer for layer in range(LAYERS) if bits[layer])
        cosine = nn.functional.cosine_similarity(last(skipped), target, dim=-1).mean()
        by_count.setdefault(len(skipped), []).append(float(cosine))
    ways = clasp_programme(context, len(context.texts))
    assert set(ways) == set(range(LAYERS + 1))
    for count, way in ways.items():
        assert len(way.skipped) == count
        assert way.similarity <= max(by_count[count]) + 1e-5
        assert way.similarity >= np.quantile(by_count[count], 0.75) - 1e-5


def test_knapsack_weights_are_the_savings_of_sublayers(context: Context, windows: Windows) -> None:
    assert weights(context) == [3, 1] * LAYERS
    for saved, skip_set in knapspec_programme(context, windows).items():
        assert 3 * len(skip_set.attn) + len(skip_set.mlp) == saved


def test_knapspec_offers_skip_sets_with_and_without_the_first_and_last_layer(
    context: Context, windows: Windows
) -> None:
    free, kept = knapspec_programme(context, windows), knapspec_programme(context, windows, ends(context))
    outer = {0, LAYERS - 1}
    assert any(outer & (skip_set.attn | skip_set.mlp) for skip_set in free.values())
    assert not any(outer & (skip_set.attn | skip_set.mlp) for skip_set in kept.values())
    assert set(kept.values()) - set(free.values()), "the free programme drops some skip sets that keep both"
    offered = [candidate.skip_set for candidate in METHODS["KnapSpec"](context, 600.0, 0).offered]
    assert set(offered) == {*free.values(), *kept.values()} - {SkipSet()}
    assert len(offered) == len(set(offered))


# --- Windows ---


@pytest.mark.parametrize("alone", [True, False])
def test_running_single_sublayers_equals_the_draft(context: Context, windows: Windows, alone: bool) -> None:
    stack, draft = Stack(context.model, windows, alone=alone), draft_view(context.model, ENDS_SKIPPED)
    states = stack.embedded()
    for layer in range(LAYERS):
        for kind, skipped in (("attn", ENDS_SKIPPED.attn), ("mlp", ENDS_SKIPPED.mlp)):
            states = states if layer in skipped else stack.run(layer, [kind], states)
    with torch.inference_mode():
        step = WindowPass(windows, alone=alone)
        whole = draft.get_decoder()(
            input_ids=windows.tokens, position_ids=windows.positions, use_cache=False, selfspec_pass=step
        )
        ours = draft.get_decoder().norm(states)
    torch.testing.assert_close(ours, whole.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_draft_that_skips_nothing_agrees_with_the_target_everywhere(context: Context, windows: Windows) -> None:
    assert windows.counted.sum(dim=1).tolist() == [32, 32, 19, 19]
    view = draft_view(context.model, SkipSet())
    assert windows.agreement(view, SkipSet()) == 1.0
    assert 0.1 < windows.agreement(view, ENDS_SKIPPED) < 0.95


# --- Gaussian process ---


def test_a_gaussian_process_fits_its_points_and_is_uncertain_far_away() -> None:
    random = np.random.default_rng(0)
    points = (random.random((23, 11)) < 0.5).astype(float)
    values = 5 + points[:, 0] - 2 * points[:, 3]
    process = GaussianProcess.fit(points, values)
    mean, deviation = process.predict(points)
    assert np.abs(mean - values).max() < 0.2
    assert process.predict(np.full((1, 11), 9.0))[1][0] > 3 * deviation.max()
    better, worse = points[0].copy(), points[0].copy()
    better[[0, 3]], worse[[0, 3]] = (1, 0), (0, 1)
    (high, low), _ = process.predict(np.stack([better, worse]))
    assert high > low + 1


def test_a_gaussian_process_accepts_equal_values() -> None:
    process = GaussianProcess.fit(np.eye(3), np.full(3, 2.0))
    assert process.predict(np.eye(3))[0] == pytest.approx([2.0] * 3)


# --- Methods ---


class Quick(dict[SkipSet, float]):
    """Deterministic decoding speeds: skipping attention is faster, skipping MLPs is slower."""

    def __call__(self, runtime: Runtime, skip_set: SkipSet, prompts: list[Tensor]) -> float:
        self[skip_set] = 10.0 + 2 * len(skip_set.attn) - len(skip_set.mlp)
        return self[skip_set]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Quick:
    monkeypatch.setattr(swift_module, "MOST_SETS", 30)
    monkeypatch.setattr(swift_module, "PROPOSALS", 101)
    monkeypatch.setattr(draft_verify_module, "PROPOSALS", 101)
    speeds = Quick()
    monkeypatch.setattr(draft_verify_module, "speed", speeds)
    ticks = iter(range(10**6))
    monkeypatch.setattr("methods.context.perf_counter", lambda: next(ticks))
    return speeds


@pytest.mark.parametrize("name", METHODS)
def test_every_method_offers_valid_skip_sets_without_any_time(context: Context, name: str) -> None:
    selection = METHODS[name](context, 0.0, 0)
    assert selection.offered
    for candidate in selection.offered:
        assert candidate.skip_set
        candidate.skip_set.validate(LAYERS)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_skip_sets(context: Context, name: str, quick: Quick) -> None:
    first, again = (METHODS[name](context, 40.0, 3) for _ in range(2))
    assert first == again


def test_another_seed_tries_other_skip_sets(context: Context, quick: Quick) -> None:
    assert METHODS["SWIFT"](context, 40.0, 3) != METHODS["SWIFT"](context, 40.0, 4)
    METHODS["Draft & Verify"](context, 40.0, 3)
    tried = set(quick)
    quick.clear()
    METHODS["Draft & Verify"](context, 40.0, 4)
    assert tried != set(quick)


def test_swift_keeps_its_ratio_and_never_skips_the_first_and_last_layer(context: Context, quick: Quick) -> None:
    selection = METHODS["SWIFT"](context, 600.0, 0)
    assert selection.tried == len(RATIOS) * 30  # MOST_SETS of each
    assert [candidate.ratio for candidate in selection.offered] == list(RATIOS)
    for candidate, ratio in zip(selection.offered, RATIOS, strict=True):
        assert len(candidate.skip_set) == int(ratio * 2 * (LAYERS - 2))
        assert not {0, LAYERS - 1} & (candidate.skip_set.attn | candidate.skip_set.mlp)


def test_swift_agrees_more_after_more_trials(
    context: Context, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = draft_view(context.model, SkipSet())

    def agreement(most: int) -> float:
        monkeypatch.setattr(swift_module, "MOST_SETS", most)
        found = METHODS["SWIFT"](context, 600.0, 0).offered
        return float(np.mean([windows.agreement(view, candidate.skip_set) for candidate in found]))

    assert agreement(55) > agreement(1) + 0.02


def test_draft_and_verify_offers_its_two_fastest_skip_sets(context: Context, quick: Quick) -> None:
    selection = METHODS["Draft & Verify"](context, 60.0, 0)
    assert selection.tried == len(quick) > 30  # no skip set twice
    assert [quick[candidate.skip_set] for candidate in selection.offered] == sorted(quick.values())[:-3:-1]
    # One in a million random skip sets is as fast, so the process must have found the direction.
    assert max(quick.values()) >= 10 + 2 * LAYERS - 2


def test_clasp_offers_every_number_of_layers(context: Context) -> None:
    offered = METHODS["CLaSp"](context, 600.0, 0).offered
    assert [(len(candidate.skip_set.attn), candidate.ratio) for candidate in offered] == [
        (count, count / LAYERS) for count in range(1, LAYERS + 1)
    ]


def test_decoding_with_an_adaptive_exit_is_lossless(model: PreTrainedModel) -> None:
    runtime = Runtime(model, ENDS_SKIPPED)
    drafter = AdaptiveExit(runtime)
    threshold = drafter.threshold
    prompt = torch.randint(1, VOCABULARY, (7,))
    ours, stats = decode_row(runtime, drafter, prompt, 43)
    plain, _ = decode_row(Runtime(model), NoDrafter(), prompt, 43)
    assert torch.equal(ours, plain)
    assert stats.drafted > 0
    assert drafter.threshold != threshold


def test_the_exit_threshold_follows_the_acceptance_rate(model: PreTrainedModel) -> None:
    drafter, thresholds = AdaptiveExit(Runtime(model)), []
    # The acceptance rate is 0, 1/2, 3/4, 7/8, then 15/16 > 0.9. A draft of full length does not lower the threshold.
    for drafted, accepted in [(3, 3), (3, 3), (3, 3), (3, 3), (LONGEST_DRAFT, LONGEST_DRAFT), (3, 0)]:
        before = drafter.threshold
        drafter.learn(drafted, accepted)
        thresholds.append(round((drafter.threshold - before) / 0.001))
    assert thresholds == [1, 1, 1, -1, 0, 1]


def test_every_prompt_begins_with_the_first_exit_threshold(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[float] = []

    def decode(runtime: Runtime, drafter: AdaptiveExit, prompt: Tensor, new_tokens: int) -> tuple[Tensor, None]:
        first.append(drafter.threshold)
        drafter.learn(3, 0)
        return prompt, None

    monkeypatch.setattr(draft_verify_module, "decode_row", decode)
    draft_verify_module.speed(Runtime(context.model), ENDS_SKIPPED, context.prompts)
    assert first == [draft_verify_module.FIRST_THRESHOLD] * len(context.prompts)


# --- Small parts ---


def test_a_stopwatch_allows_steps_that_fit_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0.0, 2.0, 3.0, 6.0, 7.5])
    monkeypatch.setattr("methods.context.perf_counter", lambda: next(times))
    watch = Stopwatch(10.0)
    assert watch.allows_another()  # 2 s gone, the slowest step took 2
    assert watch.allows_another(times=3)
    assert watch.allows_another()  # 6 s gone, the slowest took 3
    assert not watch.allows_another()


BILL = Bill(texts=7.0, profile=11.0, recording=1.0, confirmation=23.0)


def test_a_budget_that_cannot_hold_a_search_is_refused_with_the_least_budget() -> None:
    assert BILL.left_of(56.0) == 56 - 7 - 11 - 1 - 23
    with pytest.raises(InputError, match=r"cannot hold our search.*about 42 s here; give --budget 56 or more"):
        BILL.left_of(55.5)


def test_a_budget_that_is_too_small_is_refused_before_any_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "prepare", lambda path, options: SimpleNamespace(bill=BILL))  # no other attribute
    with pytest.raises(InputError, match="give --budget 56 or more"):
        selection.main(["--model", "plain", "--budget", "1"])


def test_evenly_and_growing_take_the_expected_items() -> None:
    assert evenly(range(1, 14), 6) == [2, 4, 6, 8, 10, 12]
    assert evenly(range(5), 9) == [0, 1, 2, 3, 4]
    assert evenly(range(7), 1) == [3]
    assert list(growing(11)) == [1, 2, 4, 8, 11]
    assert list(growing(1)) == [1]


@pytest.mark.parametrize("budget", [80.0, 320.0])
def test_swift_gives_all_ratios_equal_shares_of_its_budget(
    context: Context, quick: Quick, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    monkeypatch.setattr(swift_module, "BAYES_EVERY", 10**9)
    sizes: list[int] = []

    def agreement(windows: Windows, view: PreTrainedModel, skip_set: SkipSet) -> float:
        sizes.append(len(skip_set))
        return 0.5

    monkeypatch.setattr(Windows, "agreement", agreement)
    METHODS["SWIFT"](context, budget, 0)  # each skip set takes one tick of the clock
    each = min(30, round(budget / len(RATIOS)))  # at most MOST_SETS
    assert sizes == [size for ratio in RATIOS for size in [int(ratio * 2 * (LAYERS - 2))] * each]


# --- Judging ---


def test_the_two_best_skip_sets_of_a_method_take_part_with_their_best_draft_lengths(context: Context) -> None:
    everything = SkipSet(attn=range(LAYERS), mlp=range(LAYERS))
    sets = [everything, ENDS_SKIPPED, SkipSet(mlp=[4]), ENDS_SKIPPED, SkipSet()]

    def select(context: Context, budget: float, seed: int) -> Selection:
        candidates = [Candidate(skip_set=skip_set, ratio=ratio) for ratio, skip_set in enumerate(sets)]
        return Selection(offered=candidates, tried=17)

    replay = Replay(context.model, context.texts, 3)
    entries = enter("mine", select, context, replay, 1.0, 0)
    assert [entry.name for entry in entries] == ["mine", "mine, its next"]
    # Skipping one MLP saves little, skipping everything saves nearly all.
    assert {entry.plan.skip_set: entry.ratio for entry in entries} == {ENDS_SKIPPED: 1, everything: 0}
    assert entries[0].predicted >= entries[1].predicted
    assert {(entry.tried, entry.offered) for entry in entries} == {(17, 3)}
    assert all(1 <= entry.plan.gamma <= 3 for entry in entries)
    assert [predicted_speedup(replay, context, entry.plan) for entry in entries] == [e.predicted for e in entries]
    assert predicted_speedup(replay, context, Plan.none()) == 1.0


def test_a_method_without_skip_sets_decodes_plainly(context: Context) -> None:
    replay = Replay(context.model, context.texts, 3)
    (entry,) = enter("mine", lambda *_: Selection(offered=[Candidate(skip_set=SkipSet())]), context, replay, 1.0, 0)
    assert (entry.plan, entry.predicted, entry.offered) == (Plan.none(), 1.0, 0)


def row(method: str, speedup: float, against: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "method": method,
        "speedup": {"value": speedup, "low": speedup - 0.1, "high": speedup + 0.1},
        "ours_over_it": against and {"value": sum(against) / 2, "low": against[0], "high": against[1]},
    }


def test_the_faster_skip_set_of_a_method_counts() -> None:
    rows = [row("SWIFT", 1.1, (1.2, 1.3)), row(OURS, 1.4, None), row("SWIFT", 1.3, (0.97, 1.1))]
    best = best_of_each(rows)
    assert [(row["method"], row["speedup"]["value"]) for row in best] == [(OURS, 1.4), ("SWIFT", 1.3)]
    assert [verdict(row) for row in [*rows, row("CLaSp", 1.6, (0.8, 0.99))]] == ["faster", "", "level", "slower"]


@pytest.mark.slow
def test_a_small_benchmark_runs_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)
    monkeypatch.setattr(Bill, "left_of", lambda bill, budget: 2.0)  # on a busy machine too
    small = "--model plain --budget 40 --prompts 1 --repeats 1 --calibration 2 --new-tokens 16 --gamma-max 2"
    out = tmp_path / "out.json"
    selection.main([*small.split(), "--methods", "stride", "CLaSp", "ours", "--out", str(out)])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    (result,) = printed["models"]
    assert {row["method"] for row in result["rows"]} == {"stride", "CLaSp", "ours"}
    assert all(row["differing_tokens"] == 0 for row in result["rows"])
    assert set(result["verdicts"]) == {"stride", "CLaSp"}
