"""Fusing a pass with `torch.compile`, and why that may not be possible here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

COMPILE_ERRORS = (TorchDynamoException, InductorError)
"""What `torch.compile` raises for code that it cannot compile, as opposed to what that code raises when it runs."""

_serial = itertools.count()


def compile_obstacle(device: torch.device) -> str | None:
    """Why `torch.compile` cannot serve this device, or None if it can."""
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
    own: compiled code is looked up by code object, and unchecked entries of two passes must not meet there.
    """
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace(co_name=f"{forward.__name__}_{next(_serial)}")
    own = FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)
    options: dict[str, Any] = {"guard_filter_fn": _no_guards}
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return compiled


def first_line(error: BaseException) -> str:
    """What went wrong, without the pages that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _no_guards(guards: list[Any]) -> list[bool]:
    return [False] * len(guards)
