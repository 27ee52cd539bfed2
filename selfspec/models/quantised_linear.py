"""Quantised linear layers: rounded weights, multiplied by PyTorch's own kernels for quantised weights.

Each product is one operator on plain tensors, which graphs capture and compilers support. torchao (release 0.18) calls
the same 4-bit operators through a tensor subclass, which adds 20 us of Python per layer: as long as a small layer
takes. Its 8-bit weights become floats in every call: 14 ms for a layer that takes 1.4 ms in bfloat16, and 0.4 ms here.

Activations are bfloat16 whatever the model's dtype: the kernels are fast only in bfloat16, and a draft need not be
exact. On a CPU, a row's product does not depend on the other rows.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange
from torch import Tensor, nn

from selfspec.plan.draft_spec import Format

COMPUTE = torch.bfloat16
ROUNDING_ROWS, ROUNDING_ROWS_ON_CPU = 4096, 256
"""Rows of a weight that are rounded together: rounding holds several float32 copies of the rows."""
INT4_FITS = 3
"""Least-squares fits of the 4-bit scales: more fits change little."""
ALIGNED = 16
"""Elements: sizes must be multiples. With other sizes, some kernels read outside the weight."""


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A rounded weight `n k`: `(values - 8) * scales + zeros` for int4, `values * scales` for int8.

    Attributes:
        values: `n k`, one byte each: 0 to 15 for int4, -127 to 127 for int8.
        scales: `n g` for `g` groups of inputs, float32.
        zeros: `n g`, float32; None for int8.
    """

    format: Format
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    @torch.inference_mode()
    def of(cls, weight: Tensor, format: Format) -> QuantisedWeight:
        """Round a weight of any floating-point dtype on its own device."""
        round_to = {"int4": _round_to_int4, "int8": _round_to_int8}[format.name]
        rows = ROUNDING_ROWS_ON_CPU if weight.device.type == "cpu" else ROUNDING_ROWS
        parts = [round_to(part.float(), format) for part in weight.detach().split(rows)]
        values, scales, zeros = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        assert values is not None
        assert scales is not None
        return cls(format, values, scales, zeros)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight after rounding, `n k`."""
        groups = rearrange(self.values.float(), "n (g i) -> n g i", g=self.scales.shape[1])
        if self.zeros is None:
            weight = groups * self.scales[..., None]
        else:
            weight = (groups - 8) * self.scales[..., None] + self.zeros[..., None]
        return rearrange(weight, "n g i -> n (g i)").to(dtype)


def _round_to_int4(weight: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to 16 levels between the minimum and the maximum of each group, then alternate two steps.

    One step fits scales and zeros to the rounded weights by least squares, the other rounds again. On normally
    distributed weights the fits reduce the error by 7 %.
    """
    groups = rearrange(weight, "n (g i) -> n g i", i=format.group_size)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales, values = _as_kernels_read((high - low) / 15), groups
    zeros = (low + 8 * scales).to(COMPUTE).float()
    for fit in range(INT4_FITS + 1):
        values = ((groups - zeros) / scales + 8).round_().clamp_(0, 15)
        if fit < INT4_FITS:
            scales, zeros = _fitted(values - 8, groups)
    return values.to(torch.uint8).flatten(1), scales[..., 0], zeros[..., 0]


