"""Graphs: stretches of device work, captured once as CUDA graphs, then replayed with no Python in between."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from selfspec.compiling import first_line

MOST_GRAPHS = 256
"""Beyond so many, for requests with ever new settings, all are dropped and captured anew as they are needed."""

Work = Callable[[], Any]
"""A stretch of device work on tensors whose addresses stay. It returns what it made, never reads the device, and does
the same whenever it is called."""


class Recorder(Protocol):
    """Captures work."""

    def warm_up(self, work: Work) -> Any:
        """Do the work, as it will be captured."""

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        """Capture the work without doing it: what does it from now on, and where its result will be each time."""

    def nbytes(self) -> int:
        """The device memory in use by now."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = work()
        return graph.replay, result

    def nbytes(self) -> int:
        return torch.cuda.memory_reserved(self.device)


class Graphs:
    """Captured work by key.

    What is asked for the first time is only done, which also warms it up (kernels are built and libraries loaded then,
    which a capture forbids); the second time it is captured, and from then on replayed.

    Attributes:
        nbytes: device memory that capturing has taken.
        obstacle: why nothing is captured any more, after a capture that failed; else None.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.obstacle: str | None = None
        self.drop()

    def drop(self) -> None:
        """Forget everything: what was captured holds addresses that no longer count."""
        self.nbytes = 0
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, work: Work) -> Any:
        """Do the work that goes by this key; its result is overwritten when it is done the next time."""
        if self.obstacle is not None:
            return work()
        if key in self._captured:
            replay, result = self._captured[key]
            replay()
            return result
        if key not in self._seen:
            if len(self._seen) >= MOST_GRAPHS:
                self.drop()
            self._seen.add(key)
            return self.recorder.warm_up(work)
        return self._capture(key, work)

    def _capture(self, key: Hashable, work: Work) -> Any:
        before = self.recorder.nbytes()
        try:
            replay, result = self.recorder.record(work)
        except RuntimeError as error:  # what torch raises for an operation that a capture forbids
            self.drop()
            self.obstacle = first_line(error)
            return work()
        self._captured[key] = replay, result
        self.nbytes += max(0, self.recorder.nbytes() - before)
        replay()
        return result


def graphs_for(device: torch.device) -> Graphs | None:
    """Graphs where this device has them."""
    return Graphs(CudaRecorder(device)) if device.type == "cuda" else None
