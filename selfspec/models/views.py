"""Views: how a model becomes its own draft without a second copy of its weights.

A view is a deep copy of the module tree that shares every tensor with the user's model and calls our attention
function. `draft_view.py` replaces modules of the draft's view. The user's model is never changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.attention_hook import ATTENTION_NAME, register
from selfspec.models.model_state import is_shared, reachable

_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OWN_ATTRIBUTES = ("forward", "generate")
"""Attributes of the whole model that its views do not copy: both call the user's model."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers."""
    return model.get_decoder().layers  # type: ignore[no-any-return]


def target_view(model: PreTrainedModel) -> PreTrainedModel:
    """The full model: a deep copy that shares every tensor with `model` and calls our attention function.

    Raises:
        UnsupportedModelError: the model holds something that cannot be copied.
    """
    register()
    memo: dict[int, Any] = {id(value): value for value in reachable(model) if is_shared(value)}
    memo |= {id(vars(model).get(name)): None for name in _OWN_ATTRIBUTES}
    for module in model.modules():  # the user's hooks watch the user's model, not the views
        memo.update(
            {id(hooks): OrderedDict() for name in _HOOK_ATTRIBUTES if (hooks := getattr(module, name)) is not None}
        )
    try:
        view: PreTrainedModel = copy.deepcopy(model, memo)
    except TypeError as error:
        raise UnsupportedModelError(f"the model holds an object that cannot be copied into a view: {error}") from error
    for name in _OWN_ATTRIBUTES:
        vars(view).pop(name, None)
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
    return (value for value in reachable(model) if isinstance(value, Tensor))


def run_view(view: PreTrainedModel, tokens: Tensor, positions: Tensor, step: Any, *, head: bool = True) -> Tensor:
    """Hugging Face's forward over tokens `b t` at positions `b t`: logits `b t v`, or hidden states `b t d`."""
    body = view if head else view.get_decoder()
    output = body(input_ids=tokens, position_ids=positions, use_cache=False, selfspec_pass=step)
    return output.logits if head else output.last_hidden_state  # type: ignore[no-any-return]
