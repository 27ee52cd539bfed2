"""Unsafe tokens: tokens whose input embedding is not finite. No pass verifies them: a masked NaN still spreads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

_ROWS = 4096
"""Tokens: the part of the embedding that is looked at in one step, for little memory."""


@dataclass(frozen=True)
class UnsafeTokens:
    """Tokens that must not enter a pass before the target itself chooses them.

    Attributes:
        mask: whether a token is unsafe, one entry a token.
        safe: a token that replaces unsafe tokens.
    """

    mask: Tensor
    safe: int

    def replaced(self, tokens: Tensor) -> Tensor:
        """The same tokens, with the safe token in place of unsafe tokens."""
        return tokens.masked_fill(self.mask[tokens], self.safe)

    def excluded(self, scores: Tensor) -> Tensor:
        """Scores `b v` without the unsafe tokens; a row in which no other token is possible stays as it is."""
        others = scores.masked_fill(self.mask[: scores.shape[-1]], -torch.inf)
        return torch.where((others > -torch.inf).any(dim=-1, keepdim=True), others, scores)


@torch.inference_mode()
def unsafe_tokens(model: PreTrainedModel) -> UnsafeTokens | None:
    """The unsafe tokens of a model; None if all its embeddings are finite."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if weight.sum().isfinite():  # NaN and infinity show in the sum, which takes a tenth of the time
        return None
    unsafe = torch.cat([~rows.isfinite().all(dim=-1) for rows in weight.split(_ROWS)])
    if not unsafe.any() or unsafe.all():
        return None
    missing = max(0, model.config.get_text_config().vocab_size - len(unsafe))
    return UnsafeTokens(torch.nn.functional.pad(unsafe, (0, missing)), int(unsafe.byte().argmin()))
