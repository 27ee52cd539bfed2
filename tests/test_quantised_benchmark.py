"""The benchmark of quantised drafts: its arithmetic against hand-computed cases, and all three parts at toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from selfspec import DraftSpec, InputError, Quantised, QuantisedSet, SkipSet, SubVocabulary
from selfspec.models.draft_weights import draft_weight_bytes
from selfspec.models.quantised_linear import QuantisedWeight
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.runtime.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import quantised
from gpu_bench import timing as timing_module
from gpu_bench.budget import LeftOutError
from quantised_bench.bench import Bench
from quantised_bench.ceilings import ceiling
from quantised_bench.cells import cell_of, cell_with_skips
from quantised_bench.dial import Dial, rounded
from quantised_bench.drafts import drafts_for, with_head, with_skips
from quantised_bench.effort import TOY
from quantised_bench.gpu import EIGHT, MIDSIZE, THIRTY_TWO, _order
from quantised_bench.passes import Passes, best_length, lengths_of
from quantised_bench.read import read_share
from quantised_bench.replayed import GAMMA, most_dispensable
from quantised_bench.rounding import RoundedCopies, round_to_nearest
from quantised_bench.shapes import LLAMA_1B, TOY_LLAMA, TOY_QWEN3
from quantised_bench.subject import DAMPING, Subject
from quantised_bench.times import Times, take_turns

BENCHMARKS = Path(quantised.__file__).parent
CPU = torch.device("cpu")


# --- Times ---


def test_a_ratio_of_times_is_told_repeat_by_repeat() -> None:
    spread = Times((2.0, 9.0, 5.0)).over(Times((4.0, 3.0, 5.0)))
    assert (spread.value, spread.low, spread.high) == (1.0, 0.5, 3.0)  # of 0.5, 3 and 1
    assert Times((2.0, 9.0, 5.0)).median == 5.0


def test_calls_take_turns_after_a_stretch_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], list[str]()

    def call(name: str, seconds: float) -> None:
        called.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing_module, "perf_counter", lambda: now[0])
    calls = {"one": lambda: call("one", 3.0), "other": lambda: call("other", 0.5)}
    timed = take_turns(calls, CPU, repeats=2, in_a_row=3)
    assert timed == {"one": Times((3.0, 3.0)), "other": Times((0.5, 0.5))}
    assert called == ["one"] * 3 + ["other"] * 3 + (["one"] * 3 + ["other"] * 3) * 2


# --- Passes and ceilings ---


def passes_of(target: dict[int, float], **drafts: float) -> Passes:
    return Passes(
        target={t: Times((seconds,)) for t, seconds in target.items()},
        drafts={name: Times((seconds,)) for name, seconds in drafts.items()},
        padded={},
        bytes=dict.fromkeys(drafts, 0),
    )


def test_passes_are_padded_to_the_length_that_is_clearly_faster() -> None:
    passes = passes_of({1: 10.0, 2: 7.0, 3: 6.9, 4: 9.0, 5: 8.0})
    assert passes.pass_lengths is not None
    assert passes.pass_lengths.target == [3, 2, 3, 5, 5]  # 2 to 3 would gain 1.4 %, which is noise
    assert passes.better_plain.median == 6.9
    assert [passes.verify(gamma).median for gamma in passes.gammas] == [7.0, 6.9, 8.0, 8.0]


def test_passes_of_which_longer_ones_are_slower_are_not_padded() -> None:
    passes = passes_of({1: 10.0, 3: 10.1, 5: 11.0})
    assert passes.pass_lengths is None
    assert passes.better_plain.median == 10.0
    assert passes.gammas == [2, 4]  # whose verify passes were measured


def test_a_draft_s_pass_is_padded_where_that_is_clearly_faster_and_nothing_is_quantised() -> None:
    times = {t: Times((seconds,)) for t, seconds in ((1, 10.0), (2, 9.7), (3, 9.5))}
    assert best_length(times) == 3
    assert best_length({1: times[1], 2: times[2]}) == 1  # 3 % is noise
    model = TOY_LLAMA.build(CPU, 0)
    skipping, quantised_too = DraftSpec(skip_set=SkipSet(attn={1})), DraftSpec(quantised=Quantised.everything(INT4, 7))
    assert lengths_of(Runtime(model, skipping)) == (1, 2, 3)
    assert lengths_of(Runtime(model, quantised_too)) == (1,)


def test_the_ceiling_is_that_of_the_best_draft_length_by_hand() -> None:
    passes = passes_of({1: 10.0, 2: 8.0, 3: 8.0, 4: 9.0}, cheap=2.0, dear=8.0)
    # Of plain passes of 8: (1 + a) / (2 + 8), (1 + a + a^2) / (4 + 8), (1 + a + a^2 + a^3) / (6 + 9).
    best = ceiling(passes, "cheap", 0.9)
    assert (best.gamma, best.speedup) == (3, pytest.approx(8 * 3.439 / 15))
    assert best.speedup > max(8 * 1.9 / 10, 8 * 2.71 / 12)
    assert ceiling(passes, "cheap", 0.5).gamma == 1  # 1.5 / 10 beats 1.75 / 12 and 1.875 / 15
    assert ceiling(passes, "dear", 0.9).speedup == pytest.approx(8 * 1.9 / 16)


def test_where_verifying_costs_a_plain_pass_ceilings_are_those_of_the_design() -> None:
    passes = passes_of(dict.fromkeys(range(1, 14), 1.0), half=0.45, quarter=0.28, tenth=0.1)
    for draft, speedup in (("half", 1.46), ("quarter", 1.95), ("tenth", 3.43)):
        assert ceiling(passes, draft, 0.9).speedup == pytest.approx(speedup, abs=0.005)


# --- Drafts ---


def test_drafts_are_named_by_what_they_are_made_of() -> None:
    drafts = drafts_for([INT8, INT4], 7, 528, 128, SkipSet(attn={1, 2}, mlp={3, 4, 5}))
    assert list(drafts)[:2] == ["bf16", "bf16, 36% skipped"]
    assert list(drafts)[-4:] == ["int4", "int4 and head", "int4, head of 128 tokens", "int4 and head, 36% skipped"]
    assert drafts["int4"].quantised is not None
    assert not drafts["int4"].quantised.head
    assert drafts["int4, head of 128 tokens"].vocabulary == SubVocabulary.of(range(128), 528)
    skipping = drafts["int4 and head, 36% skipped"]
    assert skipping == with_skips(INT4, 7, SkipSet(attn={1, 2}, mlp={3, 4, 5}))
    assert {skipping.choice(kind, layer) for kind in ("attn", "mlp") for layer in range(7)} == {"skip", "quantise"}


def test_the_real_shape_has_as_many_parameters_as_the_model_it_is_named_after_and_a_head_of_its_own() -> None:
    assert LLAMA_1B.bytes == 2 * (1_235_814_400 + 128256 * 2048)


@pytest.mark.parametrize("shape", [TOY_LLAMA, TOY_QWEN3], ids=lambda shape: shape.name)
def test_every_layer_of_a_toy_can_have_a_copy_in_every_format(shape: Any) -> None:
    subject = Subject(shape, CPU, 0)
    for format in (INT4, INT8):
        assert Dial(subject, format, keep=False).names == list(subject.linears())


# --- The subject and its dial ---


def test_a_subject_s_parameters_can_be_drawn_again() -> None:
    subject = Subject(TOY_QWEN3, CPU, 3)
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(subject.drawn(name), parameter), name
    assert not torch.equal(Subject(TOY_QWEN3, CPU, 4).drawn("lm_head.weight"), subject.drawn("lm_head.weight"))


def test_what_sub_layers_add_is_damped_and_head_rows_differ_in_length() -> None:
    subject, plain = Subject(TOY_LLAMA, CPU, 0), TOY_LLAMA.build(CPU, 0)
    for name in ("model.layers.2.self_attn.o_proj.weight", "model.layers.5.mlp.down_proj.weight"):
        ratio = subject.model.get_parameter(name).float().std() / plain.get_parameter(name).float().std()
        assert ratio == pytest.approx(DAMPING * 7**-0.5, rel=0.01)
    lengths = subject.model.lm_head.weight.float().norm(dim=1)  # type: ignore[union-attr,operator]
    assert lengths.log().std() == pytest.approx(0.5, abs=0.1)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(subject.model.get_parameter(name), plain.get_parameter(name))


def test_no_prompt_holds_the_padding_token() -> None:
    prompts = Subject(TOY_LLAMA, CPU, 0).prompts(7, 997)
    assert {len(prompt) for prompt in prompts} == {997}
    assert min(int(prompt.min()) for prompt in prompts) > 0


@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_the_dial_goes_from_the_copies_to_the_weights_as_they_were_drawn(format: Any, keep: bool) -> None:
    subject = Subject(TOY_LLAMA, CPU, 0)
    dial, names = Dial(subject, format, keep=keep), list(subject.linears())
    before = {name: parameter.clone() for name, parameter in subject.model.named_parameters()}
    places = {name: subject.model.get_parameter(name).data_ptr() for name in names}
    for scale in (0.0, 0.25, 1.0):
        dial.turn(scale)
        for name, parameter in subject.model.named_parameters():
            copied = QuantisedWeight.of(before[name], format).dequantised() if name in names else before[name].float()
            wanted = copied + scale * (before[name].float() - copied)
            torch.testing.assert_close(parameter.float(), wanted, rtol=0.01, atol=1e-4)
    assert all(torch.equal(subject.model.get_parameter(name), before[name]) for name in before)
    assert places == {name: subject.model.get_parameter(name).data_ptr() for name in names}  # no view is built anew


def test_the_dial_scales_what_a_skip_set_gives_and_leaves_nothing_behind() -> None:
    subject = Subject(TOY_LLAMA, CPU, 0)
    dial, skip_set = Dial(subject, INT4, keep=True), SkipSet(attn={2}, mlp={4, 5})
    before = {name: parameter.clone() for name, parameter in subject.model.named_parameters()}
    scaled = {f"model.layers.{n}.{part}.weight" for n, part in ((2, "self_attn.o_proj"), (4, "mlp.down_proj"))}
    dial.turn(1.0, skip_set, 0.25)
    changed = {name for name, one in subject.model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == scaled | {"model.layers.5.mlp.down_proj.weight"}
    assert all(torch.equal(subject.model.get_parameter(name), before[name] * 0.25) for name in changed)
    subject.restore()
    assert all(torch.equal(one, before[name]) for name, one in subject.model.named_parameters())


def test_rows_are_rounded_alike_whether_few_or_all_at_a_time() -> None:
    weight = torch.randn(523, 64).to(torch.bfloat16)  # more than two parts
    for format in (INT4, INT8):
        assert torch.equal(rounded(weight, format), QuantisedWeight.of(weight, format).dequantised(torch.bfloat16))


def test_a_copy_made_of_the_target_anew_is_as_far_from_it_as_the_draft_s() -> None:
    dial = Dial(Subject(TOY_LLAMA, CPU, 0), INT4, keep=False)
    for scale in (0.25, 0.5, 1.0):
        dial.turn(scale)
        assert dial.requantised() == pytest.approx(1, abs=0.02)
    skip_set = SkipSet(attn={3}, mlp={3})  # of the layer in the middle
    dial.turn(1.0, skip_set, 0.25)
    assert dial.requantised(skip_set) == pytest.approx(1)  # what is skipped has no copy
    dial.turn(7.0)  # so far away the nearest copy is another
    assert dial.requantised() < 0.5


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.manual_seed(0)
    return Bench(Subject(TOY_LLAMA, CPU, 0), INT4, TOY)


def test_the_draft_s_copies_stay_while_the_target_moves_and_so_does_agreement(bench: Bench) -> None:
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


def test_a_draft_that_skips_more_needs_no_new_copies(bench: Bench) -> None:
    made = dict(bench.spec.runtime.views.draft_weights._made)
    bench.draft_by(bench.subject.skip_set, 2)
    few = bench.spec.runtime.views.draft_weights._made
    assert 0 < len(few) < len(made)
    assert all(few[key] is made[key] for key in few)
    assert bench.spec.plan.draft_spec == bench.spec.runtime.draft_spec == with_skips(INT4, 7, bench.subject.skip_set)


def test_a_cell_with_skips_begins_where_a_higher_agreement_was_found() -> None:
    bench = Bench(Subject(TOY_LLAMA, CPU, 0), INT4, TOY)
    with pytest.raises(LeftOutError, match=r"more agreement than 0\.8"):
        cell_with_skips(bench, 0.8)
    assert cell_of(bench, 0.9).turn(0.25) == {"scale": 4.0}
    assert cell_with_skips(bench, 0.8).turn(0.5) == {"scale": 4.0, "skipped_scale": 0.5}


# --- Rounding ---


def test_rounding_to_the_nearest_keeps_a_group_s_ends_and_is_half_a_step_off_at_most() -> None:
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


def small_model() -> LlamaForCausalLM:
    """3 layers: 64 x (64 + 32 + 32 + 64) weights of attention, 3 x 64 x 96 of an MLP; 48 x 64 of the head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def test_a_stand_in_for_copies_is_the_layer_with_rounded_weights() -> None:
    model, inputs = small_model(), torch.randn(5, 64)
    draft_weights = RoundedCopies(model, 3)
    gate = draft_weights.linear("mlp", 1, "gate_proj", INT4)
    weight: Tensor = model.model.layers[1].mlp.gate_proj.weight  # type: ignore[assignment]
    torch.testing.assert_close(gate(inputs), inputs @ round_to_nearest(weight, 3).T)
    assert draft_weights.linear("mlp", 1, "gate_proj", INT8) is gate
    assert draft_weights.head(None, None) is model.lm_head
    torch.testing.assert_close(
        draft_weights.head(INT4, None)(inputs), inputs @ round_to_nearest(model.lm_head.weight, 3).T
    )


