"""ModelState: what decides what a model computes, at one moment; and what the views of a model cannot follow.

A view is a copy of the model's modules, so a later change of a module, an attribute, an object that a module holds, or
the config does not reach the view. `ModelState.is_current` notices the change before the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_IRRELEVANT = frozenset({"training", "generation_config", "generate"})
"""Attributes that decide nothing about a forward pass: views are always in evaluation mode."""
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"_modules", "_parameters", "_buffers"}
"""torch's own attributes of every module, such as the tables of hooks."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_OPAQUE = (type, FunctionType, MethodType, ModuleType, Tensor)
_HF_CAPTURE = "transformers.utils.output_capturing"
"""Hooks of this module act only while `model.forward` collects hidden states, never while it generates."""


def reachable(model: nn.Module) -> Iterator[Any]:
    """Everything that the modules hold, each object once: modules, containers, objects with attributes, and leaves.

    Leaves are tensors and values whose parts cannot be seen.
    """
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting.extend(_parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, nn.Module):
        yield from (part for name, part in vars(value).items() if name not in _IRRELEVANT | _BOOKKEEPING)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        yield value.__self__  # perhaps a module outside the model
    elif has_attributes(value):
        yield from vars(value).values()


def has_attributes(value: Any) -> bool:
    """Whether `value` holds parts as attributes. Functions and objects of selfspec count as wholes."""
    if isinstance(value, _OPAQUE) or type(value).__module__.startswith("selfspec."):
        return False
    return hasattr(value, "__dict__")


def is_shared(value: Any) -> bool:
    """Whether a view shares `value` with the model: tensors, and all that the model can change unseen.

    Bound methods of modules are not shared: a view's module needs a method bound to itself.
    """
    if isinstance(value, MethodType):
        return not isinstance(value.__self__, nn.Module)
    if isinstance(value, (nn.Module, dict, list, tuple, set, frozenset)):
        return False
    return isinstance(value, Tensor) or not has_attributes(value)


class _Same:
    """Equals one object alone: an exchanged container counts as a change even if its content is equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self.value is (other.value if isinstance(other, _Same) else other)


def _pinned(name: str, value: Any) -> Any:
    """`value` as a snapshot holds it: compared by identity, unless it is plain or compares by identity anyway."""
    if isinstance(value, (*_PLAIN, Tensor, nn.Module)) or name in _BOOKKEEPING | _IRRELEVANT:
        return value
    if isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value):
        return value
    by_identity = type(value).__eq__ is object.__eq__  # type: ignore[comparison-overlap]
    return value if by_identity or isinstance(value, _OPAQUE) else _Same(value)


class ModelState:
    """A snapshot of everything that decides what `model` computes; comparing takes microseconds for each module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        values = list(reachable(model))
        self._modules = [value for value in values if isinstance(value, nn.Module)]
        self._objects = [value for value in values if isinstance(value, nn.Module) or has_attributes(value)]
        self._attributes = [{name: _pinned(name, item) for name, item in vars(o).items()} for o in self._objects]
        self._containers = [value for value in values if isinstance(value, (dict, list, set))]
        self._contents = [_content(container) for container in self._containers]
        self._tensors = [value for value in values if isinstance(value, Tensor)]
        self._places = list(map(_place, self._tensors))
        self._functions = list(map(attrgetter("forward"), set(map(type, self._modules))))
        self._types = list(map(type, self._modules))
        self._attention = _attention_function(model)

    def is_current(self) -> bool:
        """Whether nothing has changed that decides what the model computes."""
        if self._is_equal():
            return True
        now = ModelState(self.model)
        if now._relevant() != self._relevant():
            return False
        vars(self).update(vars(now))  # the differences were irrelevant ones
        return True

    def _is_equal(self) -> bool:
        try:
            return (
                list(map(vars, self._objects)) == self._attributes
                and self._containers == self._contents
                and list(map(_place, self._tensors)) == self._places
                and list(map(type, self._modules)) == self._types
                and list(map(attrgetter("forward"), set(self._types))) == self._functions
                and _attention_function(self.model) is self._attention
            )
        except (RuntimeError, ValueError, TypeError):  # an exchanged tensor or array has no truth value
            return False

    def _relevant(self) -> list[Any]:
        attributes = [
            {name: _comparable(value) for name, value in attributes.items() if name not in _IRRELEVANT | _BOOKKEEPING}
            for attributes in self._attributes
        ]
        containers = [_comparable(content) for content in self._contents]
        return [attributes, containers, self._places, self._types, self._functions, _Same(self._attention)]

    def bypass_reason(self) -> str | None:
        """Why `model.generate` must decode, since no view can follow: hooks, or a replaced `model.forward`.

        A hook may act only later, or only in passes of one token, so no probe can tell what a hook does.
        """
        some = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        if (some or any(map(_hooks, self._modules))) and (reason := hook_reason(self.model)) is not None:
            return reason
        return replaced_forward_reason(self.model)


def _content(container: Any) -> Any:
    if isinstance(container, dict):
        return {key: _pinned("", value) for key, value in container.items()}
    return [_pinned("", value) for value in container] if isinstance(container, list) else set(container)


def _comparable(value: Any) -> Any:
    """`value` with tensors and arrays compared by identity, recursively."""
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return value if isinstance(value, (*_PLAIN, _Same, set, tuple)) else _Same(value)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape


def _attention_function(model: PreTrainedModel) -> Any:
    """The function that the model's attention modules call, if the user or a library registered it."""
    return ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hook_reason(model: PreTrainedModel) -> str | None:
    """The name of the first module with a forward hook that may change what the model computes; None without one."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module of this process has a forward hook"
    for name, module in model.named_modules():
        for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
            for hook in hooks.values():
                if _module_of(hook) != _HF_CAPTURE:
                    return f"{name or 'the model'} has a forward {kind} ({_name_of(hook)})"
    return None


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The function that replaces the module's own `forward`.

    None without one. A compiled forward of the module's class counts as its own, and so do those of Hugging Face's
    libraries that only move tensors.
    """
    forward = vars(module).get("forward")
    original = getattr(forward, "_torchdynamo_orig_callable", None)
    compiled = isinstance(original, MethodType) and (original.__self__, original.__func__) == (
        module,
        type(module).forward,
    )
    own = forward is None or compiled or _module_of(forward).startswith(("accelerate.hooks", "transformers."))
    return None if own else forward


def replaced_forward_reason(model: PreTrainedModel) -> str | None:
    """Why the model's own `forward` cannot be followed, or None if it can."""
    forward = replaced_forward(model)
    return None if forward is None else f"model.forward was replaced ({_name_of(forward)})"


def unfixed_reason(model: PreTrainedModel) -> str | None:
    """The first module with a replaced `forward`, which may compute something else in a later pass; None without one.

    Compiled and captured passes would repeat what the function computed first.
    """
    for name, module in model.named_modules():
        if (forward := replaced_forward(module)) is not None:
            return f"{name or 'model'}.forward was replaced ({_name_of(forward)})"
    return None


def _module_of(function: Any) -> str:
    """The Python module that defines the function, whatever the function wraps."""
    while isinstance(function, (partial, MethodType)):
        function = function.func if isinstance(function, partial) else function.__func__
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def _name_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{name.replace('<locals>.', '').replace('<lambda>', 'lambda'):.60}"
