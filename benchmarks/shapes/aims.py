"""Aims: the figures that one H200 should reach, and the figures of this run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfspec.benchmark.contenders import EARLY_EXIT, GENERATE


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure and its bound. `measured` is None if the run has not measured the figure: the aim is open."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None

    @classmethod
    def of(cls, name: str, measured: float | None, bound: float, *, most: bool = False) -> Aim:
        """An aim with a lower bound, or with an upper bound if `most`."""
        met = None if measured is None else measured <= bound if most else measured >= bound
        return cls(name=name, wanted=f"at {'most' if most else 'least'} {bound:g}", measured=measured, met=met)


def judge_aims(
    shape: str, cells: Sequence[dict[str, Any]], peers: dict[str, Any] | None, search: dict[str, Any] | None
) -> list[Aim]:
    """The aims of the shape's cell with one row, 512 tokens and agreement 0.9."""
    aimed = next(
        (c for c in cells if (c["shape"], c["rows"], c["context"], c["agreement_wanted"]) == (shape, 1, 512, 0.9)), {}
    )
    over = peers["ours_over"] if peers else {}
    return [
        Aim.of("plain decoding over the bandwidth limit", aimed.get("share_of_limit"), 0.85),
        Aim.of("measured over ideal speedup", aimed.get("efficiency"), 0.95),
        Aim.of("ours over model.generate", over.get(GENERATE), 5),
        Aim.of("ours over assistant_early_exit", over.get(EARLY_EXIT), 8),
        Aim.of("seconds of a full search", search["seconds"] if search else None, 120, most=True),
    ]
