"""Agreement: find the scale of the skipped sub-layers that sets it, and measure it by decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from selfspec import SelfSpeculator, SkipSet

ATTENTION_SHARE, MLP_SHARE = 0.6, 0.3
"""Shares of the attention and MLP sub-layers that are skipped: together 45 %, as in published skip sets. Draft & Verify
skips 60 % and 25 % of a 13B model, 59 % and 46 % of a 70B model."""
PROJECTIONS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def published_share(num_layers: int) -> SkipSet:
    """A skip set of the published shares, spread evenly over all layers but the first and the last."""

    def spread(n: int) -> list[int]:
        return [1 + i * (num_layers - 2) // n for i in range(n)]

    return SkipSet(attn=spread(round(ATTENTION_SHARE * num_layers)), mlp=spread(round(MLP_SHARE * num_layers)))


def find_scale(
    agreement_at: Callable[[float], float], wanted: float, *, guess: float, tolerance: float, steps: int
) -> tuple[float, float]:
    """The scale in (0, 1] whose agreement is nearest to `wanted`, and that agreement.

    Disagreement is roughly proportional to the scale, so the next scale is extrapolated; bisection replaces an
    extrapolation outside the bracket. Stops within `tolerance`, or after `steps` scales.
    """
    low, high, scale, tried = 0.0, 1.0, guess, list[tuple[float, float]]()
    for _ in range(steps):
        agreement = agreement_at(scale)
        tried.append((scale, agreement))
        if abs(agreement - wanted) <= tolerance:
            break
        low, high = (scale, high) if agreement > wanted else (low, scale)
        proportional = scale * (1 - wanted) / max(1 - agreement, 1e-3)
        scale = proportional if low < proportional < high else (low + high) / 2
    return min(tried, key=lambda pair: abs(pair[1] - wanted))


def drafted_agreement(spec: SelfSpeculator, batches: Sequence[Tensor], new_tokens: int) -> float:
    """The accepted share of tokens drafted after an accepted prefix, over all depths, by decoding."""
    accepted = reached = 0
    for prompts in batches:
        write(spec, prompts, new_tokens)
        accepted += sum(spec.stats.accepted_at)
        reached += sum(spec.stats.reached_at)
    return accepted / reached if reached else 0.0


def write(spec: SelfSpeculator, prompts: Tensor, new_tokens: int) -> Tensor:
    """Decode greedily and return the new tokens, `b n`."""
    result = spec.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False)
    assert isinstance(result, Tensor), "no output object was asked for"
    return result[:, prompts.shape[1] :]


def distinct_share(rows: Iterable[Tensor]) -> float:
    """The share of distinct tokens in a row, averaged over rows; low values mean loops."""
    shares = [len(row.unique()) / len(row) for row in rows]
    return sum(shares) / len(shares)
