"""Sampling: the next token for processed logits."""

from __future__ import annotations

import torch
from torch import Tensor


def to_probs(scores: Tensor) -> Tensor:
    """Processed logits to probabilities, float32."""
    return torch.softmax(scores.float(), dim=-1)


def sample(probs: Tensor) -> Tensor:
    """Draw one token from each distribution `... v`, by the exponential race: no read of the device."""
    # A zero probability stays zero, so an impossible token is never drawn.
    return (probs / torch.empty_like(probs).exponential_().clamp_min_(torch.finfo(probs.dtype).tiny)).argmax(dim=-1)


def next_tokens(scores: Tensor, *, sampling: bool) -> tuple[Tensor, Tensor | None]:
    """The next tokens (`b`) for processed logits `b v`, and q (`b v`) if they are drawn; greedy: the argmax."""
    if not sampling:
        return scores.argmax(dim=-1), None
    probs = to_probs(scores)
    return sample(probs), probs


def one_hot(tokens: Tensor, p: Tensor) -> Tensor:
    """All probability on each token: `b n` to `b n v`, in p's dtype."""
    return p.new_zeros(*tokens.shape, p.shape[-1]).scatter_(2, tokens[..., None], 1)
