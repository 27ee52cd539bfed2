"""Dial: sets the distance between target and draft, and so their agreement. *Time real, agreement set.*

Two scales, alone or together:

- The output projections of the skipped sub-layers are scaled in the target. At scale 0, a draft that skips these
  sub-layers equals the target.
- A quantised draft holds Wq, the quantised copy of the drawn weights W0. The target's weights are set in place to
  Wq + s (W0 - Wq). At s = 0, target and draft differ only by kernels and by rounding to bfloat16. `requantised`
  compares Wq with a new quantised copy of this target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfspec import Format, SkipSet
from selfspec.models.quantised_linear import QuantisedWeight, linear_unsupported_reason
from shapes.agreement import PROJECTIONS
from shapes.subject import Subject

ROWS_AT_ONCE, MANY_ROWS = 256, 4096
"""Rows that are rounded together on a CPU, whose caches hold them, and on a GPU."""


class Dial:
    """Sets the target's weights from the drawn weights, so that no weight is rounded or scaled twice.

    Args:
        format: of the draft's copies; None if the draft only skips.
        keep: hold W0 and Wq in memory, which takes twice the memory of the weights. Otherwise each turn draws and
            rounds the weights again: a second on a GPU, a minute on a CPU.
    """

    def __init__(self, subject: Subject, format: Format | None = None, *, keep: bool = False) -> None:
        self.subject, self.format, self.keep = subject, format, keep
        linears = subject.linears() if format is not None else {}
        self.copied = [name for name, linear in linears.items() if linear_unsupported_reason(linear, format) is None]  # type: ignore[arg-type]
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def turn(self, scale: float = 1.0, skip_set: SkipSet | None = None, skipped_scale: float = 1.0) -> None:
        """Set s and the scale of the skipped sub-layers' outputs; undo the turn before."""
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
        """The distance of the target's weights from a new quantised copy, over their distance from the draft's copy.

        Measured on the middle decoder layer, without the scaled output projections of skipped sub-layers.
        """
        middle = [name for name in self.copied if f".{self.subject.num_layers // 2}." in name]
        from_new = from_draft = 0.0
        for name in {*middle} - projections(skip_set):
            weight = self.subject.model.get_parameter(name)
            from_new += self._squared_error(weight, weight)
            from_draft += self._squared_error(weight, self.subject.drawn(name))
        return float((from_new / from_draft) ** 0.5)

    def _squared_error(self, weight: Tensor, copied_from: Tensor) -> float:
        """Between `weight` and the quantised copy of `copied_from`."""
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
    """The dequantised copy of a weight, computed some rows at a time: rows are quantised independently."""
    rows = weight.split(ROWS_AT_ONCE if weight.device.type == "cpu" else MANY_ROWS)
    return torch.cat([QuantisedWeight.of(some, format).dequantised(dtype or weight.dtype) for some in rows])


def projections(skip_set: SkipSet | None) -> set[str]:
    """Names of the output projections of a skip set's sub-layers."""
    return {f"model.layers.{layer}.{PROJECTIONS[kind]}.weight" for kind, layer in skip_set or ()}
