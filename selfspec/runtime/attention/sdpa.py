"""Sdpa: PyTorch's scaled dot-product attention, for every device and dtype."""

from __future__ import annotations

from torch import Tensor

from selfspec.models.attention_hook import AttentionArgs, masked_attention
from selfspec.runtime.forward_pass import Backend, Pass


class Sdpa(Backend):
    """PyTorch's scaled dot-product attention with a mask. The tests compare the other backends with this backend."""

    name = "sdpa"
    uses_masks = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, step: Pass, args: AttentionArgs
    ) -> Tensor:
        step.append(keys, key)
        step.append(values, value)
        (b, h, t, _), heads = query.shape, keys.shape[2]
        groups = h // heads
        # Fold each key head's group of query heads into the token axis, so that no keys or values are copied:
        # "b (h g) t d -> b h (g t) d" and back, as plain views: here einops takes as long as the attention itself.
        folded = query.reshape(b, heads, groups * t, -1)
        mask = step.mask(args.window, groups, query.dtype)
        keys, values = (cached[:, : step.s].transpose(1, 2) for cached in (keys, values))
        attended: Tensor = masked_attention(folded, keys, values, mask, args)
        return attended.reshape(b, h, t, -1).transpose(1, 2)