def test_a_draft_reads_what_it_keeps_in_16_bits_and_what_it_quantised_in_fewer() -> None:
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


def test_the_most_dispensable_sub_layers_are_the_first_of_their_order() -> None:
    order = [("mlp", 3), ("attn", 0), ("attn", 3), ("mlp", 1)]
    assert most_dispensable(order, 0.5) == SkipSet(attn={0}, mlp={3})
    assert not most_dispensable(order, 0)


# --- The command ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_its_part_says_in_one_line_that_it_needs_one() -> None:
    with pytest.raises(InputError, match=r"^this part needs a CUDA device, and there is none here; .*--toy$"):
        quantised.main(["gpu"])


@pytest.mark.parametrize(("part", "option"), [("bits", "--prompts"), ("cpu", "--new-tokens"), ("gpu", "--repeats")])
def test_nothing_to_measure_is_refused(part: str, option: str) -> None:
    with pytest.raises(InputError, match=f"{option} is 0, but it must be at least"):
        quantised.main([part, "--toy", option, "0"])


def test_the_trained_model_comes_behind_the_first_format_of_the_smaller_shape() -> None:
    formats = [INT4, INT8]
    assert list(_order([THIRTY_TWO, EIGHT, MIDSIZE], formats)) == [
        (EIGHT, INT4),
        (MIDSIZE, None),
        (EIGHT, INT8),
        (THIRTY_TWO, INT4),
        (THIRTY_TWO, INT8),
    ]
    assert list(_order([THIRTY_TWO], formats)) == [(THIRTY_TWO, INT4), (THIRTY_TWO, INT8)]
    assert list(_order([MIDSIZE], formats)) == [(MIDSIZE, None)]


