"""Views: how a model becomes its own draft without a second copy of anything.

A view is a deep copy of the module tree that shares every tensor with the user's model, with our own attention
function. What the draft's leaves out, or runs in copies of its own, is `draft_view.py`'s. The user's model is never
touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.models.attention_hook import (
    ATTENTION_NAME,
    register,
)

_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` among them: views are always in evaluation mode


def target_view(model: PreTrainedModel) -> PreTrainedModel:
    """The full model, sharing every tensor with `model`, with our attention function."""
    return view_of(model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_decoder().layers  # type: ignore[no-any-return]


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy that shares every tensor and calls our attention function."""
    register()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in reachable_tensors(model)}
    for module in model.modules():  # hooks are the user's: they watch the user's model, not the views
        memo.update(
            {id(hooks): OrderedDict() for name in _HOOK_ATTRIBUTES if (hooks := getattr(module, name)) is not None}
        )
    view: PreTrainedModel = copy.deepcopy(model, memo)
    view.eval()
    if model.config._attn_implementation == "sdpa":
        # Older transformers run gemma2 on it, which leaves the soft cap out, so the view does without one too.
        for module in view.modules():
            if getattr(module, "attn_logit_softcapping", None) is not None:
                module.attn_logit_softcapping = None  # type: ignore[assignment]
    view.config._attn_implementation = ATTENTION_NAME
    return view


def reachable_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor held by the modules: parameters, buffers, and plain attributes such as a quantiser's state."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)
        elif hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, MethodType, ModuleType)):
            yield from walk(vars(value))

    return walk(model)


# --- Whether the model has changed since its views were built ---


def state_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Changes whenever the views would no longer compute what the model does: tensors replaced, moved or cast; a
    module's own settings changed, as adapters do when they are switched, merged or disabled."""
    tensors = (*model.parameters(), *model.buffers())
    return (
        *((id(t), t.data_ptr(), t.device, t.dtype) for t in tensors),
        *((id(module), *_settings(module)) for module in model.modules()),
    )


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    own = vars(module).items()
    return [(name, repr(value)) for name, value in own if name not in _OF_EVERY_MODULE and _is_plain(value)]


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


# --- What a view may be built from ---


def run_view(view: PreTrainedModel, tokens: Tensor, positions: Tensor, step: Any, *, head: bool = True) -> Tensor:
    """Hugging Face's own forward over `b t` tokens at `b t` positions: logits `b t v`, or without the head `b t d`."""
    body = view if head else view.get_decoder()
    output = body(input_ids=tokens, position_ids=positions, use_cache=False, selfspec_pass=step)
    return output.logits if head else output.last_hidden_state  # type: ignore[no-any-return]


# --- RoPE that depends on the length ---
