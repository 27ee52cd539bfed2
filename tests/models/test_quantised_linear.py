"""Quantised linear layers: kernels multiply by the rounded weight, and the rounding errors are bounded.

The tests compare products with float32 to within bfloat16 rounding, because kernels take and return bfloat16. Some
processors also round the weights to bfloat16: the bound allows for both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import selfspec.models.quantised_linear
from selfspec import Format
from selfspec.models.quantised_linear import (
    DequantisedLinear,
    Int4Linear,
    Int8Linear,
    QuantisedWeight,
    device_unsupported_reason,
    linear_unsupported_reason,
    quantise,
    quantised_bytes,
)
from selfspec.plan.draft_spec import GROUP_SIZES, INT4, INT8

pytestmark = pytest.mark.rounding

CPU = torch.device("cpu")
GROUPED = [Format("int4", size) for size in GROUP_SIZES]
EPS = torch.finfo(torch.bfloat16).eps
"""Twice the largest relative error of rounding to bfloat16."""

ALL = [*GROUPED, INT8]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide_inputs(format: Format) -> int:
    """A number of inputs that makes an odd number of groups."""
    return 3 * (format.group_size or 16)


def as_read(rows: Tensor) -> Tensor:
    """The inputs after the kernel rounds them to bfloat16."""
    return rows.bfloat16().float()


def bound(read: Tensor, rounded: Tensor) -> Tensor:
    """The largest error of a product: from rounding the outputs and the weights."""
    return EPS / 2 * ((read @ rounded.T).abs() + read.abs() @ rounded.abs().T)


# --- Products ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ALL, ids=str)
def test_a_kernel_multiplies_by_the_dequantised_weight(format: Format, dtype: torch.dtype) -> None:
    inputs = wide_inputs(format)
    weight, rows = random(80, inputs).to(dtype), random(7, inputs, seed=1).to(dtype)
    ours = quantise(weight, None, format)(rows)
    read, rounded = as_read(rows.float()), QuantisedWeight.of(weight, format).dequantised()
    expected = read @ rounded.T
    assert (ours.dtype, ours.shape) == (dtype, (7, 80))
    assert ((ours.float() - expected).abs() <= bound(read, rounded)).all()
    assert (expected - read @ weight.float().T).abs().mean() > 0.003 * expected.abs().mean(), "no effect of rounding"


@pytest.mark.parametrize("format", ALL, ids=str)
def test_every_weight_is_packed_at_its_own_position(format: Format) -> None:
    # The product with a one-hot row is a column of the weight in any order of sums.
    inputs = wide_inputs(format)
    weight = random(48, inputs)
    columns = quantise(weight, None, format)(torch.eye(inputs)).T
    rounded = QuantisedWeight.of(weight, format).dequantised()
    torch.testing.assert_close(columns, rounded, rtol=EPS, atol=0)


@pytest.mark.parametrize("format", ALL, ids=str)
def test_the_product_of_a_row_does_not_depend_on_other_rows(format: Format) -> None:
    inputs = 256
    layer, rows = quantise(random(208, inputs), None, format), random(37, inputs, seed=1)
    together = layer(rows)
    for first, last in ((0, 1), (3, 4), (0, 2), (5, 10), (4, 20), (1, 33), (36, 37)):
        assert torch.equal(layer(rows[first:last]), together[first:last])
    assert torch.equal(layer(rows.flip(0)).flip(0), together)


@pytest.mark.parametrize("many_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ALL, ids=str)
def test_rows_of_any_shape_and_layout_are_accepted(format: Format, dtype: torch.dtype, many_tokens: bool) -> None:
    layer = quantise(random(48, 256), None, format, many_tokens=many_tokens)
    rows = random(2 * 3 * 5, 256, seed=1).to(dtype)
    flat = layer(rows)
    assert torch.equal(layer(rows.view(2, 3, 5, 256)), flat.view(2, 3, 5, 48))
    assert torch.equal(layer(rows[0]), flat[0])
    assert torch.equal(layer(rows[::2]), flat[::2])
    assert torch.equal(layer(rows.T.contiguous().T), flat)
    assert torch.equal(layer(rows.view(2, 15, 256)[:, -1:]), flat.view(2, 15, 48)[:, -1:])
    assert torch.equal(layer(torch.cat([rows, rows], dim=1)[:, 256:]), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ALL, ids=str)
def test_a_bias_is_shared_and_added_in_the_dtype_of_the_model(format: Format, dtype: torch.dtype) -> None:
    weight, bias, rows = random(48, 256).to(dtype), random(48, seed=2).to(dtype), random(3, 256, seed=1).to(dtype)
    for many_tokens in (False, True):
        with_bias = quantise(weight, nn.Parameter(bias), format, many_tokens=many_tokens)
        without = quantise(weight, None, format, many_tokens=many_tokens)
        assert torch.equal(with_bias(rows), without(rows) + bias)
        assert with_bias(rows).dtype == dtype
        assert with_bias.bias is not None
        assert with_bias.bias.data_ptr() == bias.data_ptr()
        assert len(list(with_bias.buffers())) == len(list(without.buffers()))


@pytest.mark.parametrize("format", ALL, ids=str)
def test_the_layer_for_many_tokens_equals_the_kernel_in_float32(format: Format) -> None:
    inputs = wide_inputs(format)
    weight, rows = random(80, inputs), random(301, inputs, seed=1)
    kernel, many = quantise(weight, None, format), quantise(weight, None, format, many_tokens=True)
    assert isinstance(many, DequantisedLinear)
    ours, theirs = many(rows), kernel(rows)
    read, rounded = as_read(rows), QuantisedWeight.of(weight, format).dequantised()
    assert ((ours - theirs).abs() <= bound(read, rounded) + EPS / 2 * theirs.abs()).all()
    # The only rounding errors: float32 sums in any order (Higham 2002, section 3.1), and the outputs.
    exact, summed = read.double() @ rounded.double().T, read.double().abs() @ rounded.double().abs().T
    in_float32 = inputs * torch.finfo(torch.float32).eps * summed
    assert ((ours - exact).abs() <= in_float32 + EPS / 2 * (exact.abs() + in_float32)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ALL, ids=str)
def test_the_layer_for_many_tokens_rounds_its_weight_to_bfloat16_in_other_dtypes(
    format: Format, dtype: torch.dtype
) -> None:
    inputs = wide_inputs(format)
    weight, rows = random(80, inputs).to(dtype), random(31, inputs, seed=1).to(dtype)
    rounded = QuantisedWeight.of(weight, format).dequantised(torch.bfloat16)
    ours = quantise(weight, None, format, many_tokens=True)(rows)
    assert ours.dtype == dtype
    assert torch.equal(ours, nn.functional.linear(rows.bfloat16(), rounded).to(dtype))


def test_every_format_has_its_own_layer() -> None:
    weight = random(16, 32)
    assert type(quantise(weight, None, INT4)) is Int4Linear
    assert type(quantise(weight, None, INT8)) is Int8Linear
    assert type(quantise(weight, None, INT8, many_tokens=True)) is DequantisedLinear


# --- Memory ---


@pytest.mark.parametrize("many_tokens", [False, True])
@pytest.mark.parametrize("format", ALL, ids=str)
def test_predicted_memory_is_exact(format: Format, many_tokens: bool) -> None:
    for outputs, inputs in ((16, 256), (208, 768), (4112, 256)):
        layer = quantise(random(outputs, inputs), random(outputs), format, many_tokens=many_tokens)
        held = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in layer.buffers()}
        assert quantised_bytes(outputs, inputs, format) == sum(held.values())
        assert not layer.state_dict()
        assert not list(layer.parameters())


def test_predicted_memory_equals_memory_computed_by_hand() -> None:
    assert quantised_bytes(16, 64, INT4) == 16 * 64 // 2 + 16 * 2 * (2 + 2)
    assert quantised_bytes(16, 64, INT8) == 16 * 64 + 16 * 2


@pytest.mark.parametrize("format", ALL, ids=str)
def test_a_quantised_layer_does_not_share_the_weight(format: Format) -> None:
    weight = random(48, 256)
    layer, rows = quantise(weight, None, format), random(3, 256, seed=1)
    before = layer(rows)
    weight.zero_()
    assert torch.equal(layer(rows), before)


# --- Rounding ---


def test_the_error_of_int8_is_at_most_half_a_step() -> None:
    weight = random(47, 301) * torch.logspace(-6, 3, 47)[:, None]
    rounded = QuantisedWeight.of(weight, INT8)
    assert rounded.values.dtype == torch.int8
    assert rounded.values.abs().amax(dim=1).eq(127).all(), "every row must use the whole range"
    assert ((rounded.dequantised() - weight).abs() <= 0.501 * rounded.scales).all()


@pytest.mark.parametrize("format", GROUPED, ids=str)
def test_the_error_of_int4_is_below_the_error_of_min_max_rounding(format: Format) -> None:
    size = format.group_size
    assert size is not None
    for weight in (random(101, 2 * size), random(101, 2 * size).pow(3), torch.rand(101, 2 * size) + 3):
        rounded = QuantisedWeight.of(weight, format)
        assert rounded.values.max() == 15
        assert rounded.values.min() == 0
        ours = (rounded.dequantised() - weight).square()
        groups = weight.view(101, 2, size)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / 15
        plain = ((groups - low) / step).round() * step + low  # float32 scales, which no kernel accepts
        theirs = (plain.view_as(weight) - weight).square()
        assert ours.mean() < theirs.mean()


def test_int4_rounds_each_group_independently() -> None:
    weight = random(16, 4 * 32)
    changed = weight.clone()
    changed[:, 32:64] = 1000 * random(16, 32, seed=1)
    same = QuantisedWeight.of(weight, INT4).dequantised() == QuantisedWeight.of(changed, INT4).dequantised()
    assert same[:, :32].all()
    assert same[:, 64:].all()
    assert not same[:, 32:64].all()


@pytest.mark.parametrize("format", ALL, ids=str)
def test_rounding_in_parts_equals_rounding_at_once(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(50, 256)
    whole = QuantisedWeight.of(weight, format)
    monkeypatch.setattr(selfspec.models.quantised_linear, "ROUNDING_ROWS_ON_CPU", 7)
    parts = QuantisedWeight.of(weight, format)
    assert torch.equal(parts.dequantised(), whole.dequantised())
    assert parts.values.dtype == whole.values.dtype


@given(
    st.sampled_from(ALL),
    st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e-30, -1e-8, 1e30, -1e30]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equal_weights_are_rounded_with_a_small_error(format: Format, value: float, dtype: torch.dtype) -> None:
    weight = torch.full((16, 2 * (format.group_size or 16)), value, dtype=dtype)
    weight[8:] = 0
    back = QuantisedWeight.of(weight, format).dequantised()
    assert back.isfinite().all()
    torch.testing.assert_close(back, weight.float(), rtol=EPS, atol=1e-6)


@pytest.mark.parametrize("many_tokens", [False, True])
@pytest.mark.parametrize("format", ALL, ids=str)
def test_zero_weights_and_groups_of_equal_weights_have_finite_products(format: Format, many_tokens: bool) -> None:
    weight = random(48, 512)
    weight[:, :256] = 0.1
    weight[:16] = 0
    rows = random(3, 512, seed=1)
    ours = quantise(weight, None, format, many_tokens=many_tokens)(rows)
    assert ours.isfinite().all()
    assert not ours[:, :16].any()
    mean = (rows[:, :256].sum(dim=1, keepdim=True) * 0.1 + rows[:, 256:] @ weight[16:, 256:].T).abs().mean()
    assert (ours[:, 16:] - rows @ weight[16:].T).abs().mean() < 0.2 * mean


# --- Layers and devices that are not supported ---


@pytest.mark.parametrize(
    ("outputs", "inputs", "format", "reason"),
    [
        (16, 32, INT4, None),
        (16, 16, INT4, "int4 in groups of 32 takes inputs in multiples of 32 and outputs of 16, but it has 16 and 16"),
        (16, 48, INT4, "it has 48 and 16"),
        (24, 32, INT4, "it has 32 and 24"),
        (16, 96, Format("int4", 64), "int4 in groups of 64 takes inputs in multiples of 64"),
        (16, 128, Format("int4", 256), "takes inputs in multiples of 256 and outputs of 16, but it has 128 and 16"),
        (16, 16, INT8, None),
        (16, 24, INT8, "int8 takes inputs in multiples of 16 and outputs of 16, but it has 24 and 16"),
        (17, 16, INT8, "it has 16 and 17"),
    ],
)
def test_unsupported_sizes_are_refused_with_the_reason(
    outputs: int, inputs: int, format: Format, reason: str | None
) -> None:
    unsupported_reason = linear_unsupported_reason(nn.Linear(inputs, outputs), format)
    if reason is None:
        assert unsupported_reason is None
    else:
        assert unsupported_reason is not None
        assert unsupported_reason.endswith(reason) or unsupported_reason.startswith(reason)
        assert "\n" not in unsupported_reason


@pytest.mark.parametrize("format", ALL, ids=str)
def test_products_of_the_smallest_supported_sizes_are_right(format: Format) -> None:
    least = format.group_size or 16
    for outputs, inputs in ((16, least), (48, least), (16, 5 * least), (112, 7 * least)):
        linear = nn.Linear(inputs, outputs, bias=False)
        assert linear_unsupported_reason(linear, format) is None
        rows, rounded = random(3, inputs), QuantisedWeight.of(linear.weight, format).dequantised()
        read = as_read(rows)
        ours = quantise(linear.weight, None, format)(rows)
        assert ((ours - read @ rounded.T).abs() <= bound(read, rounded)).all()


class Adapted(nn.Linear):
    """A subclass, as adapters and quantisers make."""


class Packed(Tensor):
    """A tensor subclass."""


def with_weight(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(32, 16)
    del linear.weight
    linear.weight = weight  # type: ignore[assignment]
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Adapted(32, 16), "it is not a plain linear layer"),
        (nn.Embedding(16, 32), "it is not a plain linear layer"),
        (with_weight(torch.zeros(16, 32).as_subclass(Packed)), "it is not a plain linear layer"),
        (nn.Linear(32, 16).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn already"),
        (with_weight(torch.zeros(16, 32, dtype=torch.int8)), "its weight is torch.int8 already"),
    ],
    ids=["a subclass", "another module", "a tensor subclass", "8-bit floats", "integers"],
)
def test_other_modules_and_weights_are_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    for format in (INT4, INT8):
        assert linear_unsupported_reason(module, format) == reason


def test_a_device_without_a_kernel_is_refused_with_a_one_line_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("Could not run 'aten::_weight_int8pack_mm'\nand a page of backends")

    assert all(device_unsupported_reason(format, CPU) is None for format in ALL)
    monkeypatch.setattr(selfspec.models.quantised_linear, "quantise", missing)
    device_unsupported_reason.cache_clear()
    try:
        reason = device_unsupported_reason(INT8, CPU)
    finally:
        device_unsupported_reason.cache_clear()
    assert reason is not None
    assert reason.endswith("has no kernel for int8 on cpu: Could not run 'aten::_weight_int8pack_mm'")