def test_a_run_without_time_names_all_that_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quantised.main(["gpu", "--toy", "--budget", "0.1", "--midsize", str(tmp_path)])
    assert {stage["status"] for stage in result["stages"]} == {"skipped"}
    assert result["shapes"] == []
    reasons = {stage["name"]: stage["reason"] for stage in result["stages"]}
    assert "python benchmarks/midsize.py" in reasons.pop("mid-size model")
    assert len(reasons) == 4
    assert all("--budget" in reason for reason in reasons.values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["stages"] == result["stages"]


# --- Toy runs ---


def run(*arguments: object) -> tuple[dict[str, Any], str]:
    """What a toy run's last line tells, and all that it printed."""
    command = [sys.executable, str(BENCHMARKS / "quantised.py"), *map(str, arguments), "--toy"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1]), out


COMMON = {"benchmark", "part", "commit", "device", "threads", "versions", "settings"}


@pytest.mark.slow
def test_the_toy_run_of_bits_tells_agreement_of_every_draft(tmp_path: Path) -> None:
    result, _ = run("bits", "--out", tmp_path / "bits.json")
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
    assert (two["read"], eight["read"]) == (3 / 16, 9 / 16)  # scales and zeros take a bit a weight
    assert result["both"][0]["agreement"] == rounded_rows["int4, steps fitted (ours)"]["agreement"]


