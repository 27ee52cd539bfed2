"""Compiling passes with `torch.compile`, and why compiling may not be possible on a device.

On a CPU a pass is compiled whole, because the Python between the layers takes as long as fusion saves. A pass of the
embedded model takes 6.3 ms eagerly, 6.3 ms with compiled layers and 4.0 ms compiled whole. Compiling a whole pass takes
half a minute for each view and pass length. On CUDA captured rounds run no Python, so a layer is compiled once and the
code serves all layers of the same kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError

COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit, InductorError)
"""Errors that `torch.compile` raises for code that cannot be compiled. Running the code raises other errors."""

_serial = itertools.count()


def will_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compile passes; None compiles on CUDA only, where compiling pays off within one request."""
    return device.type == "cuda" if wanted is None else wanted


def fuses_layers(device: torch.device) -> bool:
    """Whether single layers are compiled instead of whole passes."""
    return device.type == "cuda"


def uncompiled_reason(device: torch.device) -> str | None:
    """Why `torch.compile` does not work on this device, or None if it does."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not support this GPU"
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found (install g++ or clang, or set CXX)"
    return None


def compile_pass(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` compiled as one graph, for the shapes of the first call only.

    The compiled pass skips the guards of `torch.compile`, which take a tenth of a small model's pass. The caller
    therefore keeps one compiled pass per shape, and drops the pass when anything changes that `forward` closes over.
    Each pass has its own code object: without guards, two passes with one code object would run each other's code.
    """
    own = _with_own_code(forward, forward.__name__)
    options: dict[str, Any] = {"guard_filter_fn": _no_guards}
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return compiled


def or_eager(
    compiled: Callable[..., Tensor], eager: Callable[..., Tensor], on_refusal: Callable[[str], None]
) -> Callable[..., Tensor]:
    """The compiled pass; if compiling fails, the eager pass from then on, after `on_refusal` got the reason."""
    run = compiled

    def attempt(*args: Any) -> Tensor:
        nonlocal run
        try:
            return run(*args)
        except COMPILE_ERRORS as error:
            if run is eager:
                raise
            on_refusal(first_line(error))
            run = eager
            return run(*args)

    return attempt


class FusedLayers:
    """Compiles decoder layers: once for each pass length, size of the cache and kind of layer.

    All layers of one kind in both views share the compiled code, because no layer's forward reads the layer index.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @contextmanager
    def of_sizes(self, layers: Iterable[nn.Module], t: int, rows: int, slots: int) -> Iterator[None]:
        """Inside this context the layers run compiled code for passes of `t` tokens over a cache of these sizes.

        Dynamo allows few variants of one code object, and new sizes would use them up. It guards everything else.
        """
        layers = list(layers)
        for layer in layers:
            layer.forward = MethodType(self._forward_of(layer, t, rows, slots), layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # uncovers the forward of the class

    def _forward_of(self, layer: nn.Module, t: int, rows: int, slots: int) -> Callable[..., Any]:
        kind, parts = type(layer), map(type, layer.modules())  # the parts include quantised linear layers
        key = (t, rows, slots, kind, *parts)
        if key not in self._compiled:
            forward = kind.forward

            def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return forward(layer, *args, **kwargs)

            own = _with_own_code(run, f"{kind.__name__}_of_{t}")
            self._compiled[key] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._compiled[key]


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of the function with a new code object: Dynamo finds and counts compiled code by code object."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{name}_{next(_serial)}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def first_line(error: BaseException) -> str:
    """The first line of the error message, without torch's long explanation."""
    if isinstance(error, FailOnRecompileLimitHit) and error.__cause__ is not None:
        error = error.__cause__  # the cause names the limit
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _no_guards(guards: list[Any]) -> list[bool]:
    return [False] * len(guards)
