"""Distributions and draws: the next token for processed logits. p is the target's distribution, q the draft's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_probs(scores: Tensor) -> Tensor:
    """Processed logits to probabilities, float32."""
    return torch.softmax(scores.float(), dim=-1)


def sample(probs: Tensor) -> Tensor:
    """One token from each distribution `... v`, by the exponential race: needs no read of the device."""
    # Zero probabilities stay zero, so an impossible token is never drawn.
    return (probs / torch.empty_like(probs).exponential_().clamp_min_(torch.finfo(probs.dtype).tiny)).argmax(dim=-1)


@dataclass(frozen=True)
class Picked:
    """A chosen token, and q where it was drawn."""

    token: Tensor  # b
    probs: Tensor | None  # b v


def pick(scores: Tensor, *, sampling: bool) -> Picked:
    """The next token for processed logits `b v`: drawn from q, or the likeliest if greedy."""
    if not sampling:
        return Picked(scores.argmax(dim=-1), None)
    probs = to_probs(scores)
    return Picked(sample(probs), probs)


def one_hot(tokens: Tensor, p: Tensor) -> Tensor:
    """All probability on each token: `b n` to `b n v`, in p's type."""
    return p.new_zeros(*tokens.shape, p.shape[-1]).scatter_(2, tokens[..., None], 1)
