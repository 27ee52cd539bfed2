"""Prefill: cache prompts in chunks, without computing logits."""

from __future__ import annotations

import torch
from torch import Tensor

from selfspec.models.views import run_view
from selfspec.runtime.runtime import Runtime

CPU_CHUNK = 512
"""Tokens: each row's share of one prefill pass on a CPU."""
GPU_PASS = 8192
"""Tokens: all rows' share of one prefill pass on a GPU. Keeps a GPU busy, and an MLP's activations below a gigabyte."""


def chunk_length(runtime: Runtime) -> int:
    """Tokens: each row's share of one prefill pass."""
    if runtime.model.device.type == "cpu":
        return CPU_CHUNK
    return max(CPU_CHUNK // 4, GPU_PASS // runtime.cache.rows)


def prefill_prompts(runtime: Runtime, prompts: Tensor, pads: Tensor) -> None:
    """Cache each prompt except its last token. `prompts` is `b P`, with `pads` (`b`) pad tokens on the left."""
    b, width = prompts.shape
    lengths = width - pads  # b
    longest = int(lengths.max())
    runtime.pin_longrope(longest)
    columns = torch.arange(longest - 1, device=prompts.device)
    # Shift each row left by its padding. No pass sees the tokens after a row's last token.
    compact = prompts.gather(1, (columns + pads[:, None]).clamp(max=width - 1).expand(b, -1))
    prefill(runtime, compact, lengths - 1)


@torch.inference_mode()
def prefill(runtime: Runtime, tokens: Tensor, lengths: Tensor) -> None:
    """Reset the cache, then cache the first `lengths` (`b`) tokens of each row of `tokens` (`b t`)."""
    runtime.cache.reset()
    extend(runtime, tokens)
    runtime.cache.lengths.copy_(lengths)


@torch.inference_mode()
def extend(runtime: Runtime, tokens: Tensor, *, static: bool = False) -> None:
    """Append `tokens` (`b t`) to the cache, and advance the cache's lengths by `t`."""
    cache = runtime.cache
    for chunk in tokens.split(chunk_length(runtime), dim=1) if tokens.shape[1] else ():  # prompts of one token: none
        step = cache.begin(chunk.shape[1], static=static)
        run_view(runtime.views["target"], chunk, step.positions, step, head=False)
        cache.lengths += chunk.shape[1]