def _fitted(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scales and zeros `n g 1` that map `values` to `groups`, both `n g i`."""
    middle, mean = values.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    around = values - middle
    slope = (around * (groups - mean)).sum(-1, keepdim=True) / around.square().sum(-1, keepdim=True).clamp(min=1e-9)
    scales = _as_kernels_read(slope)
    return scales, (mean - scales * middle).to(COMPUTE).float()


def _as_kernels_read(scales: Tensor) -> Tensor:
    """Round scales to the kernels' dtype, and avoid zero scales: a group of equal weights has range 0."""
    return scales.clamp(min=1e-9).to(COMPUTE).float()


def _round_to_int8(weight: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    scales = _as_kernels_read(weight.abs().amax(dim=-1, keepdim=True) / 127)
    return (weight / scales).round_().clamp_(-127, 127).to(torch.int8), scales, None


class QuantisedLinear(nn.Module):
    """A linear layer with a quantised weight. A subclass implements the product of one format.

    Args:
        weight: `n k`.
        bias: `n`, shared with the original layer; None if the original has no bias.
    """

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.format = weight.format
        self.out_features, self.in_features = weight.values.shape
        self.bias = None if bias is None else bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features).to(COMPUTE).contiguous()  # kernels require this
        outputs = self.product(rows).to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """The product of `rows` (`r k`, bfloat16) and the weight: `r n`."""

    def _register(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)


class Int4Linear(QuantisedLinear):
    """An int4 layer. The kernel unpacks the weights as it multiplies."""

    packed: Tensor
    scales_and_zeros: Tensor  # g n 2

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        assert weight.zeros is not None
        assert weight.format.group_size is not None
        self.group_size = weight.format.group_size
        pairs = rearrange(torch.stack([weight.scales, weight.zeros]), "pair n g -> g n pair").to(COMPUTE)
        self._register(packed=_pack(weight.values), scales_and_zeros=pairs)

    def product(self, rows: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        if rows.device.type == "cuda":
            multiply = torch.ops.aten._weight_int4pack_mm
        return multiply(rows, self.packed, self.group_size, self.scales_and_zeros)  # type: ignore[no-any-return]


def _pack(values: Tensor) -> Tensor:
    """Pack two values into a byte, in the order of the device's kernel."""
    if values.device.type != "cuda":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)  # type: ignore[no-any-return]
    pairs = values[:, ::2] << 4 | values[:, 1::2]
    tiles = next(tiles for tiles in (8, 4, 2) if values.shape[1] % (tiles * ALIGNED) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)  # type: ignore[no-any-return]


class Int8Linear(QuantisedLinear):
    """An int8 layer. The kernel converts the weights as it multiplies."""

    values: Tensor
    scales: Tensor  # n

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._register(values=weight.values, scales=weight.scales[:, 0].to(COMPUTE))

    def product(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.values, self.scales)  # type: ignore[no-any-return]


class DequantisedLinear(QuantisedLinear):
    """The same layer for passes over thousands of tokens, as in a replay: each call dequantises the weight.

    The 4-bit and 8-bit kernels are slow in long passes. In float32 the outputs equal the kernels' except for the order
    of sums. In bfloat16 the dequantised weight is also rounded to bfloat16.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias)
        self._dtype = dtype if dtype == torch.float32 else COMPUTE
        self._packed = weight.zeros is not None
        values = weight.values[:, ::2] << 4 | weight.values[:, 1::2] if self._packed else weight.values
        self._register(values=values, scales=weight.scales.to(COMPUTE))
        if weight.zeros is not None:
            self._register(zeros=weight.zeros.to(COMPUTE))

    def product(self, rows: Tensor) -> Tensor:
        values, zeros = self.values, None
        if self._packed:
            values = rearrange(torch.stack([values >> 4, values & 15]), "pair n k -> n (k pair)")
            zeros = self.zeros.float()
        weight = QuantisedWeight(self.format, values, self.scales.float(), zeros).dequantised(self._dtype)
        return nn.functional.linear(rows.to(self._dtype), weight).to(COMPUTE)


_KERNELS: dict[str, type[QuantisedLinear]] = {"int4": Int4Linear, "int8": Int8Linear}


def quantise(weight: Tensor, bias: Tensor | None, format: Format, *, many_tokens: bool = False) -> QuantisedLinear:
    """A quantised copy of a linear layer, for passes over a few tokens or over `many_tokens`.

    Call `linear_unsupported_reason` and `device_unsupported_reason` first.
    """
    rounded = QuantisedWeight.of(weight, format)
    if many_tokens:
        return DequantisedLinear(rounded, bias, weight.dtype)
    return _KERNELS[format.name](rounded, bias)


def quantised_bytes(outputs: int, inputs: int, format: Format) -> int:
    """Bytes: memory of the quantised copy of a linear layer, without its bias."""
    if format.name == "int4":
        return outputs * inputs // 2 + 2 * COMPUTE.itemsize * outputs * (inputs // (format.group_size or inputs))
    return outputs * inputs + COMPUTE.itemsize * outputs


def linear_unsupported_reason(linear: nn.Module, format: Format) -> str | None:
    """Why a module cannot be quantised to this format, or None if it can."""
    if type(linear) is not nn.Linear or type(linear.weight) not in (Tensor, nn.Parameter):
        return "it is not a plain linear layer"
    outputs, inputs = linear.weight.shape
    if not linear.weight.dtype.is_floating_point or linear.weight.dtype.itemsize < 2:
        return f"its weight is {linear.weight.dtype} already"
    if outputs % ALIGNED or inputs % (format.group_size or ALIGNED):
        wanted = f"inputs in multiples of {format.group_size or ALIGNED} and outputs of {ALIGNED}"
        return f"{format} takes {wanted}, but it has {inputs} and {outputs}"
    return None


@cache
def device_unsupported_reason(format: Format, device: torch.device) -> str | None:
    """Why this device cannot multiply in a format, or None if it can. Tries a small product."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = max(128, format.group_size or 0)
    try:
        quantise(torch.ones(size, size, device=device), None, format)(torch.ones(1, size, device=device))
    except (NotImplementedError, RuntimeError) as error:
        return f"PyTorch {torch.__version__} has no kernel for {format} on {where}: {str(error).splitlines()[0]}"
    return None
