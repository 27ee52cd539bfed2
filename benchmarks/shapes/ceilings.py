"""Ceilings: the device's copy bandwidth and matrix product speed, measured in this run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfspec.utils.statistics import median_seconds
from shapes.effort import Effort


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that the device can do per second."""

    copy_bytes_per_second: float  # read and written, by a copy within the device's memory
    matmul_flops: float  # bfloat16 operations of a matrix product


@torch.inference_mode()
def measure_ceilings(device: torch.device, effort: Effort) -> Ceilings:
    """Measure both ceilings on random data, since zeros may run faster."""
    source = torch.rand(effort.copy_bytes // 4, device=device)
    target, n = torch.empty_like(source), effort.matmul_size
    one, other = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(one, other, out=out)}
    seconds = median_seconds(calls, device, repeats=effort.pass_repeats, in_a_row=effort.in_a_row)
    return Ceilings(
        copy_bytes_per_second=2 * source.nbytes / seconds["copy"], matmul_flops=2 * n**3 / seconds["product"]
    )
