"""Ceilings: what this device can do at most, measured in this run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from selfspec.utils.statistics import median_seconds
from shapes.effort import Effort


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes read and written per second by a copy within the device's memory, and bf16 operations per second of a
    matrix product."""

    copy_bytes_per_second: float
    matmul_flops: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.inference_mode()
def measure_ceilings(device: torch.device, effort: Effort) -> Ceilings:
    """Both, on random data: zeros may run faster."""
    source = torch.rand(effort.copy_bytes // 4, device=device)
    target, n = torch.empty_like(source), effort.matmul_size
    one, other = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(one, other, out=out)}
    seconds = median_seconds(calls, device, repeats=effort.pass_repeats, in_a_row=effort.in_a_row)
    return Ceilings(
        copy_bytes_per_second=2 * source.nbytes / seconds["copy"], matmul_flops=2 * n**3 / seconds["product"]
    )
