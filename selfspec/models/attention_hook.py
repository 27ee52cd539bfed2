"""The attention function that Hugging Face calls in a view, and the passes that the function forwards to.

Hugging Face's attention modules look up their attention function by name. A view's config holds `ATTENTION_NAME`, and
the function registered under that name forwards each call to the current pass. The runtime's pass appends to the KV
cache and attends to it, the probe's pass records shapes, and the replay's pass attends to recorded keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import AttentionInterface

from selfspec.errors import UnsupportedModelError

ATTENTION_NAME = "selfspec"


class AttentionPass(Protocol):
    """Computes attention for a view's attention modules: query `b h t d`, key and value `b hkv t d`; to `b t h d`."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs, /) -> Tensor: ...


@dataclass(frozen=True)
class AttentionArgs:
    """One attention layer's settings. A token with window `w` attends to itself and the `w - 1` tokens before it."""

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
    selfspec_pass: AttentionPass | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function with Hugging Face's signature: forward the call to the pass."""
    if selfspec_pass is None:
        raise UnsupportedModelError(
            f"attention of layer {module.layer_idx} cannot be reached: a forward above it drops its **kwargs; "
            "hand them on to the modules inside"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    args = AttentionArgs(scale=scale, window=sliding_window, softcap=softcap)
    return selfspec_pass.attend(module, query, key, value, args), None


def register() -> None:
    """Register `dispatch` with Hugging Face, without a mask function: Hugging Face then builds no mask."""
    AttentionInterface.register(ATTENTION_NAME, dispatch)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model requires of an attention backend, as the probe found."""

    device: torch.device
    dtype: torch.dtype
    head_dims: frozenset[int]
    softcaps: frozenset[float | None] = frozenset({None})

    @property
    def has_softcap(self) -> bool:
        return bool(self.softcaps - {None})


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer caches per token: the number of key and value heads, and the head sizes."""

    heads: int
    key_dim: int
    value_dim: int


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, args: AttentionArgs) -> Tensor:
    """Attention of `b h t d` over `b h s d`, with the soft cap and an additive mask that broadcasts to `b h t s`."""
    if args.softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=args.scale)
    scores = query @ key.transpose(-1, -2) * args.scale
    scores = torch.tanh(scores / args.softcap) * args.softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, minus infinity elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def fold_mask(mask: Tensor, groups: int) -> Tensor:
    """Repeat a mask `b t s` to `b 1 (g t) s`, for queries with the heads of a group folded into the token axis."""
    return repeat(mask, "b t s -> b 1 (g t) s", g=groups)
