"""Tiny random models of every supported family, on which a draft is right about half of the time.

Random weights make poor test subjects: text that loops after a few tokens, and drafts that are always or never right,
would leave either acceptance or rejection untested. So weights are drawn here, not by Hugging Face (its draws change
between releases), strong enough that text does not loop; and the sub-layers that a draft will skip are damped, so that
leaving them out changes some tokens and not others. `assert_exercised` checks both on the run at hand.
"""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from selfspec import SkipSet, Stats

LAYERS = 7
VOCABULARY = 211
WINDOW = 5
PAD = 0

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The argument by which Hugging Face takes a cache: renamed in transformers 5.24."""

ENDS_SKIPPED = SkipSet(attn={0, 2, 3, 6}, mlp={2, 4, 6})
"""Skips attention alone in the first layer, and all of a middle layer and the last."""
FIRST_DROPPED = SkipSet(attn={0, 3, 6}, mlp={0, 3, 5})
"""Drops the first layer and a middle one, and skips attention alone in the last."""

_SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 72,
    "intermediate_size": 89,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_OWN_HEAD_SIZE = {"head_dim": 20}  # heads need not fill the hidden size, so let them not
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Irregular, so that dropping a layer moves the kinds of those behind it.
_MIXED = {"sliding_window": WINDOW, "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING]}
_ROPE_BY_KIND = {
    _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    _FULL: {"rope_type": "default", "rope_theta": 10000.0},
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "arcee": _OWN_HEAD_SIZE,
    "cohere": {},
    "cohere2": _OWN_HEAD_SIZE | _MIXED,
    "ernie4_5": _OWN_HEAD_SIZE,
    "exaone4": _MIXED,
    "gemma": _OWN_HEAD_SIZE,
    "gemma2": _OWN_HEAD_SIZE | _MIXED | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 7.0},
    "gemma3_text": _OWN_HEAD_SIZE | _MIXED | {"rope_parameters": _ROPE_BY_KIND},
    "glm": _OWN_HEAD_SIZE,
    "glm4": _OWN_HEAD_SIZE,
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": _OWN_HEAD_SIZE,
    "llama": _OWN_HEAD_SIZE,
    "ministral": _OWN_HEAD_SIZE | _MIXED,
    "mistral": _OWN_HEAD_SIZE | {"sliding_window": WINDOW},
    # The kernel of mixtures of experts wants rows of whole 16 bytes.
    "mixtral": _OWN_HEAD_SIZE | {"sliding_window": WINDOW, "num_local_experts": 3, "intermediate_size": 48},
    "olmo": {"clip_qkv": 3.0},
    "olmo2": {},
    "olmo3": _MIXED | {"rope_parameters": _ROPE_BY_KIND},
    "phi": {"intermediate_size": 29},  # a wider MLP drowns attention, and text loops
    "phi3": {"sliding_window": WINDOW},
    "qwen2": _MIXED | {"use_sliding_window": True},
    "qwen3": _OWN_HEAD_SIZE | _MIXED | {"use_sliding_window": True},
    "qwen3_moe": _OWN_HEAD_SIZE
    | {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "moe_intermediate_size": 48,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "seed_oss": _OWN_HEAD_SIZE | {"attention_out_bias": True},
    "smollm3": _MIXED | {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1, 0, 1, 1]},
    "starcoder2": {"sliding_window": WINDOW},
}

_USUAL = (0, 0.08, 0.045)
_TUNED: dict[str, tuple[int, float, float]] = {
    "apertus": (1, 0.08, 0.045),
    "arcee": (5, 0.2, 0.03),
    "cohere2": (0, 0.13, 0.03),
    "ernie4_5": (0, 0.045, 0.03),
    "gemma": (0, 0.045, 0.045),
    "gemma2": (0, 0.08, 0.13),
    "gemma3_text": (3, 0.045, 0.08),
    "glm": (0, 0.045, 0.045),
    "glm4": (0, 0.045, 0.045),
    "granite": (0, 0.13, 0.08),
    "helium": (0, 0.045, 0.02),
    "hunyuan_v1_dense": (4, 0.08, 0.045),
    "llama": (0, 0.03, 0.02),
    "ministral": (0, 0.08, 0.03),
    "mistral": (0, 0.03, 0.03),
    "mixtral": (0, 0.045, 0.045),
    "olmo": (0, 0.08, 0.03),
    "olmo2": (5, 0.045, 0.08),
    "olmo3": (0, 0.045, 0.08),
    "phi": (5, 0.1, 0.03),
    "qwen2": (0, 0.045, 0.02),
    "seed_oss": (0, 0.045, 0.03),
    "starcoder2": (1, 0.045, 0.08),
}
"""Seed, and scales of what ENDS_SKIPPED and FIRST_DROPPED skip, with which drafts are right about half of the time.

