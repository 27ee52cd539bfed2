"""Ceilings: the most that an agreement and the measured passes allow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpu_bench.limits import expected_tokens, ideal_speedup

from quantised_bench.passes import Passes


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best draft length, and the speedup over the better plain decoding if passes were all that takes time."""

    draft: str
    agreement: float
    gamma: int
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": round(self.speedup, 4)}


def ceiling(passes: Passes, draft: str, agreement: float) -> Ceiling:
    """max over gamma of ((1 - a^(gamma+1)) / (1 - a)) / (gamma c + verify), costs in passes of plain decoding."""

    def speedup(gamma: int) -> float:
        return ideal_speedup(expected_tokens(agreement, gamma), gamma, passes.of(draft, gamma))

    best = max(passes.gammas, key=speedup)
    return Ceiling(draft=draft, agreement=agreement, gamma=best, speedup=speedup(best))
