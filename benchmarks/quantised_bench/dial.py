"""Dial: how far the target is from what its draft's copies hold. *Time real, agreement set.*

The copies are made of the weights as they were drawn, W0, and hold Wq, what rounding left of them. Then the target's
weights are set, in place, to Wq + s (W0 - Wq). At s = 0 target and draft differ by nothing but kernels and bfloat16;
the larger s, the more the target has that the draft has not. A copy that was made anew of such a target would be Wq
again, all but exactly: `requantised` tells how nearly.
"""

from __future__ import annotations

import torch
from gpu_bench.agreement import PROJECTIONS
from torch import Tensor

from quantised_bench.subject import Subject
from selfspec import Format, SkipSet
from selfspec.models.quantised_linear import QuantisedWeight, linear_unsupported_reason

ROWS_AT_ONCE, MANY_ROWS = 256, 4096
"""On a CPU rounding is several times as fast where what it computes stays in the caches; a GPU wants more at once."""


class Dial:
    """Sets the target's weights.

    Args:
        keep: hold W0 and Wq in memory, as much again as the weights, twice; else they are drawn and rounded again at
            every turn, which takes a GPU a second, and a CPU a minute.
    """

    def __init__(self, subject: Subject, format: Format, *, keep: bool) -> None:
        self.subject, self.format, self.keep = subject, format, keep
        linears = subject.linears()
        self.names = [name for name, linear in linears.items() if linear_unsupported_reason(linear, format) is None]
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def turn(self, scale: float, skip_set: SkipSet | None = None, skipped_scale: float = 1.0) -> None:
        """Set s; and scale what the sub-layers of a skip set give, which a draft without them lacks."""
        self.subject.moved.update(self.names)
        for name in self.names:
            drawn, copied = self._ends(name)
            weight = self.subject.model.get_parameter(name)
            torch.lerp(copied, drawn, scale, out=weight)
            if skip_set is not None and _is_of(skip_set, name):
                weight.mul_(skipped_scale)

    @torch.no_grad()
    def requantised(self, skip_set: SkipSet | None = None) -> float:
        """How far the target is from a copy made of it now, over how far it is from the draft's: 1 if equally far.

        Of the linear layers of one decoder layer, in the middle, but those whose outputs are skipped and so scaled.
        """
        sample = [
            name
            for name in self.names
            if f".{self.subject.num_layers // 2}." in name and not (skip_set and _is_of(skip_set, name))
        ]
        from_new = from_draft = 0.0
        for name in sample:
            weight = self.subject.model.get_parameter(name)
            from_new += self._squared_error(weight, weight)
            from_draft += self._squared_error(weight, self.subject.drawn(name))
        return float((from_new / from_draft) ** 0.5)

    def _squared_error(self, weight: Tensor, copied_from: Tensor) -> float:
        """Between a weight and a copy made of another."""
        copy = rounded(copied_from, self.format, torch.float32)
        return (weight.float() - copy).square().sum().item()

    def _ends(self, name: str) -> tuple[Tensor, Tensor]:
        """W0 and Wq."""
        if name in self._kept:
            return self._kept[name]
        drawn = self.subject.drawn(name)
        ends = drawn, rounded(drawn, self.format)
        if self.keep:
            self._kept[name] = ends
        return ends


@torch.no_grad()
def rounded(weight: Tensor, format: Format, dtype: torch.dtype | None = None) -> Tensor:
    """What a copy of a weight holds, some rows at a time: a row's does not depend on the others."""
    rows = weight.split(ROWS_AT_ONCE if weight.device.type == "cpu" else MANY_ROWS)
    return torch.cat([QuantisedWeight.of(some, format).dequantised(dtype or weight.dtype) for some in rows])


def _is_of(skip_set: SkipSet, name: str) -> bool:
    return any(name == f"model.layers.{layer}.{PROJECTIONS[kind]}.weight" for kind, layer in skip_set)
