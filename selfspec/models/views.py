"""Views: how a model becomes its own draft without a second copy of anything.

A view is a deep copy of the module tree that shares every tensor with the user's model, with our own attention
function. What the draft's leaves out, or runs in copies of its own, is `draft_view.py`'s. The user's model is never
touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from selfspec.errors import UnsupportedModelError
from selfspec.runtime.attention import (
    ATTENTION_NAME,
    AttentionArgs,
    AttentionNeeds,
    additive_mask,
    masked_attention,
    register,
)
from selfspec.runtime.kv_cache import LayerShape

SUPPORTED_MODEL_TYPES = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
"""Families that the tests decode with. Anything else is refused, whatever the probe would say."""

_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PROBE_LENGTH = 11
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


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by name, what the views cannot reproduce."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"selfspec wraps a Hugging Face causal language model, but {type(model).__name__} was given"
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{config.model_type}' is an encoder-decoder model; selfspec decodes decoder-only models"
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported; "
            f"supported are {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        )
    if not hasattr(model, "lm_head") or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    if "dynamic" in rope_types(model):
        raise UnsupportedModelError(
            "RoPE of type 'dynamic' rescales all positions as the text grows, which no cache can follow; "
            "use yarn or llama3"
        )
    devices = {str(tensor.device) for tensor in model.parameters()}
    devices |= {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()} & {
        "cpu",
        "disk",
        "meta",
    }
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(devices))}; "
            "selfspec needs it whole on one device (model.to(device))"
        )


@dataclass
class ProbePass:
    """Attends causally within the tokens at hand and records what each layer caches and asks for."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: set[int | None] = field(default_factory=set)
    softcaps: set[float | None] = field(default_factory=set)
    masks: set[tuple[int | None, int]] = field(default_factory=set)
    """Windows, and query heads for each key head, with which layers will ask for a mask."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor:
        self.shapes[int(layer.layer_idx)] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])  # type: ignore[arg-type]
        self.windows.add(how.window)
        self.softcaps.add(how.softcap)
        groups = query.shape[1] // key.shape[1]
        self.masks.add((how.window, groups))
        positions = torch.arange(query.shape[2], device=query.device)
        visible = positions <= positions[:, None]
        if how.window is not None:
            visible = visible & (positions > positions[:, None] - how.window)
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
        return masked_attention(query, key, value, additive_mask(visible, query.dtype), how).transpose(1, 2)

    def needs(self, model: PreTrainedModel) -> AttentionNeeds:
        return AttentionNeeds(
            device=model.device,
            dtype=model.dtype,
            head_dims=frozenset(dim for shape in self.shapes.values() for dim in (shape.key_dim, shape.value_dim)),
            windows=frozenset(self.windows),
            softcaps=frozenset(self.softcaps),
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, view: PreTrainedModel) -> ProbePass:
    """Run the target view and the user's model on one short random input and compare their logits.

    Raises `UnsupportedModelError` if they differ by more than rounding explains: then the family needs something that
    the views do not give it. The bound is wide for rounding and narrow for a mistake.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, _PROBE_LENGTH), generator=generator)
    tokens = tokens.to(model.device)
    recorded = ProbePass()
    ours = run_view(view, tokens, torch.arange(_PROBE_LENGTH, device=tokens.device)[None], recorded).float()
    unseen = set(range(len(decoder_layers(view)))) - set(recorded.shapes)
    if unseen:
        raise UnsupportedModelError(
            f"attention of layer {min(unseen)} cannot be reached in a copy of this '{model.config.model_type}'; if its "
            "forward was replaced (model.forward = torch.compile(...)), wrap the model before that"
        )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        for module in training:  # one by one: the user may have frozen some
            module.training = True
    difference = (ours - theirs).abs().max().item()
    if not theirs.isfinite().all():
        raise UnsupportedModelError(
            "the model's own logits hold NaN or infinity on a short input; check the weights, or use a wider dtype"
        )
    eps = torch.finfo(model.dtype).eps
    bound = (64 if eps < 1e-5 else 32) * eps * max(theirs.abs().max().item(), 1.0)
    if not difference <= bound:
        raise UnsupportedModelError(
            f"this '{model.config.model_type}' cannot be reproduced: the largest logit difference on a short input is "
            f"{difference:.3g}, where rounding explains {bound:.3g}"
        )
    return recorded


def run_view(view: PreTrainedModel, tokens: Tensor, positions: Tensor, step: Any, *, head: bool = True) -> Tensor:
    """Hugging Face's own forward over `b t` tokens at `b t` positions: logits `b t v`, or without the head `b t d`."""
    body = view if head else view.get_decoder()
    output = body(input_ids=tokens, position_ids=positions, use_cache=False, selfspec_pass=step)
    return output.logits if head else output.last_hidden_state  # type: ignore[no-any-return]


# --- RoPE that depends on the length ---


def rope_types(model: PreTrainedModel) -> set[str]:
    """The kinds of RoPE in use, over all layers."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (nested or [parameters])}


def longrope_switch(model: PreTrainedModel) -> int | None:
    """The length beyond which longrope (Phi-3) uses its long factors; None for every other RoPE."""
    if "longrope" not in rope_types(model):
        return None
    config = model.config.get_text_config()
    length = config.rope_parameters.get("original_max_position_embeddings")
    return int(length or config.original_max_position_embeddings)


def pin_longrope(view: PreTrainedModel, *, long: bool) -> None:
    """Fix one side of the longrope switch on a view.

    Hugging Face chooses by the largest position of each pass, which a chunk of a prompt or a draft would get wrong.
    The frequencies are new tensors on the view: the user's model keeps its own.
    """
    for module in view.modules():
        if getattr(module, "rope_type", None) not in ("longrope", "pinned longrope"):
            continue
        switch = longrope_switch(view)
        assert switch is not None
        length = switch + 1 if long else switch
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=length)  # type: ignore
        object.__setattr__(module, "rope_type", "pinned longrope")
        module.register_buffer("inv_freq", frequencies, persistent=False)
