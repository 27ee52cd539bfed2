"""Rounding: weights rounded to any number of bits, also without a kernel; and the bytes that a draft reads."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec import DraftSpec, Format, SubVocabulary
from selfspec.models.draft_weights import DraftWeights, branch

BITS = (2, 3, 4, 8)
GROUP = 32
"""Weights of an output that share a scale and a zero."""
OVERHEAD = 2 * 16 / GROUP
"""Bits of scale and zero per weight, both in bfloat16."""
FULL_BITS = 16


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """The weight `n k` in 2^bits even steps from the least to the greatest weight of each group."""
    groups = rearrange(weight.float(), "n (g i) -> n g i", i=GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    rounded = ((groups - low) / step).round() * step + low
    return rearrange(rounded, "n g i -> n (g i)").to(weight.dtype)


class RoundedCopies(DraftWeights):
    """Ordinary layers with rounded weights in place of quantised copies, for any format of a draft spec."""

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


def read_share(model: PreTrainedModel, draft_spec: DraftSpec, bits: float | None) -> float:
    """Bytes of the draft's sub-layers and head, quantised weights in `bits`, over the model's bytes in 16 bits."""
    read = whole = 0.0
    for kind in ("attn", "mlp"):
        for layer in range(model.config.num_hidden_layers):
            size = sum(parameter.numel() for parameter in branch(model, kind, layer).parameters())
            choice = draft_spec.choice(kind, layer)
            whole += size * FULL_BITS
            read += size * {"keep": FULL_BITS, "quantise": bits or FULL_BITS, "skip": 0.0}[choice]
    vocabulary, width = model.get_output_embeddings().weight.shape
    kept = vocabulary if draft_spec.vocabulary is None else len(draft_spec.vocabulary)
    head_bits = bits if draft_spec.quantised is not None and draft_spec.quantised.head else None
    return float((read + kept * width * (head_bits or FULL_BITS)) / (whole + vocabulary * width * FULL_BITS))
