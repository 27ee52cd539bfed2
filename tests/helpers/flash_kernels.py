"""CPU substitutes for the FlashAttention kernels: plain attention that checks the kernels' arguments."""

from __future__ import annotations

import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from selfspec.models.attention_hook import AttentionArgs

FLASH_SCHEMA = torch.ops.aten._flash_attention_forward.default._schema


def reference(query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
    """Plain attention for one row: the last `t` of `n` tokens attend causally. Shapes `t h d`, `n hkv d`."""
    t, heads, _ = query.shape
    n, kv_heads, _ = key.shape
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    out = query.new_zeros(t, heads, value.shape[-1])
    for i in range(t):
        end = n - t + i + 1
        start = 0 if args.window is None else max(0, end - args.window)
        scores = torch.einsum("hd,nhd->nh", query[i], key[start:end]) * args.scale
        if args.softcap is not None:
            scores = args.softcap * torch.tanh(scores / args.softcap)
        out[i] = torch.einsum("nh,nhd->hd", scores.softmax(0), value[start:end])
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """The package's function: appends, then attends up to each row's last new token."""
    assert cache_seqlens.dtype == torch.int32
    assert causal
    left, right = window_size
    assert right == (-1 if left < 0 else 0)
    attention = AttentionArgs(scale=softmax_scale, window=None if left < 0 else left + 1, softcap=softcap or None)
    rows = []
    for row, length in enumerate(cache_seqlens.tolist()):
        end = length + q.shape[1]
        k_cache[row, length:end], v_cache[row, length:end] = k[row], v[row]
        rows.append(reference(q[row], k_cache[row, :end], v_cache[row, :end], attention))
    return torch.stack(rows)


def flash_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """PyTorch's operator: causality and windows align with the last used key (`seqused_k`), not with the last slot."""
    names = [argument.name for argument in FLASH_SCHEMA.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    assert set(given) <= set(names)
    query, key, value, used = given["query"], given["key"], given["value"], given["seqused_k"]
    starts, slots = given["cum_seq_q"].tolist(), given["cum_seq_k"].tolist()
    assert given["max_q"] == max(b - a for a, b in pairwise(starts))
    assert given["max_k"] == max(b - a for a, b in pairwise(slots))
    assert {x.dtype for x in (given["cum_seq_q"], given["cum_seq_k"], used)} == {torch.int32}
    assert given["is_causal"]
    assert given["dropout_p"] == 0.0
    assert not given["return_debug_mask"]
    left = given["window_size_left"]
    assert given["window_size_right"] == (None if left is None else 0)
    attention = AttentionArgs(scale=given["scale"], window=None if left is None else left + 1)
    rows = [
        reference(query[a:b], key[first : first + n], value[first : first + n], attention)
        for (a, b), first, n in zip(pairwise(starts), slots, used.tolist(), strict=False)
    ]
    return torch.cat(rows), query, query, query, query


@pytest.fixture
def flash_attn_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `flash_attn` with the substitute for `flash_attn_with_kvcache`."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def flash_kernels(monkeypatch: pytest.MonkeyPatch, flash_attn_installed: None) -> None:
    """Substitutes for both FlashAttention kernels."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention_forward)
