"""FlashAttention: the flash-attn package, and PyTorch's own kernel. No other file imports or calls either."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds
from selfspec.runtime.forward_pass import Backend, Pass
from selfspec.utils.devices import dtype_name


class FlashAttn(Backend):
    """`flash_attn_with_kvcache` of the flash-attn package: one kernel appends and attends, lengths on the device."""

    name = "flash-attn"

    @staticmethod
    def unsupported_reason(needs: AttentionNeeds) -> str | None:
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        return _flash_unsupported_reason(needs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, args: AttentionArgs
    ) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        window = -1 if args.window is None else args.window - 1
        attended: Tensor = _flash_attn(
            query, key, value, keys, values, step.lengths, args.scale, window, args.softcap or 0.0
        )
        return attended


# A custom operator, because `torch.compile` cannot trace the package's function.
@torch.library.custom_op("selfspec::flash_attn_with_kvcache", mutates_args=("keys", "values"))
def _flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    attended: Tensor = flash_attn_with_kvcache(
        query,
        keys,
        values,
        k=key,
        v=value,
        cache_seqlens=lengths,
        softmax_scale=scale,
        causal=True,
        window_size=(window, -1 if window < 0 else 0),
        softcap=softcap,
    )
    return attended.contiguous()


@_flash_attn.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


class TorchFlash(Backend):
    """PyTorch's own FlashAttention-2 with `seqused_k`: no package needed, no soft cap."""

    name = "torch-flash"

    @staticmethod
    def unsupported_reason(needs: AttentionNeeds) -> str | None:
        if needs.has_softcap:
            return "PyTorch's flash kernel has no soft cap"
        if not hasattr(torch.ops.aten, "_flash_attention_forward"):
            return "this PyTorch has no flash kernel"
        return _flash_unsupported_reason(needs)

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        """Start offsets of the rows in the queries and in the cache, and the number of used slots in each row."""
        return step.starts(step.t), step.starts(step.s), step.lengths + step.t

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, args: AttentionArgs
    ) -> Tensor:
        step.append(keys, key)
        step.append(values, value)
        b, s = keys.shape[:2]
        query_starts, slot_starts, used = step.prepared
        attended = torch.ops.aten._flash_attention_forward(
            rearrange(query, "b h t d -> (b t) h d"),
            rearrange(keys, "b s h d -> (b s) h d"),
            rearrange(values, "b s h d -> (b s) h d"),
            query_starts,
            slot_starts,
            step.t,
            s,
            0.0,
            True,
            False,
            scale=args.scale,
            window_size_left=None if args.window is None else args.window - 1,
            window_size_right=None if args.window is None else 0,
            seqused_k=used,
        )[0]
        result: Tensor = rearrange(attended, "(b t) h d -> b t h d", b=b)
        return result


def _flash_unsupported_reason(needs: AttentionNeeds) -> str | None:
    if needs.device.type != "cuda":
        return f"flash kernels need CUDA, but the model is on {needs.device.type}"
    if torch.cuda.get_device_capability(needs.device) < (8, 0):
        return "flash kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels need float16 or bfloat16, but the model is in {dtype_name(needs.dtype)}"
    if max(needs.head_dims) > 256 or any(d % 8 for d in needs.head_dims):
        return f"flash kernels need head sizes that are multiples of 8 up to 256, not {sorted(needs.head_dims)}"
    return None
