"""Ceilings: what this device can do at most, measured in this run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from gpu_bench.effort import Effort
from gpu_bench.timing import median_seconds


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes read and written per second by a copy within the device's memory, and bf16 operations per second of a
    matrix product."""

    copy_bytes_per_second: float
    matmul_flops: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings(device: torch.device, effort: Effort) -> Ceilings:
    """Both, on random data: zeros may run faster."""
    return Ceilings(
        copy_bytes_per_second=copy_bandwidth(device, effort.copy_bytes, effort.pass_repeats),
        matmul_flops=matmul_rate(device, effort.matmul_size, effort.pass_repeats),
    )


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes per second, those read and those written counted."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds({"copy": lambda: target.copy_(source)}, device, repeats=repeats)
    return 2 * source.nbytes / seconds["copy"]


def matmul_rate(device: torch.device, n: int, repeats: int) -> float:
    """Multiplications and additions per second of an n x n x n product in bfloat16."""
    one, other = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)
    seconds = median_seconds({"product": lambda: torch.mm(one, other, out=out)}, device, repeats=repeats)
    return 2 * n**3 / seconds["product"]
