"""Aims: what ought to come out on one H200, beside what this run measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selfspec.benchmark.contenders import EARLY_EXIT, GENERATE


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure and its bound; `measured` is None where the run has no such figure: the aim is open."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_aims(
    shape: str,
    cells: Sequence[dict[str, Any]],
    peers: dict[str, Any] | None,
    search: dict[str, Any] | None,
) -> list[Aim]:
    """Each aim of this shape's cell of one row and 512 tokens, at agreement 0.9."""
    aimed = next(
        (c for c in cells if (c["shape"], c["rows"], c["context"], c["agreement_wanted"]) == (shape, 1, 512, 0.9)), {}
    )
    over = peers["ours_over"] if peers else {}
    return [
        _at_least("plain decoding over the bandwidth limit", aimed.get("share_of_limit"), 0.85),
        _at_least("measured over ideal speedup", aimed.get("efficiency"), 0.95),
        _at_least("ours over model.generate", over.get(GENERATE), 5),
        _at_least("ours over assistant_early_exit", over.get(EARLY_EXIT), 8),
        _at_most("seconds of a full search", search["seconds"] if search else None, 120),
    ]


def _at_least(name: str, measured: float | None, bound: float) -> Aim:
    met = None if measured is None else measured >= bound
    return Aim(name=name, wanted=f"at least {bound:g}", measured=measured, met=met)


def _at_most(name: str, measured: float | None, bound: float) -> Aim:
    met = None if measured is None else measured <= bound
    return Aim(name=name, wanted=f"at most {bound:g}", measured=measured, met=met)