Families that are not named have `_USUAL`."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A tiny model of `family` with weights drawn from `seed`, in eval mode. `config` overrides its settings."""
    settings = _SIZES | _FAMILIES[family] | config
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    _draw_weights(model, seed)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # older transformers choose sdpa, which leaves the soft cap out
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def damped_model(family: str, skip_set: SkipSet, **options: Any) -> PreTrainedModel:
    """A tiny model whose draft without `skip_set` (one of the two above) is right about half of the time."""
    seed, ends_skipped, first_dropped = _TUNED.get(family, _USUAL)
    model = tiny_model(family, seed=seed, **options)
    damp(model, skip_set, {ENDS_SKIPPED: ends_skipped, FIRST_DROPPED: first_dropped}[skip_set])
    return model


@torch.no_grad()
def damp(model: PreTrainedModel, skip_set: SkipSet, scale: float) -> None:
    """Scale down what the sub-layers of `skip_set` add to the residual stream."""
    layers = model.get_decoder().layers
    for kind, index in skip_set:
        for module in _last_of_branch(layers[index], kind):
            if _is_gemma_norm(module):
                module.weight.add_(1).mul_(scale).sub_(1)
            else:
                for parameter in module.parameters():
                    parameter.mul_(scale)


def prompts(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded on the left, and their attention mask: both `b t`."""
    width = max(lengths)
    tokens = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return tokens * mask + PAD * (1 - mask), mask


def assert_exercised(stats: Stats, sequences: Tensor, prompt_width: int) -> None:
    """The run both accepted and rejected drafts, and wrote text that does not loop: else equality proves little."""
    assert 0.3 < stats.acceptance_rate < 0.9, f"acceptance rate {stats.acceptance_rate:.2f} leaves a path untested"
    for row in sequences[:, prompt_width:].tolist():
        assert distinct_trigrams(row) > 0.8, f"the text loops: {row}"


def distinct_trigrams(tokens: list[int]) -> float:
    """The share of distinct ones among the runs of three tokens."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams)


def zero_skipped_branches(model: PreTrainedModel, skip_set: SkipSet) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook zeros into the user's model where a draft without `skip_set` skips: what its draft view must compute."""
    layers = model.get_decoder().layers
    return [
        layers[index].get_submodule("self_attn" if kind == "attn" else "mlp").register_forward_hook(_return_zeros)
        for kind, index in skip_set
    ]


def _return_zeros(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        noise = torch.randn(parameter.shape, generator=generator)
        owner = model.get_submodule(name.rpartition(".")[0])
        with torch.no_grad():
            parameter.copy_(_shaped(name, noise, gemma_norm=_is_gemma_norm(owner)))
    if model.config.model_type.startswith("gemma"):  # which scales its embeddings up
        model.get_input_embeddings().weight.data *= model.config.hidden_size**-0.5


def _shaped(name: str, noise: Tensor, *, gemma_norm: bool) -> Tensor:
    """Normal noise, scaled to what the parameter of this name is for."""
    if "embed_tokens" in name:
        return noise
    if "norm" in name and name.endswith("weight"):
        return 0.2 * noise + (0.0 if gemma_norm else 1.0)
    if noise.ndim < 2:  # biases, and activations' own parameters
        return 0.2 * noise
    strong = ("q_proj", "k_proj", "down_proj", "fc2", "c_proj", "dense")
    return noise * (2.0 if any(part in name for part in strong) else 1.2) * noise.shape[-1] ** -0.5


def _is_gemma_norm(module: nn.Module) -> bool:
    """Gemma's norms multiply by 1 + weight."""
    return type(module).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")


def _last_of_branch(layer: nn.Module, kind: str) -> list[nn.Module]:
    """The module whose scale is the scale of the branch: the norm behind it if there is one, else its last linear."""
    behind = {"attn": ("post_self_attn_layernorm",), "mlp": ("post_mlp_layernorm", "post_feedforward_layernorm")}[kind]
    if kind == "attn" and hasattr(layer, "post_feedforward_layernorm"):
        behind = ("post_attention_layernorm",)  # elsewhere this name means the norm in front of the MLP
    for name in behind:
        if hasattr(layer, name):
            return [layer.get_submodule(name)]
    branch = layer.get_submodule("self_attn" if kind == "attn" else "mlp")
    last = {"attn": ("o_proj", "dense"), "mlp": ("down_proj", "fc2", "c_proj")}[kind]
    if hasattr(branch, "experts"):
        return [_Holder(branch.experts.down_proj)]
    return [getattr(branch, name) for name in last if hasattr(branch, name)]


class _Holder(nn.Module):
    """One parameter as a module."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter
