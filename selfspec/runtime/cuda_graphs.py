"""Graphs: captures device work once as CUDA graphs, then replays the work without running Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch

from selfspec.runtime.compiling import first_line

MAX_GRAPHS = 256
"""Graphs: the limit. At the limit all graphs are dropped: requests with ever new settings would fill the memory."""

Work = Callable[[], Any]
"""Device work on tensors with fixed addresses. Work returns its result, never copies device data to the host, and runs
the same operations in every call."""


class Recorder(Protocol):
    """Captures work."""

    def warm_up(self, work: Work) -> Any:
        """Run the work under the conditions of a capture, without capturing."""

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        """Capture the work without running it. Returns a replay function and the result that each replay fills."""

    def nbytes(self) -> int:
        """Bytes: device memory in use."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._failed: list[torch.cuda.CUDAGraph] = []  # kept alive: the allocator may still use them

    def warm_up(self, work: Work) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                return work()
        finally:
            current.wait_stream(self.stream)

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        if not self._alive:
            self.pool = torch.cuda.graph_pool_handle()  # a pool is freed with its last graph
        current = torch.cuda.current_stream(self.device)
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.device(self.device), _without_garbage_collection(), self._capturing(graph, self.pool):
                try:
                    result = work()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            self._recover(graph, current)
            # The error at the end of an invalid capture says only that an earlier error happened.
            raise (cause or error) from None
        self._alive.add(graph)
        return graph.replay, result

    def nbytes(self) -> int:
        torch.cuda.empty_cache()  # a capture empties the cache first: emptying here keeps the difference exact
        return torch.cuda.memory_reserved(self.device)

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # thread_local: other threads may run operations that a capture forbids.
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _recover(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Restore torch's state after an invalid capture.

        The end of an invalid capture raises before torch restores anything. The capture's stream stays current, the
        allocator keeps recording into the pool, and in some versions random generators refuse to draw.
        """
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # the pool does not record: the capture ended normally
            index = self.stream.device.index
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        graph.reset()
        self._failed.append(graph)
        try:
            with torch.cuda.device(self.device), self._capturing(torch.cuda.CUDAGraph(), None):
                torch.zeros(1, device=self.device)  # a valid capture resets the random generators
        except RuntimeError:  # the device is lost: running the work again raises the error
            pass
        finally:
            torch.cuda.set_stream(current)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: destroying a graph during a capture is an error, and garbage may hold graphs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Graphs:
    """Captured work, by key.

    The first call with a key runs the work. The first run builds kernels and loads libraries, which a capture forbids.
    The second call captures the work, and all later calls replay the captured work.

    Attributes:
        nbytes: Bytes: device memory that the captures took.
        uncaptured_reason: why captures stopped after a failed capture; else None.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.uncaptured_reason: str | None = None
        self.drop()

    def drop(self) -> None:
        """Drop all captured work, when the addresses of its tensors are no longer valid."""
        self.nbytes = 0
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Callable[[], None], Any]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, work: Work) -> Any:
        """Run, capture or replay the work of this key. The next call with the key overwrites the result."""
        if self.uncaptured_reason is not None:
            return work()
        if key in self._captured:
            replay, result = self._captured[key]
            replay()
            return result
        if key not in self._seen:
            if len(self._seen) >= MAX_GRAPHS:
                self.drop()
            self._seen.add(key)
            return self.recorder.warm_up(work)
        return self._capture(key, work)

    def _capture(self, key: Hashable, work: Work) -> Any:
        before = self.recorder.nbytes()
        try:
            replay, result = self.recorder.record(work)
        except RuntimeError as error:  # torch's error for an operation that a capture forbids
            self.drop()
            self.uncaptured_reason = first_line(error)
            return work()
        self._captured[key] = replay, result
        self.nbytes += max(0, self.recorder.nbytes() - before)
        replay()
        return result


def graphs_for(device: torch.device, option: bool | Recorder | None) -> Graphs | None:
    """Graphs that capture with the given recorder, or as CUDA graphs; None if the device or the option rules it out."""
    if option is None or isinstance(option, bool):
        return Graphs(CudaRecorder(device)) if option is not False and device.type == "cuda" else None
    return Graphs(option)
