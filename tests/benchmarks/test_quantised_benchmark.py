"""The benchmark of quantised drafts: cells, rounding, and toy runs of all three parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from common.budget import LeftOutError
from shapes.drafts import with_head, with_skips
from shapes.effort import TOY
from shapes.quantised_cells import QuantisedBench
from shapes.quantised_run import EIGHT, MIDSIZE, THIRTY_TWO, order
from shapes.replayed import GAMMA, least_important
from shapes.rounding import RoundedCopies, read_share, round_to_nearest
from shapes.shape import TOY_LLAMA, TOY_QWEN3
from shapes.subject import Subject
from torch import Tensor

from selfspec import DraftSpec, InputError, Quantised, QuantisedSet, SkipSet, SubVocabulary
from selfspec.models.draft_weights import draft_weight_bytes
from selfspec.plan.draft_spec import INT4, INT8

CPU = torch.device("cpu")


def make_bench() -> QuantisedBench:
    return QuantisedBench(Subject(TOY_LLAMA, CPU, 0, damped=True), INT4, TOY)


@pytest.fixture(scope="module")
def bench() -> QuantisedBench:
    torch.manual_seed(0)
    return make_bench()


def test_turning_the_dial_changes_agreement_and_keeps_the_copies(bench: QuantisedBench) -> None:
    draft_weights = bench.spec.runtime.views.draft_weights
    made = dict(draft_weights._made)
    bench.draft_by(None, 3)
    agreements = []
    for scale in (0.0, 16.0):
        bench.dial.turn(scale)
        agreements.append(bench.agreement())
    bench.subject.restore()
    assert agreements[0] > 0.9 > 0.5 > agreements[1]
    assert bench.spec.runtime.views.draft_weights is draft_weights
    assert draft_weights._made == made


def test_a_draft_that_skips_more_reuses_its_copies(bench: QuantisedBench) -> None:
    made = dict(bench.spec.runtime.views.draft_weights._made)
    bench.draft_by(bench.subject.skip_set, 2)
    few = bench.spec.runtime.views.draft_weights._made
    assert 0 < len(few) < len(made)
    assert all(few[key] is made[key] for key in few)
    assert bench.spec.plan.draft_spec == bench.spec.runtime.draft_spec == with_skips(INT4, 7, bench.subject.skip_set)


def test_a_cell_with_skips_uses_the_scale_of_a_higher_agreement() -> None:
    bench = make_bench()
    with pytest.raises(LeftOutError, match=r"more agreement than 0\.8"):
        bench.turn_with_skips(0.8)
    assert bench.turn_of(0.9)(0.25) == {"scale": 4.0}
    assert bench.turn_with_skips(0.8)(0.5) == {"scale": 4.0, "skipped_scale": 0.5}


# --- Rounding ---


def test_rounding_keeps_the_ends_of_a_group_and_errs_by_at_most_half_a_step() -> None:
    weight = torch.randn(7, 3 * 32)
    groups = weight.view(7, 3, 32)
    for bits in (2, 3, 4, 8):
        found = round_to_nearest(weight, bits).view(7, 3, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        assert ((found - groups).abs().amax(-1) <= step * 0.5001).all()
        assert max(len(group.unique()) for group in found.flatten(0, 1)) <= 2**bits
        torch.testing.assert_close(found.amax(-1), groups.amax(-1))
        torch.testing.assert_close(found.amin(-1), groups.amin(-1))
    assert torch.equal(round_to_nearest(torch.full((1, 32), 0.375), 2), torch.full((1, 32), 0.375))


def test_rounded_copies_are_layers_with_rounded_weights(small_model: Any) -> None:
    model, inputs = small_model(), torch.randn(5, 64)
    draft_weights = RoundedCopies(model, 3)
    gate = draft_weights.linear("mlp", 1, "gate_proj", INT4)
    weight: Tensor = model.model.layers[1].mlp.gate_proj.weight
    torch.testing.assert_close(gate(inputs), inputs @ round_to_nearest(weight, 3).T)
    assert draft_weights.linear("mlp", 1, "gate_proj", INT8) is gate
    assert draft_weights.head(None, None) is model.lm_head
    torch.testing.assert_close(
        draft_weights.head(INT4, None)(inputs), inputs @ round_to_nearest(model.lm_head.weight, 3).T
    )


def test_read_share_counts_kept_quantised_and_skipped_weights(small_model: Any) -> None:
    model, (attn, mlp, head) = small_model(), (64 * 192, 3 * 64 * 96, 48 * 64)
    whole = 3 * (attn + mlp) + head
    assert read_share(model, DraftSpec(), None) == 1
    skipping = DraftSpec(skip_set=SkipSet(attn={0}, mlp={1, 2}))
    assert read_share(model, skipping, None) == pytest.approx((2 * attn + mlp + head) / whole)
    some = Quantised(format=INT4, sublayers=QuantisedSet(attn={1}, mlp={0}))
    quantised_too = DraftSpec(skip_set=skipping.skip_set, quantised=some)
    assert read_share(model, quantised_too, 5.0) == pytest.approx((attn + (attn + mlp) * 5 / 16 + head) / whole)
    trimmed = DraftSpec(quantised=Quantised.everything(INT4, 3), vocabulary=SubVocabulary.of(range(16), 48))
    assert read_share(model, trimmed, 5.0) == pytest.approx((3 * (attn + mlp) + head / 3) * 5 / 16 / whole)


def test_the_least_important_sub_layers_are_the_first_of_theirorder() -> None:
    order = [("mlp", 3), ("attn", 0), ("attn", 3), ("mlp", 1)]
    assert least_important(order, 0.5) == SkipSet(attn={0}, mlp={3})
    assert not least_important(order, 0)


# --- The command ---


@pytest.mark.parametrize(("part", "option"), [("bits", "--prompts"), ("cpu", "--new-tokens"), ("gpu", "--repeats")])
def test_a_size_of_zero_is_refused(part: str, option: str) -> None:
    with pytest.raises(InputError, match=f"{option} is 0, but it must be at least"):
        quantised.main([part, "--toy", option, "0"])


def test_the_trained_model_follows_the_first_format_of_the_smaller_shape() -> None:
    formats = [INT4, INT8]
    assert list(order([THIRTY_TWO, EIGHT, MIDSIZE], formats)) == [
        (EIGHT, INT4),
        (MIDSIZE, None),
        (EIGHT, INT8),
        (THIRTY_TWO, INT4),
        (THIRTY_TWO, INT8),
    ]
    assert list(order([THIRTY_TWO], formats)) == [(THIRTY_TWO, INT4), (THIRTY_TWO, INT8)]
    assert list(order([MIDSIZE], formats)) == [(MIDSIZE, None)]


def test_a_run_without_time_names_every_skipped_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quantised.main(["gpu", "--toy", "--budget", "0.1", "--midsize", str(tmp_path)])
    assert {stage["status"] for stage in result["stages"]} == {"skipped"}
    assert result["shapes"] == []
    reasons = {stage["name"]: stage["reason"] for stage in result["stages"]}
    assert "python benchmarks/midsize.py" in reasons.pop("mid-size model")
    assert len(reasons) == 4
    assert all("--budget" in reason for reason in reasons.values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stages"] == result["stages"]


# --- Toy runs ---


COMMON = {"benchmark", "part", "commit", "device", "threads", "versions", "settings"}


@pytest.mark.slow
def test_the_toy_run_of_bits_measures_every_draft(script: Any, tmp_path: Path) -> None:
    result = script("quantised.py", "bits", "--toy", "--out", tmp_path / "bits.json").result
    assert json.loads((tmp_path / "bits.json").read_text()) == result
    assert set(result) == COMMON | {"gamma", "texts", "bits", "skips", "both", "trimmed"}
    assert [len(result[part]) for part in ("bits", "skips", "both", "trimmed")] == [6, 5, 5, 4]
    for row in (row for part in ("bits", "skips", "both", "trimmed") for row in result[part]):
        assert len(row["agreement_by_depth"]) == GAMMA
        assert all(0 <= share <= 1 for share in (row["agreement"], row["acceptance_rate"], *row["agreement_by_depth"]))
        assert 1 <= row["tokens_per_round"] <= GAMMA + 1
    for nothing_changed in (result["skips"][0], result["trimmed"][0]):
        assert nothing_changed["agreement"] == nothing_changed["read"] == 1
    assert [row["skipped"] for row in result["both"]] == [row["skipped"] for row in result["skips"]] != [0] * 5
    rounded_rows = {row["draft"]: row for row in result["bits"]}
    two, eight = rounded_rows["2 bits, to the nearest"], rounded_rows["8 bits, to the nearest"]
    assert two["agreement"] < eight["agreement"]
    assert (two["read"], eight["read"]) == (3 / 16, 9 / 16)  # scale and zero take one bit per weight
    assert result["both"][0]["agreement"] == rounded_rows["int4, steps fitted (ours)"]["agreement"]


def check_shape(result: dict[str, Any]) -> None:
    """Check that the figures of one shape and format are consistent."""
    passes, ceilings = result["passes"], {(one["draft"], one["agreement"]): one for one in result["ceilings"]}
    assert set(passes["target_ms"]) == {str(t) for t in TOY.lengths}
    assert set(passes["drafts"]) == {draft for draft, _ in ceilings}
    assert passes["drafts"]["bf16"]["bytes"] == 0
    assert 0 <= result["agreement"]["as_drawn"] <= 1
    assert [cell["agreement_wanted"] for cell in result["cells"]] == [*TOY.agreements, min(TOY.agreements)]
    for cell in result["cells"]:
        check_cell(cell, ceilings[cell["draft"], cell["agreement_wanted"]])
        assert cell["draft_bytes"] == passes["drafts"][cell["draft"]]["bytes"] > 0


def check_cell(cell: dict[str, Any], best: dict[str, Any]) -> None:
    assert (cell["gamma"], round(cell["ceiling"], 4)) == (best["gamma"], best["speedup"])
    missed = abs(cell["agreement"] - cell["agreement_wanted"]) > 2 * TOY.tolerance
    assert cell["out_of_reach"] == missed
    assert 1 < cell["tokens_per_round"] <= cell["gamma"] + 1
    scores = {score["name"]: score for score in cell["contenders"]}
    assert (
        {"model.generate", "plain", "drafted"} <= set(scores) <= {"model.generate", "plain", "plain, padded", "drafted"}
    )
    plain = {name: scores[name]["tokens_per_second"] for name in scores if name.startswith("plain")}
    assert cell["better_plain"] == max(plain, key=lambda name: plain[name])
    ratio = scores["drafted"]["tokens_per_second"] / plain[cell["better_plain"]]
    assert cell["speedup"]["value"] == pytest.approx(ratio, rel=0.01)
    assert scores["plain"]["differing_tokens"] == 0
    assert cell["efficiency"] == pytest.approx(cell["speedup"]["value"] / cell["ideal_speedup"], rel=0.01)
    assert not cell["unsteady"]


@pytest.mark.slow
def test_the_toy_run_on_a_cpu_measures_passes_and_decodes_at_set_agreements(script: Any, tmp_path: Path) -> None:
    result = script("quantised.py", "cpu", "--toy", "--out", tmp_path / "cpu.json").result
    assert json.loads((tmp_path / "cpu.json").read_text()) == result
    assert set(result) == COMMON | {"shapes", "stages"}
    assert {stage["status"] for stage in result["stages"]} == {"done"}, result["stages"]
    (shape,) = result["shapes"]
    check_shape(shape)
    names = {f"{name}{part}" for name in ("int8", "int4") for part in ("", " and head", ", head of 128 tokens")}
    assert names | {"bf16", "bf16, 43% skipped"} < set(shape["passes"]["drafts"])
    model = TOY_LLAMA.build(CPU, 0)
    everything = DraftSpec(quantised=Quantised.everything(INT4, 7))
    assert shape["passes"]["drafts"][with_head(INT4)]["bytes"] == draft_weight_bytes(model, everything)


@pytest.mark.slow
@pytest.mark.xdist_group("trained")
def test_the_toy_run_of_a_gpu_measures_shapes_formats_and_a_trained_model(script: Any, trained: dict[str, Any]) -> None:
    result = script("quantised.py", "gpu", "--toy", "--midsize", trained["out"], "--formats", "int8").result
    assert set(result) == COMMON | {"shapes", "trained", "stages"}
    assert {stage["status"] for stage in result["stages"]} == {"done"}, result["stages"]
    assert [(shape["shape"], shape["format"]) for shape in result["shapes"]] == [
        (shape.name, INT8.code) for shape in (TOY_LLAMA, TOY_QWEN3)
    ]
    for shape in result["shapes"]:
        check_shape(shape)
    decoded = result["trained"]
    names = [score["name"] for score in decoded["scores"]]
    assert names[:2] == ["model.generate", "plain"]
    assert names[-2:] == ["selfspec, skips alone", "selfspec, all choices"]
    assert all(score["differing_tokens"] == 0 for score in decoded["scores"])  # in float32
    assert "quantised" not in decoded["plans"]["selfspec, skips alone"]
    speeds = {score["name"]: score["tokens_per_second"] for score in decoded["scores"]}
    ratio = speeds["selfspec, all choices"] / speeds["selfspec, skips alone"]
    (measured,) = decoded["ratios"].values()
    assert measured["value"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_part_for_a_gpu_suggests_the_toy_run() -> None:
    with pytest.raises(InputError, match=r"this part needs a CUDA device, and there is none here; .* --toy$"):
        quantised.main(["gpu"])
