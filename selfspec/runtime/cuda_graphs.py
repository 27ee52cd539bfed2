"""Graphs: stretches of device work, captured once as CUDA graphs, then replayed with no Python in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch

from selfspec.runtime.compiling import first_line

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
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._failed: list[torch.cuda.CUDAGraph] = []  # the allocator may ask them still

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
            self.pool = torch.cuda.graph_pool_handle()  # a pool's handle is dead when its last graph is
        current = torch.cuda.current_stream(self.device)
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.device(self.device), _uncollected(), self._capturing(graph, self.pool):
                try:
                    result = work()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            self._recover(graph, current)
            # What ends an invalid capture says only that there was an error before.
            raise (cause or error) from None
        self._alive.add(graph)
        return graph.replay, result

    def nbytes(self) -> int:
        torch.cuda.empty_cache()  # as a capture does first: else what it frees would hide what it takes
        return torch.cuda.memory_reserved(self.device)

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # Other threads may do what a capture forbids.
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def _recover(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Undo what torch leaves of a capture that became invalid.

        Its end raises before anything was put back: work would go on in the stream of the capture, the allocator would
        take the pool for one that records, and generators (a flag of theirs, in some versions) would refuse to draw.
        """
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # not recording: the capture ended as it should
            index = self.stream.device.index
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        graph.reset()
        self._failed.append(graph)
        try:
            with torch.cuda.device(self.device), self._capturing(torch.cuda.CUDAGraph(), None):
                torch.zeros(1, device=self.device)  # a capture that ends well resets the generators
        except RuntimeError:  # the device itself is lost, and the work, done again, will say so
            pass
        finally:
            torch.cuda.set_stream(current)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected here: it may hold graphs, which cannot be destroyed during a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Graphs:
    """Captured work by key.

    What is asked for the first time is only done, which also warms it up (kernels are built and libraries loaded then,
    which a capture forbids); the second time it is captured, and from then on replayed.

    Attributes:
        nbytes: device memory that capturing has taken.
        uncaptured_reason: why nothing is captured any more, after a capture that failed; else None.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.uncaptured_reason: str | None = None
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
        if self.uncaptured_reason is not None:
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
            self.uncaptured_reason = first_line(error)
            return work()
        self._captured[key] = replay, result
        self.nbytes += max(0, self.recorder.nbytes() - before)
        replay()
        return result


def graphs_for(device: torch.device) -> Graphs | None:
    """Graphs where this device has them."""
    return Graphs(CudaRecorder(device)) if device.type == "cuda" else None
