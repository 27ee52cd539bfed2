"""Which models are supported: an allow-list of tested families, and a probe of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import Parameter, signature

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, LayerShape, additive_mask, masked_attention
from selfspec.models.rope import rope_types
from selfspec.models.unsafe_tokens import unsafe_tokens
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

_PROBE_LENGTH = 11


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
            f"selfspec wraps a Hugging Face causal language model, but {type(model).__name__} was given"
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
    devices = {str(tensor.device) for tensor in model.parameters()}
    mapped = (getattr(model, "hf_device_map", None) or {}).values()
    devices |= {str(device) for device in mapped} & {"cpu", "disk", "meta"}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(devices))}; "
            "selfspec needs it whole on one device (model.to(device))"
        )


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


@dataclass
class ProbePass:
    """Attends causally within the pass, and records what each layer caches and requires."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    softcaps: set[float | None] = field(default_factory=set)
    masks: set[tuple[int | None, int]] = field(default_factory=set)
    """Pairs of window and query heads per key head, one pair for each mask that the layers use."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):
            raise UnsupportedModelError(
                "the model's own forward turns on torch.autocast (accelerate's mixed precision), and the views cannot "
                "reproduce that; wrap accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            )
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
    """Compare the logits of the target view and of the user's model on one short random input.

    The bound on the difference is wide for rounding errors and narrow for a wrong computation.

    Raises:
        UnsupportedModelError: the logits differ by more than rounding explains, or are not finite.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(vocabulary_size(model.config), (1, _PROBE_LENGTH), generator=generator, device="cpu")
    tokens = tokens.to(model.device)
    if (unsafe := unsafe_tokens(model)) is not None:
        tokens = unsafe.replaced(tokens)
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
        for module in training:  # not model.train(): the user may have put some modules in evaluation mode
            module.training = True
    masked = theirs == -torch.inf  # as padding of the vocabulary may be
    if masked.all(dim=-1).any() or not theirs[~masked].isfinite().all():
        raise UnsupportedModelError(
            "the model's own logits hold NaN or infinity on a short input; check the weights, or use a wider dtype"
        )
    if not torch.equal(masked, ours == -torch.inf):
        raise UnsupportedModelError(
            f"this '{model.config.model_type}' cannot be reproduced: other logits are minus infinity on a short input"
        )
    ours, theirs = ours[~masked], theirs[~masked]
    difference = (ours - theirs).abs().max().item()
    eps = torch.finfo(model.dtype).eps
    bound = (64 if eps < 1e-5 else 32) * eps * max(theirs.abs().max().item(), 1.0)
    if not difference <= bound:
        raise UnsupportedModelError(
            f"this '{model.config.model_type}' cannot be reproduced: the largest logit difference on a short input is "
            f"{difference:.3g}, where rounding explains {bound:.3g}"
        )
    return recorded