def check_shape(result: dict[str, Any]) -> None:
    """Figures of one shape and format agree with each other."""
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
def test_the_toy_run_on_a_cpu_measures_passes_and_decodes_at_set_agreements(tmp_path: Path) -> None:
    result, out = run("cpu", "--out", tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text()) == result
    assert set(result) == COMMON | {"shapes", "stages"}
    assert {stage["status"] for stage in result["stages"]} == {"done"}, out
    (shape,) = result["shapes"]
    check_shape(shape)
    names = {f"{name}{part}" for name in ("int8", "int4") for part in ("", " and head", ", head of 128 tokens")}
    assert names | {"bf16", "bf16, 43% skipped"} < set(shape["passes"]["drafts"])
    model = TOY_LLAMA.build(CPU, 0)
    everything = DraftSpec(quantised=Quantised.everything(INT4, 7))
    assert shape["passes"]["drafts"][with_head(INT4)]["bytes"] == draft_weight_bytes(model, everything)


@pytest.mark.slow
def test_the_toy_run_of_a_gpu_measures_shapes_formats_and_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path / "cache"))
    training = [sys.executable, str(BENCHMARKS / "midsize.py"), "--toy", "--out", str(tmp_path / "model")]
    subprocess.run(training, check=True, capture_output=True)
    result, out = run("gpu", "--midsize", tmp_path / "model", "--formats", "int8")
    assert set(result) == COMMON | {"shapes", "trained", "stages"}
    assert {stage["status"] for stage in result["stages"]} == {"done"}, out
    assert [(shape["shape"], shape["format"]) for shape in result["shapes"]] == [
        (shape.name, INT8.code) for shape in (TOY_LLAMA, TOY_QWEN3)
    ]
    for shape in result["shapes"]:
        check_shape(shape)
    trained = result["trained"]
    names = [score["name"] for score in trained["scores"]]
    assert names == ["model.generate", "plain", "selfspec, skips alone", "selfspec, all choices"]
    assert all(score["differing_tokens"] == 0 for score in trained["scores"])  # in float32
    assert "quantised" not in trained["plans"]["selfspec, skips alone"]
    speeds = {score["name"]: score["tokens_per_second"] for score in trained["scores"]}
    ratio = speeds["selfspec, all choices"] / speeds["selfspec, skips alone"]
    assert trained["all_choices_over_skips"]["value"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_command_ends_with_one_line_and_exit_code_1() -> None:
    command = [sys.executable, str(BENCHMARKS / "quantised.py"), "gpu"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: this part needs a CUDA device, and there is none here; try the code with --toy\n"
