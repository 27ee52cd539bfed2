"""Which models are supported: an allow-list of tested families, and a probe of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, LayerShape, additive_mask, masked_attention
from selfspec.models.model_state import hook_reason, replaced_forward_reason
from selfspec.models.rope import rope_types
from selfspec.models.views import decoder_layers, run_view

SUPPORTED_MODEL_TYPES = frozenset(
    [
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
    ]
)
"""Families that the tests decode with. Every other family is refused, even if the probe would accept it."""

_PROBE_LENGTHS = (11, 5, 1)
"""Tokens: the longest pass comes first. Each pass holds the first tokens of the longest."""


def vocabulary_size(config: PretrainedConfig) -> int:
    """The number of logits of a model with this config."""
    return int(config.get_text_config().vocab_size)


def position_limit(config: PretrainedConfig) -> int | None:
    """Tokens: the longest text that the model's positions reach; None if the config has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_supported_config(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModelError` if the model type is not supported. Needs no weights."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{config.model_type}' is an encoder-decoder model; selfspec decodes decoder-only models"
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(sorted(SUPPORTED_MODEL_TYPES))
        raise UnsupportedModelError(f"model type '{config.model_type}' is not supported; supported are {supported}")


def check_supported(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError`, naming the reason, if the views cannot reproduce the model."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"selfspec wraps a Hugging Face causal language model, but {type(model).__name__} was given{_advice(model)}"
        )
    check_supported_config(model.config)
    if not hasattr(model, "lm_head") or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    if "dynamic" in rope_types(model):
        raise UnsupportedModelError(
            "RoPE of type 'dynamic' rescales all positions as the text grows, but a KV cache keeps the old positions; "
            "use yarn or llama3"
        )
    if (reason := replaced_forward_reason(model)) is not None:
        raise UnsupportedModelError(f"{reason}; wrap the model before its forward is replaced")
    if (reason := _quantiser_reason(model)) is not None:
        raise UnsupportedModelError(reason)
    devices = {str(tensor.device) for tensor in model.parameters()}
    mapped = (getattr(model, "hf_device_map", None) or {}).values()
    devices |= {str(device) for device in mapped} & {"cpu", "disk", "meta"}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(devices))}; "
            "selfspec needs it whole on one device (model.to(device))"
        )


def _quantiser_reason(model: PreTrainedModel) -> str | None:
    """The first module that quantises activations by what else a pass holds, or None."""
    for name, module in model.named_modules():
        kind, weight = type(module), vars(module).get("_parameters", {}).get("weight")
        by_name = kind.__module__.startswith("torch.ao.nn.quantized.dynamic") or kind.__name__ == "Linear8bitLt"
        torchao = type(weight).__name__ == "LinearActivationQuantizedTensor"
        if by_name or torchao or getattr(weight, "act_quant_kwargs", None) is not None:
            return (
                f"{name} ({kind.__name__}) quantises activations: its rounding depends on the tokens of a pass, so a "
                "pass over a draft is not the same as single passes; use a format that quantises weights alone"
            )
    return None


def _advice(wrapper: object) -> str:
    """How to reach the model inside a wrapper of PEFT, `torch.compile` or data parallelism."""
    if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
        return "; its learned prompt is no part of the model, and is not supported"
    for path in ("get_base_model()", "base_model.model", "_orig_mod", "module"):
        inner: Any = wrapper
        for name in path.removesuffix("()").split("."):
            inner = getattr(inner, name, None)
        inner = inner() if path.endswith("()") and callable(inner) else inner
        if isinstance(inner, PreTrainedModel):
            return f"; pass model.{path}, which is a {type(inner).__name__}"
    return ""


@dataclass
class ProbePass:
    """Attends causally within the pass, and records what each layer caches and requires."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    softcaps: set[float | None] = field(default_factory=set)
    masks: set[tuple[int | None, int]] = field(default_factory=set)
    """Pairs of window and query heads per key head, one pair for each mask that the layers use."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        self.shapes[int(layer.layer_idx)] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])  # type: ignore[arg-type]
        self.softcaps.add(args.softcap)
        groups = query.shape[1] // key.shape[1]
        self.masks.add((args.window, groups))
        positions = torch.arange(query.shape[2], device=query.device)
        visible = positions <= positions[:, None]
        if args.window is not None:
            visible = visible & (positions > positions[:, None] - args.window)
        key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
        return masked_attention(query, key, value, additive_mask(visible, query.dtype), args).transpose(1, 2)

    def needs(self, model: PreTrainedModel) -> AttentionNeeds:
        return AttentionNeeds(
            device=model.device,
            dtype=model.dtype,
            head_dims=frozenset(dim for shape in self.shapes.values() for dim in (shape.key_dim, shape.value_dim)),
            softcaps=frozenset(self.softcaps),
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, view: PreTrainedModel) -> ProbePass:
    """Compare the logits of the target view and of the user's model on passes of several lengths over random tokens.

    The bound on a difference is wide for rounding errors and narrow for a wrong computation.

    Raises:
        UnsupportedModelError: logits differ by more than rounding explains, are not finite, or depend on the number of
            tokens in the pass.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_size(model.config), (1, _PROBE_LENGTHS[0]), generator=generator).to(model.device)
    recorded = ProbePass()
    positions = torch.arange(_PROBE_LENGTHS[0], device=tokens.device)[None]
    ours = [run_view(view, tokens[:, :t], positions[:, :t], recorded).float() for t in _PROBE_LENGTHS]
    unseen = set(range(len(decoder_layers(view)))) - set(recorded.shapes)
    if unseen:
        raise UnsupportedModelError(
            f"attention of layer {min(unseen)} cannot be reached in a copy of this '{model.config.model_type}'; if its "
            "forward was replaced (layer.forward = torch.compile(...)), wrap the model before that"
        )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        theirs = [model(input_ids=tokens[:, :t], use_cache=False).logits.float() for t in _PROBE_LENGTHS]
    finally:
        for module in training:  # not model.train(): the user may have put some modules in evaluation mode
            module.training = True
    if not theirs[0].isfinite().all():
        raise UnsupportedModelError(
            "the model's own logits hold NaN or infinity on a short input; check the weights, or use a wider dtype"
        )
    eps = torch.finfo(model.dtype).eps
    bound = (64 if eps < 1e-5 else 32) * eps * max(theirs[0].abs().max().item(), 1.0)
    for t, own in zip(_PROBE_LENGTHS, theirs, strict=True):
        if not (difference := _largest(own - theirs[0][:, :t])) <= bound:
            raise UnsupportedModelError(
                f"{hook_reason(model) or 'the model'}: logits of the same tokens depend on the length of the pass (by "
                f"{difference:.3g} between {t} and {_PROBE_LENGTHS[0]} tokens, where rounding explains {bound:.3g}); "
                "quantisers of activations do so"
            )
    difference = max(_largest(own - copied) for own, copied in zip(theirs, ours, strict=True))
    if not difference <= bound:
        hooked = hook_reason(model)
        cause = "" if hooked is None else f"; {hooked}: wrap the model before you register hooks"
        raise UnsupportedModelError(
            f"this '{model.config.model_type}' cannot be reproduced: the largest logit difference on a short input is "
            f"{difference:.3g}, where rounding explains {bound:.3g}{cause}"
        )
    _check_windows(model, recorded)
    return recorded


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _check_windows(model: PreTrainedModel, recorded: ProbePass) -> None:
    """Refuse a model whose config was changed to another window than the one its attention was built with.

    Hugging Face takes the window of the mask from the config at each call. The probe is shorter than most windows.
    """
    config = model.config.get_text_config()
    given, used = getattr(config, "sliding_window", None), {window for window, _ in recorded.masks} - {None}
    if used and used != {given}:
        raise UnsupportedModelError(
            f"config.sliding_window is {given}, but the attention layers were built with {sorted(used)}; "  # type: ignore[type-var]
            "load the model again with the config that it should have"
        )
