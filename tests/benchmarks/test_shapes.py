"""Shapes: limits against hand-computed cases, drawn weights, the dial, and times of passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common.timing import Times
from shapes import ceilings as ceilings_module
from shapes.agreement import drafted_agreement, find_scale, published_share, write
from shapes.ceilings import measure_ceilings
from shapes.dial import Dial, rounded
from shapes.drafts import drafts_for, with_skips
from shapes.effort import TOY
from shapes.limits import PassTimes, bandwidth_limit, best_gamma, expected_tokens, ideal_speedup, kv_bytes, weight_bytes
from shapes.passes import Ceiling, Passes, adopted_lengths, lengths_of, round_passes
from shapes.shape import LLAMA_1B, LLAMA_8B, QWEN3_32B, TOY_LLAMA, TOY_QWEN3, Shape, in_float32
from shapes.subject import DAMPING, Subject
from torch import Tensor

from selfspec import DraftSpec, Format, Quantised, SkipSet, SubVocabulary
from selfspec.models.quantised_linear import QuantisedWeight
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.runtime.runtime import Runtime

CPU = torch.device("cpu")
TOYS = [in_float32(TOY_LLAMA), in_float32(TOY_QWEN3)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


# --- Limits ---


LAYER = 64 * 192 + 3 * 64 * 96 + 2 * 64
"""Weights of a layer of the small model."""


def test_the_bandwidth_limit_counts_weights_embedding_rows_and_the_cache(small_model: Any) -> None:
    model = small_model()
    assert weight_bytes(model, 5) == 4 * (3 * LAYER + 64 + 48 * 64) + 4 * 5 * 64 == 384_000
    assert kv_bytes(model, 5, 17) == 2 * 3 * 2 * 16 * 5 * 17 * 4 == 65_280
    assert bandwidth_limit(model, 5, 17, 20 * 449_280) == pytest.approx(100)  # 20 passes a second, 5 tokens each


def test_a_tied_head_is_read_once(small_model: Any) -> None:
    assert weight_bytes(small_model(tied=True), 5) == 4 * (3 * LAYER + 64 + 48 * 64)


def test_cached_bytes_use_the_head_size_of_the_config() -> None:
    assert kv_bytes(TOY_QWEN3.build(CPU, 0), 3, 7) == 2 * 5 * 2 * 24 * 3 * 7 * 2


def test_the_ideal_speedup_is_tokens_per_round_over_the_cost_of_a_round() -> None:
    passes = PassTimes(plain=7.0, draft=2.0, verify=11.0)
    assert ideal_speedup(3.0, 5, passes) == pytest.approx(3 * 7 / (5 * 2 + 11))
    assert passes.draft_cost == pytest.approx(2 / 7)


@pytest.mark.parametrize(("cost", "speedup"), [(0.55, 1.30), (0.45, 1.46), (0.28, 1.95), (0.1, 3.43)])
def test_the_best_draft_length_reaches_known_ceilings(cost: float, speedup: float) -> None:
    gamma = best_gamma(0.9, cost)
    assert expected_tokens(0.9, gamma) / (gamma * cost + 1) == pytest.approx(speedup, abs=0.005)
    assert expected_tokens(0.9, gamma) == pytest.approx((1 - 0.9 ** (gamma + 1)) / (1 - 0.9))


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "median_seconds", lambda calls, device, **how: dict.fromkeys(calls, 2.0))
    ceilings = measure_ceilings(CPU, TOY)
    assert ceilings.copy_bytes_per_second == TOY.copy_bytes  # twice as many bytes, in two seconds
    assert ceilings.matmul_flops == TOY.matmul_size**3  # twice as many operations, in two seconds


# --- Shapes and subjects ---


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [(LLAMA_1B, 1_235_814_400 + 128256 * 2048), (LLAMA_8B, 8_030_261_248), (QWEN3_32B, 32_762_123_264)],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_real_shape_has_the_parameters_of_its_model_and_an_untied_head(shape: Shape, parameters: int) -> None:
    assert shape.bytes == 2 * parameters


def test_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(5)
    one = weights(TOY_QWEN3.build(CPU, 7))
    torch.manual_seed(11)
    same, other = weights(TOY_QWEN3.build(CPU, 7)), weights(TOY_QWEN3.build(CPU, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("damped", [False, True])
def test_parameters_of_a_subject_can_be_drawn_again(damped: bool) -> None:
    subject = Subject(TOY_QWEN3, CPU, 3, damped=damped)
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(subject.drawn(name), parameter), name
    other = Subject(TOY_QWEN3, CPU, 4, damped=damped)
    assert not torch.equal(other.drawn("lm_head.weight"), subject.drawn("lm_head.weight"))


def test_damping_scales_output_projections_and_head_rows() -> None:
    subject, plain = Subject(TOY_LLAMA, CPU, 0, damped=True), TOY_LLAMA.build(CPU, 0)
    for name in ("model.layers.2.self_attn.o_proj.weight", "model.layers.5.mlp.down_proj.weight"):
        ratio = subject.model.get_parameter(name).float().std() / plain.get_parameter(name).float().std()
        assert ratio == pytest.approx(DAMPING * 7**-0.5, rel=0.01)
    lengths = subject.model.lm_head.weight.float().norm(dim=1)  # type: ignore[union-attr,operator]
    assert lengths.log().std() == pytest.approx(0.5, abs=0.1)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(subject.model.get_parameter(name), plain.get_parameter(name))


def test_no_prompt_contains_the_padding_token() -> None:
    batches = Subject(TOY_LLAMA, CPU, 0).prompts(7, 3, 997)
    assert {batch.shape for batch in batches} == {(3, 997)}
    assert min(int(batch.min()) for batch in batches) > 0


def test_the_published_share_is_45_percent_without_the_first_and_the_last_layer() -> None:
    skip_set = published_share(32)
    assert (len(skip_set.attn), len(skip_set.mlp)) == (19, 10)
    assert len(skip_set) / 64 == pytest.approx(0.45, abs=0.01)
    assert not {0, 31} & (skip_set.attn | skip_set.mlp)


# --- Agreement ---


@pytest.mark.parametrize("wanted", [0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_scale_is_found_for_any_agreement(wanted: float, power: float) -> None:
    tried: list[float] = []

    def agreement_at(scale: float) -> float:
        tried.append(scale)
        return 1 - 0.97 * scale**power

    scale, agreement = find_scale(agreement_at, wanted, guess=0.03, tolerance=0.005, steps=20)
    assert agreement == agreement_at(scale)
    assert abs(agreement - wanted) <= 0.005
    assert all(0 < one <= 1 for one in tried)
    assert len(tried) <= 13


def test_an_agreement_out_of_reach_gets_the_nearest_one() -> None:
    tried: list[float] = []

    def agreement_at(scale: float) -> float:
        tried.append(scale)
        return 0.93 - 0.8 * scale

    scale, agreement = find_scale(agreement_at, 0.95, guess=0.1, tolerance=0.005, steps=7)
    assert len(tried) == 7
    assert scale == min(tried)
    assert agreement == pytest.approx(0.93, abs=0.01)


@pytest.mark.parametrize("shape", TOYS, ids=lambda shape: shape.name)
def test_scales_from_0_to_1_take_agreement_from_1_to_poor_without_loops(shape: Shape) -> None:
    subject = Subject(shape, CPU, 0)
    dial, batches = Dial(subject), subject.prompts(2, 1, 13)
    spec = subject.drafting(subject.skip_set, 3)
    dial.turn(skip_set=subject.skip_set, skipped_scale=0.0)
    assert drafted_agreement(spec, batches, 31) == 1.0
    dial.turn(skip_set=subject.skip_set, skipped_scale=1.0)
    assert drafted_agreement(spec, batches, 31) < 0.5
    for prompts in batches:
        text = write(subject.plain(), prompts, 31)[0]
        assert len(text.unique()) > 0.6 * len(text)


# --- The dial ---


@pytest.mark.parametrize("format", [None, INT4], ids=str)
def test_the_dial_scales_only_the_skipped_sublayers_of_the_latest_turn(format: Format | None) -> None:
    subject = Subject(TOY_LLAMA, CPU, 3, damped=format is not None)
    before, dial = weights(subject.model), Dial(subject, format, keep=True)
    dial.turn(1.0, SkipSet(attn={1, 4}, mlp={4}), 0.37)
    dial.turn(1.0, SkipSet(attn={4, 5}, mlp={2}), 0.25)
    scaled = {f"model.layers.{n}.self_attn.o_proj.weight" for n in (4, 5)} | {"model.layers.2.mlp.down_proj.weight"}
    for name, weight in weights(subject.model).items():
        assert torch.equal(weight, before[name] * 0.25 if name in scaled else before[name]), name
    subject.restore()
    assert all(torch.equal(one, before[name]) for name, one in subject.model.named_parameters())


@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_the_dial_goes_from_the_copies_to_the_drawn_weights(format: Format, keep: bool) -> None:
    subject = Subject(TOY_LLAMA, CPU, 0, damped=True)
    dial, names = Dial(subject, format, keep=keep), list(subject.linears())
    assert dial.copied == names  # every linear layer of a toy can be quantised
    before = weights(subject.model)
    places = {name: subject.model.get_parameter(name).data_ptr() for name in names}
    for scale in (0.0, 0.25, 1.0):
        dial.turn(scale)
        for name, parameter in subject.model.named_parameters():
            copied = QuantisedWeight.of(before[name], format).dequantised() if name in names else before[name].float()
            wanted = copied + scale * (before[name].float() - copied)
            torch.testing.assert_close(parameter.float(), wanted, rtol=0.01, atol=1e-4)
    assert all(torch.equal(subject.model.get_parameter(name), before[name]) for name in before)
    assert all(subject.model.get_parameter(name).data_ptr() == place for name, place in places.items())  # in place


def test_rounding_does_not_depend_on_the_number_of_rows_at_a_time() -> None:
    weight = torch.randn(523, 64).to(torch.bfloat16)  # more than two parts
    for format in (INT4, INT8):
        assert torch.equal(rounded(weight, format), QuantisedWeight.of(weight, format).dequantised(torch.bfloat16))


def test_a_new_copy_of_the_target_is_as_far_away_as_the_draft_copy() -> None:
    dial = Dial(Subject(TOY_LLAMA, CPU, 0, damped=True), INT4)
    for scale in (0.25, 0.5, 1.0):
        dial.turn(scale)
        assert dial.requantised() == pytest.approx(1, abs=0.02)
    skip_set = SkipSet(attn={3}, mlp={3})  # of the middle layer
    dial.turn(1.0, skip_set, 0.25)
    assert dial.requantised(skip_set) == pytest.approx(1)  # skipped sub-layers are left out
    dial.turn(7.0)  # at this distance the new copy differs
    assert dial.requantised() < 0.5


# --- Passes, drafts and ceilings ---


def passes_of(target: dict[int, float], **drafts: float) -> Passes:
    return Passes(
        target={t: Times((seconds,)) for t, seconds in target.items()},
        drafts={name: Times((seconds,)) for name, seconds in drafts.items()},
        padded={},
        bytes=dict.fromkeys(drafts, 0),
    )


def test_timing_passes_keeps_the_length_of_the_cache() -> None:
    subject = Subject(TOYS[0], CPU, 0)
    spec, (prompts,) = subject.drafting(subject.skip_set, 3), subject.prompts(1, 3, 11)
    write(spec, prompts, 13)
    passes = round_passes(spec.runtime, prompts, 3, 17, TOY)
    assert all(seconds > 0 for seconds in vars(passes).values())
    assert spec.runtime.cache.lengths.tolist() == [17, 17, 17]


@pytest.mark.parametrize(
    ("target", "padding", "plain", "verify"),
    [
        # padding 2 to 3 would gain 1.4 %, which is noise
        ({1: 10.0, 2: 7.0, 3: 6.9, 4: 9.0, 5: 8.0}, [3, 2, 3, 5, 5], 6.9, {1: 7.0, 2: 6.9, 3: 8.0, 4: 8.0}),
        ({1: 10.0, 3: 10.1, 5: 11.0}, None, 10.0, {2: 10.1, 4: 11.0}),  # longer passes are slower
    ],
)
def test_target_passes_are_padded_to_clearly_faster_lengths(
    target: dict[int, float], padding: list[int] | None, plain: float, verify: dict[int, float]
) -> None:
    passes = passes_of(target)
    assert (passes.pass_lengths and passes.pass_lengths.target) == padding
    assert passes.better_plain.median == plain
    assert {gamma: passes.verify(gamma).median for gamma in passes.gammas} == verify


def test_draft_passes_are_padded_if_clearly_faster_and_not_quantised() -> None:
    times = {t: Times((seconds,)) for t, seconds in ((1, 10.0), (2, 9.7), (3, 9.5))}
    assert adopted_lengths(times) == {1: 3}
    assert adopted_lengths({1: times[1], 2: times[2]}) == {}  # 3 % is too little
    unsure = {1: Times((10.0, 9.0, 12.0, 9.0, 12.0)), 2: Times((9.0, 12.0, 9.0, 12.0, 9.0))}
    assert adopted_lengths(unsure) == {}  # 11 % by medians, but slower in two of five repeats
    model = TOY_LLAMA.build(CPU, 0)
    skipping, quantised_too = DraftSpec(skip_set=SkipSet(attn={1})), DraftSpec(quantised=Quantised.everything(INT4, 7))
    assert lengths_of(Runtime(model, skipping)) == (1, 2, 3)
    assert lengths_of(Runtime(model, quantised_too)) == (1,)


def test_the_ceiling_is_the_speedup_of_the_best_draft_length() -> None:
    passes = passes_of({1: 10.0, 2: 8.0, 3: 8.0, 4: 9.0}, cheap=2.0, dear=8.0)
    # Of plain passes of 8: (1 + a) / (2 + 8), (1 + a + a^2) / (4 + 8), (1 + a + a^2 + a^3) / (6 + 9).
    best = Ceiling.of(passes, "cheap", 0.9)
    assert (best.gamma, best.speedup) == (3, pytest.approx(8 * 3.439 / 15))
    assert best.speedup > max(8 * 1.9 / 10, 8 * 2.71 / 12)
    assert Ceiling.of(passes, "cheap", 0.5).gamma == 1  # 1.5 / 10 beats 1.75 / 12 and 1.875 / 15
    assert Ceiling.of(passes, "dear", 0.9).speedup == pytest.approx(8 * 1.9 / 16)


def test_names_of_drafts_say_format_head_and_skips() -> None:
    skip_set = SkipSet(attn={1, 2}, mlp={3, 4, 5})
    drafts = drafts_for([INT8, INT4], 7, 528, 128, skip_set)
    assert list(drafts)[:2] == ["bf16", "bf16, 36% skipped"]
    assert list(drafts)[-4:] == ["int4", "int4 and head", "int4, head of 128 tokens", "int4 and head, 36% skipped"]
    whole: Any = drafts["int4"].quantised
    assert not whole.head
    assert drafts["int4, head of 128 tokens"].vocabulary == SubVocabulary.of(range(128), 528)
    skipping = drafts["int4 and head, 36% skipped"]
    assert skipping == with_skips(INT4, 7, skip_set)
    assert {skipping.choice(kind, layer) for kind in ("attn", "mlp") for layer in range(7)} == {"skip", "quantise"}
