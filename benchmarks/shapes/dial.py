"""Dial: how far the target is from what its draft has. *Time real, agreement set.*

Two things can be turned, alone or together:

- What the skipped sub-layers give: their output projections are scaled in the target. At 0 a draft that skips them is
  the target; the larger the scale, the more the target does that the draft leaves out.
- What rounding took: a draft's copies are made of the weights as they were drawn, W0, and hold Wq. The target's weights
  are set, in place, to Wq + s (W0 - Wq). At s = 0 target and draft differ by nothing but kernels and bfloat16. A copy
  of this target would be nearly Wq again: `requantised` measures how nearly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfspec import Format, SkipSet
from selfspec.models.quantised_linear import QuantisedWeight, linear_unsupported_reason
from shapes.agreement import PROJECTIONS
from shapes.subject import Subject

ROWS_AT_ONCE, MANY_ROWS = 256, 4096
"""On a CPU rounding is several times as fast where what it computes stays in the caches; a GPU wants more at once."""


class Dial:
    """Sets the target's weights. They are drawn again at every turn, so nothing is rounded or scaled twice.

    Args:
        format: of the draft's copies; None where the draft only skips.
        keep: hold W0 and Wq in memory, as much again as the weights, twice; else they are drawn and rounded again at
            every turn, which takes a GPU a second, and a CPU a minute.
    """

    def __init__(self, subject: Subject, format: Format | None = None, *, keep: bool = False) -> None:
        self.subject, self.format, self.keep = subject, format, keep
        linears = subject.linears() if format is not None else {}
        self.copied = [name for name, linear in linears.items() if linear_unsupported_reason(linear, format) is None]  # type: ignore[arg-type]
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def turn(self, scale: float = 1.0, skip_set: SkipSet | None = None, skipped_scale: float = 1.0) -> None:
        """Set s, and the scale of what the sub-layers of a skip set give; leave nothing of the turn before."""
        skipped, subject = projections(skip_set), self.subject
        for name in {*self.copied, *skipped, *subject.moved}:
            weight = subject.model.get_parameter(name)
            if name in self.copied:
                drawn, copied = self._ends(name)
                torch.lerp(copied, drawn, scale, out=weight)
            else:
                subject.draw(name, weight)
            if name in skipped:
                weight.mul_(skipped_scale)
        subject.moved = {*self.copied, *skipped}

    @torch.no_grad()
    def requantised(self, skip_set: SkipSet | None = None) -> float:
        """How far the target is from a copy made of it now, over how far it is from the draft's: 1 if equally far.

        Of the linear layers of one decoder layer, in the middle, but those whose outputs are skipped and so scaled.
        """
        middle = [name for name in self.copied if f".{self.subject.num_layers // 2}." in name]
        from_new = from_draft = 0.0
        for name in {*middle} - projections(skip_set):
            weight = self.subject.model.get_parameter(name)
            from_new += self._squared_error(weight, weight)
            from_draft += self._squared_error(weight, self.subject.drawn(name))
        return float((from_new / from_draft) ** 0.5)

    def _squared_error(self, weight: Tensor, copied_from: Tensor) -> float:
        """Between a weight and a copy made of another."""
        assert self.format is not None
        return (weight.float() - rounded(copied_from, self.format, torch.float32)).square().sum().item()

    def _ends(self, name: str) -> tuple[Tensor, Tensor]:
        """W0 and Wq."""
        if name in self._kept:
            return self._kept[name]
        assert self.format is not None
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


def projections(skip_set: SkipSet | None) -> set[str]:
    """The weights by which the sub-layers of a skip set give what they give."""
    return {f"model.layers.{layer}.{PROJECTIONS[kind]}.weight" for kind, layer in skip_set or ()}
