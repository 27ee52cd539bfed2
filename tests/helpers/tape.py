"""A tape: what a CUDA graph does, on a CPU.

Recording work writes down every operation that reaches a kernel, with the tensors themselves as arguments. Playing runs
these operations again: no Python of the work, and no number that it computed on the host while it was recorded, is
looked at anew. So work that depends on anything but the contents of tensors that stay gives wrong results on a tape, as
it would in a graph. What a graph forbids is an error while recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = {
    "aten::_local_scalar_dense": "a tensor is read on the host",
    "aten::item": "a tensor is read on the host",
    "aten::is_nonzero": "a tensor is read on the host",
    "aten::equal": "a tensor is read on the host",
    "aten::nonzero": "the shape of the result depends on numbers",
    "aten::masked_select": "the shape of the result depends on numbers",
    "aten::unique_dim": "the shape of the result depends on numbers",
    "aten::_unique2": "the shape of the result depends on numbers",
}


INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class HostReadError(RuntimeError):
    """Work that is to be captured read the device, or made a tensor of host data."""


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of what a stretch of work returns."""
    return [value for value in vars(result).values() if isinstance(value, Tensor)]


class NoReads(TorchDispatchMode):
    """Raises where work reads a tensor on the host, copies between devices, or indexes by a mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            raise HostReadError(f"{name}: {READS[name]}")
        if name == "aten::repeat_interleave" and isinstance(args[-1], Tensor):
            raise HostReadError(f"{name}: the shape of the result depends on numbers")
        if name in INDEXING and any(is_mask(index) for index in args[1]):
            raise HostReadError(f"{name}: indexing by a mask counts what it holds")
        result = self.do(func, args, kwargs)
        self.check_devices(name, args, kwargs, result)
        return result

    def do(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    @staticmethod
    def check_devices(name: str, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # A single number on the CPU is baked in, as any number of Python's is.
        if len({tensor.device for tensor in tensors if tensor.ndim or tensor.device.type != "cpu"}) > 1:
            raise HostReadError(f"{name}: copies between devices")


class _Recording(NoReads):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def do(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result


class TapeRecorder:
    """A recorder for `selfspec.runtime.cuda_graphs.Graphs` that works on any device."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def warm_up(self, work: Callable[[], Any]) -> Any:
        with NoReads():
            return work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        with _Recording() as tape:
            result = work()
        fresh = [True]  # recording did the work once already, where a capture does nothing

        def replay() -> None:
            if not fresh.pop():
                self.play(tape.operations, result)
            fresh.append(False)

        return replay, result

    def play(self, operations: list[tuple[Any, Any, Any, Any]], result: Any) -> None:
        self.played += 1
        now: dict[int, Tensor] = {}  # by the identity of a recorded tensor: the one that stands for it this time

        def current(tensor: Tensor) -> Tensor:
            return now.get(id(tensor), tensor)

        for func, args, kwargs, made in operations:
            args, kwargs = tree_map_only(Tensor, current, (args, kwargs))
            outputs = tree_leaves(func(*args, **kwargs))
            for recorded, output in zip(tree_leaves(made), outputs, strict=True):
                if isinstance(recorded, Tensor):
                    now[id(recorded)] = output
        for tensor in tensors_of(result):
            if current(tensor) is not tensor:
                tensor.copy_(current(tensor))  # where the result is, every time

    def nbytes(self) -> int:
        return 0
