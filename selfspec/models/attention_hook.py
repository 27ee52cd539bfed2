"""The attention function that views call, and what it hands on.

Hugging Face's attention modules look their attention function up by name. A view's config carries our name, and the
function registered under it does nothing but ask the pass it was handed: the runtime's pass appends to the KV cache
and attends to it, the probe's records shapes, the replay's attends to recorded keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "selfspec"


class AttentionPass(Protocol):
    """What a view's attention modules ask. Query `b h t d`, key and value `b hkv t d`; returns `b t h d`."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: AttentionArgs) -> Tensor: ...


@dataclass(frozen=True)
class AttentionArgs:
    """What the model asks of attention: a window of w sees the token itself and the w - 1 before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None


def dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    selfspec_pass: AttentionPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention function: hand everything to the pass."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = AttentionArgs(scale=scale, window=sliding_window, softcap=softcap)
    return selfspec_pass.attend(module, query, key, value, how), None


def register() -> None:
    """Make `ATTENTION_NAME` known to Hugging Face. No mask function goes with it, so that no mask is built."""
    AttentionInterface.register(ATTENTION_NAME, dispatch)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of a backend, found by the probe."""

    device: torch.device
    dtype: torch.dtype
    head_dims: frozenset[int]
    windows: frozenset[int | None] = frozenset({None})
    softcaps: frozenset[float | None] = frozenset({None})

    @property
    def has_softcap(self) -> bool:
        return bool(self.softcaps - {None})


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer caches per token: key and value heads, and their sizes."""

    heads: int
    key_dim: int
    value_dim: int


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: AttentionArgs) -> Tensor:
    """Attention of `b h t d` over `b h s d`, with an additive mask that broadcasts to `b h t s` and the soft cap."""
    if how.softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scale)
    scores = query @ key.transpose(-1, -2) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, minus infinity elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def fold_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask `b t s` for queries whose groups of heads were folded into their length: `b 1 (g t) s`."""
    return repeat(mask, "b t s -> b 1 (g t) s", g=groups)
