"""Fusing passes with `torch.compile`, and why that may not be possible here.

On a CPU a pass is compiled whole: the Python between layers takes as long as what fusion saves (a pass of the embedded
model: 6.3 ms eager, 6.3 with fused layers, 4.0 whole), but that takes half a minute for each view and length. On CUDA,
where captured rounds run no Python, a layer is compiled once for all layers of its kind.
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
"""What `torch.compile` raises for code that it cannot compile, as opposed to what that code raises when it runs."""

_serial = itertools.count()


def will_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether passes are to be compiled, where None leaves it to the device."""
    return device.type == "cuda" if wanted is None else wanted  # the gain must come soon


def fuses_layers(device: torch.device) -> bool:
    """Whether layers are compiled one by one, and not whole passes."""
    return device.type == "cuda"


def uncompiled_reason(device: torch.device) -> str | None:
    """Why `torch.compile` cannot serve this device, or None if it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not serve this GPU"
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
    """`forward` as one fused graph, for the shapes of its first call only.

    The caller keeps one compiled pass per shape and drops it when anything it closes over changes, so the checks that
    `torch.compile` would make at every call (a tenth of a small model's pass) are left out. Each pass gets code of its
    own: unchecked entries of two passes must not meet.
    """
    own = _with_own_code(forward, forward.__name__)
    options: dict[str, Any] = {"guard_filter_fn": _no_guards}
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return compiled


def or_eager(
    compiled: Callable[..., Tensor], eager: Callable[..., Tensor], on_refusal: Callable[[str], None]
) -> Callable[..., Tensor]:
    """A compiled pass that, where this model cannot be compiled, becomes eager and tells the reason."""
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
    """Decoder layers that run as compiled code: one compilation for each pass length and kind of layer, shared by all
    layers of that kind in either view (nothing in a layer's forward reads which layer it is)."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @contextmanager
    def of_length(self, layers: Iterable[nn.Module], t: int) -> Iterator[None]:
        """In this context the layers run compiled code for passes of `t` tokens."""
        layers = list(layers)
        for layer in layers:
            layer.forward = MethodType(self._forward_of(layer, t), layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own shows again

    def _forward_of(self, layer: nn.Module, t: int) -> Callable[..., Any]:
        kind = type(layer)
        key = (t, kind, *map(_kind_of_child, layer.children()))
        if key not in self._compiled:
            forward = kind.forward

            def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return forward(layer, *args, **kwargs)

            own = _with_own_code(run, f"{kind.__name__}_of_{t}")
            self._compiled[key] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._compiled[key]


def _kind_of_child(module: nn.Module) -> tuple[Any, ...]:
    """What compiled code certainly depends on. What it depends on beside that (a window, say) it checks itself, but
    only so many variants of one code are allowed: caches that grow, or rows that change, would use them up."""
    keys = module._buffers.get("selfspec_keys")
    parts = tuple(type(part) for part in module.modules())  # quantised copies among them
    return parts, None if keys is None else keys.shape


def _with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy with a code object of its own: compiled code is looked up by code object, and counted by it."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{name}_{next(_serial)}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that follow."""
    if isinstance(error, FailOnRecompileLimitHit) and error.__cause__ is not None:
        error = error.__cause__  # which says what limit
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _no_guards(guards: list[Any]) -> list[bool]:
    return [False] * len(guards)
