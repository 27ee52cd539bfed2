"""Rounding: weights rounded to any number of bits, as floats, for bits that have no kernel."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec import Format, SubVocabulary
from selfspec.models.draft_weights import DraftWeights, branch

BITS = (2, 3, 4, 8)
GROUP = 32
"""Inputs of an output that share a scale and a zero."""
OVERHEAD = 2 * 16 / GROUP
"""Bits a weight, of both, kept in bfloat16."""


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """The weight `n k` in 2^bits even steps from the least to the greatest of each group."""
    groups = rearrange(weight.float(), "n (g i) -> n g i", i=GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    rounded = ((groups - low) / step).round() * step + low
    return rearrange(rounded, "n g i -> n (g i)").to(weight.dtype)


class RoundedCopies(DraftWeights):
    """Stands in for quantised copies: ordinary layers with rounded weights, whatever format a draft spec names."""

    def __init__(self, model: PreTrainedModel, bits: int) -> None:
        super().__init__(model, many_tokens=True)
        self.bits = bits
        self._rounded: dict[tuple[str, int, str], nn.Module] = {}

    def linear(self, kind: str, layer: int, name: str, format: Format) -> nn.Module:
        return self._of((kind, layer, name), branch(self.model, kind, layer).get_submodule(name))

    def head(self, format: Format | None, vocabulary: SubVocabulary | None) -> nn.Module:
        own: nn.Module = self.model.lm_head  # type: ignore[assignment]
        assert vocabulary is None, "trimmed heads need no stand-in"
        return own if format is None else self._of(("head", 0, ""), own)

    def _of(self, key: tuple[str, int, str], original: nn.Module) -> nn.Module:
        if key not in self._rounded:
            assert isinstance(original, nn.Linear)
            self._rounded[key] = _rounded(original, self.bits)
        return self._rounded[key]


@torch.no_grad()
def _rounded(original: nn.Linear, bits: int) -> nn.Linear:
    outputs, inputs = original.weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(round_to_nearest(original.weight, bits), requires_grad=False)
    layer.bias = original.bias
    return layer
