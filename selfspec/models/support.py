"""Which models are supported: an allow-list of tested families, and what no model may have."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.model_state import replaced_forward_reason
from selfspec.models.rope import rope_types
from selfspec.models.views import decoder_layers

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
    _check_forwards(model)
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


def _check_forwards(model: PreTrainedModel) -> None:
    """Refuse a forward that would not hand the pass down to attention."""
    layers = decoder_layers(model)
    above = [model, model.get_decoder(), *layers, *(getattr(layer, "self_attn", None) for layer in layers)]
    for name, module in model.named_modules():
        kinds = [p.kind for p in signature(module.forward).parameters.values()] if module in above else []
        if module in above and Parameter.VAR_KEYWORD not in kinds:
            where = f"{type(module).__name__} ({name or 'the model itself'})"
            raise UnsupportedModelError(
                f"the forward of {where} takes no **kwargs, through which selfspec reaches attention; "
                "add **kwargs and hand them on to the modules inside"
            )
