"""Sdpa: PyTorch's scaled dot-product attention, which serves every device and dtype."""

from __future__ import annotations

from torch import Tensor

from selfspec.models.attention_hook import AttentionArgs, AttentionNeeds, masked_attention
from selfspec.runtime.forward_pass import Pass


class Sdpa:
    """PyTorch's scaled dot-product attention with a mask: every device, every dtype; the reference."""

    name = "sdpa"
    masks = True

    @staticmethod
    def unsupported_reason(needs: AttentionNeeds) -> str | None:
        return None

    @staticmethod
    def prepare(step: Pass) -> tuple[Tensor, ...]:
        return ()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, how: AttentionArgs
    ) -> Tensor:
        step.append(keys, key)
        step.append(values, value)
        (b, h, t, _), heads = query.shape, keys.shape[2]
        groups = h // heads
        # A key head's group of query heads is folded into the query's length, so that nothing of the cache is copied:
        # "b (h g) t d -> b h (g t) d" and back, in plain views, since einops costs as much here as attention itself.
        folded = query.reshape(b, heads, groups * t, -1)
        mask = step.mask(how.window, groups, query.dtype)
        keys, values = (cached[:, : step.s].transpose(1, 2) for cached in (keys, values))
        attended: Tensor = masked_attention(folded, keys, values, mask, how)
        return attended.reshape(b, h, t, -1).transpose(1, 2)
