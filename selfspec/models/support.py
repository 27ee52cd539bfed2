"""Which models are supported: an allow-list of tested families, and a probe of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.errors import UnsupportedModelError
from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, LayerShape, additive_mask, masked_attention
from selfspec.models.rope import rope_types
from selfspec.models.views import decoder_layers, run_view

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


_PROBE_LENGTH = 11


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
