"""Tiny models whose linear layers have sizes that quantised kernels take, and plans by which they draft well enough.

Sizes are multiples of 16, and inputs of the smallest group of int4, where `models.tiny_model` takes odd ones. A
quantised draft of random weights is seldom right, so only some sub-layers are quantised, and in most families they are
damped, as those are that the draft skips: then `models.assert_exercised` holds in int4 and in int8.
"""

from __future__ import annotations

from typing import Any

import torch
from models import _FAMILIES, damp, prompts, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from selfspec import Format, Plan, Quantised, QuantisedSet, SkipSet, SubVocabulary
from selfspec.plan.draft_spec import INT4

TOKENS = 208
"""The vocabulary: thirteen times sixteen."""
SKIPPED = SkipSet(attn={2, 3}, mlp={2, 5})
"""Drops a layer, skips attention alone in another, and the MLP alone in a third."""
QUANTISED = QuantisedSet(attn={0, 4, 6}, mlp={1, 3, 6})
"""Sub-layers whose other one is kept, skipped or quantised, too."""
PROPOSED = SubVocabulary.of((token for token in range(TOKENS) if token % 13 not in (5, 9)), TOKENS)
"""Eleven times sixteen tokens, for a trimmed head."""

_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48},
    "phi": {"intermediate_size": 32},  # a wider MLP drowns attention, and text loops
    "qwen3_moe": {"moe_intermediate_size": 48},
}
_USUAL = (0, 0.12, 0.5)
_TUNED: dict[str, tuple[int, float, float]] = {
    "apertus": (1, 0.12, 0.5),
    "arcee": (0, 0.25, 1.0),
    "cohere": (0, 0.06, 0.5),
    "cohere2": (0, 0.12, 1.0),
    "ernie4_5": (0, 0.06, 1.0),
    "exaone4": (0, 0.12, 1.0),
    "gemma2": (0, 0.06, 1.0),
    "gemma3_text": (0, 0.12, 0.25),
    "helium": (0, 0.06, 1.0),
    "hunyuan_v1_dense": (0, 0.03, 0.5),
    "llama": (0, 0.06, 0.5),
    "ministral": (0, 0.06, 0.25),
    "mistral": (0, 0.06, 0.5),
    "olmo": (0, 0.06, 1.0),
    "olmo2": (0, 0.12, 1.0),
    "olmo3": (0, 0.12, 1.0),
    "phi": (0, 0.06, 1.0),
    "phi3": (0, 0.12, 1.0),
    "qwen2": (0, 0.12, 1.0),
    "qwen3": (0, 0.25, 1.0),
}
"""Seed, and scales of what SKIPPED skips and of what QUANTISED quantises; `_USUAL` in families that are not named."""


def quantisable_model(family: str, **options: Any) -> PreTrainedModel:
    """`models.tiny_model` in sizes that kernels take."""
    head = {"head_dim": 16} if "head_dim" in _FAMILIES[family] else {}
    return tiny_model(family, **_SIZES | head | _OF_FAMILY.get(family, {}) | options)


def damped_model(family: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A model whose draft by `drafting` is right about half of the time."""
    seed, skipped, quantised = _TUNED.get(family, _USUAL)
    model = quantisable_model(family, seed=seed, **options)
    damp(model, SKIPPED, skipped)
    damp(model, QUANTISED, quantised)  # type: ignore[arg-type]  # any set of sub-layers
    return model.to(dtype)


def drafting(format: Format = INT4, *, head: bool = True, trimmed: bool = False, **changes: Any) -> Plan:
    """Draft in this format what QUANTISED names, without what SKIPPED does."""
    settings = {
        "skip_set": SKIPPED,
        "quantised": Quantised(format=format, sublayers=QUANTISED, head=head),
        "draft_vocabulary": PROPOSED.code if trimmed else None,
        "gamma": 3,
    }
    return Plan(**settings | changes)


def few_prompts(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """`models.prompts` of this vocabulary, as `generate` takes them."""
    tokens, mask = prompts(*lengths, seed=seed)
    return {"input_ids": tokens.clamp(max=TOKENS - 1), "attention_mask": mask}
