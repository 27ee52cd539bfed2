"""Views: how a model becomes its own draft without a second copy of its weights.

A view is a deep copy of the module tree that shares every tensor with the user's model and calls our attention
function. `draft_view.py` replaces modules of the draft's view. The user's model is never changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.models.attention_hook import ATTENTION_NAME, register

_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

# `training` is one of these attributes: views are always in evaluation mode.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_decoder().layers  # type: ignore[no-any-return]


def target_view(model: PreTrainedModel) -> PreTrainedModel:
    """The full model: a deep copy that shares every tensor with `model` and calls our attention function."""
    register()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in reachable_tensors(model)}
    for module in model.modules():  # the user's hooks watch the user's model, not the views
        memo.update(
            {id(hooks): OrderedDict() for name in _HOOK_ATTRIBUTES if (hooks := getattr(module, name)) is not None}
        )
    if (own := vars(model).get("generate")) is not None:  # such as a speculator's, which holds runtimes and locks
        memo[id(own)] = own
    view: PreTrainedModel = copy.deepcopy(model, memo)
    view.eval()
    if model.config._attn_implementation == "sdpa":
        # Older transformers run gemma2 with SDPA, which ignores the soft cap. The view ignores the soft cap, too.
        for module in view.modules():
            if getattr(module, "attn_logit_softcapping", None) is not None:
                module.attn_logit_softcapping = None  # type: ignore[assignment]
    view.config._attn_implementation = ATTENTION_NAME
    return view


def reachable_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the modules hold: parameters, buffers, and attributes such as a quantiser's state."""
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


def state_of(model: PreTrainedModel) -> tuple[object, ...]:
    """A value that changes whenever the views would no longer compute what the model computes.

    The value covers replaced, moved and cast tensors, and the modules' own settings: adapters change the settings when
    they are switched, merged or disabled.
    """
    tensors = (*model.parameters(), *model.buffers())
    return (
        *((id(t), t.data_ptr(), t.device, t.dtype) for t in tensors),
        *((id(module), *_settings(module)) for module in model.modules()),
    )


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    own = vars(module).items()
    return [(name, repr(value)) for name, value in own if name not in _MODULE_ATTRIBUTES and _is_plain(value)]


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def run_view(view: PreTrainedModel, tokens: Tensor, positions: Tensor, step: Any, *, head: bool = True) -> Tensor:
    """Hugging Face's forward over tokens `b t` at positions `b t`: logits `b t v`, or hidden states `b t d`."""
    body = view if head else view.get_decoder()
    output = body(input_ids=tokens, position_ids=positions, use_cache=False, selfspec_pass=step)
    return output.logits if head else output.last_hidden_state  # type: ignore[no-any-return]
