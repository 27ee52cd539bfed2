"""Passes in isolation: how long the runtime's own passes take with nothing around them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gpu_bench.timing import Call, median_seconds
from selfspec.runtime.runtime import Runtime

WARM_UP = 3
"""Calls before a capture: compilation and the libraries' own set-up must be over."""

View = Literal["target", "draft"]


@torch.inference_mode()
def pass_seconds(
    runtime: Runtime, passes: Mapping[str, tuple[View, Tensor]], *, context: int, repeats: int
) -> dict[str, float]:
    """Of each pass, a view and its tokens (`b t`), behind `context` cached tokens in every row.

    On CUDA every pass is captured in a graph of its own, which is then replayed: so no launch counts, only the work.
    The cache must have room; what it holds does not matter, and is overwritten.
    """
    runtime.cache.lengths.fill_(context)
    device = runtime.cache.lengths.device
    calls = {name: _captured(partial(runtime.run, *one), device) for name, one in passes.items()}
    return median_seconds(calls, device, repeats=repeats)


def _captured(call: Call, device: torch.device) -> Call:
    """A replay of what `call` launches; itself on a CPU."""
    if device.type != "cuda":
        return call
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
