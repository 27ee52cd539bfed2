"""Read: the share of the model's weights that a draft's pass reads: about its cost, where reading decides."""

from __future__ import annotations

from transformers import PreTrainedModel

from selfspec import DraftSpec
from selfspec.models.draft_weights import branch

FULL_BITS = 16


def read_share(model: PreTrainedModel, draft_spec: DraftSpec, bits: float | None) -> float:
    """Of the weights in 16 bits: those of the sub-layers that are not skipped and of the head, in `bits` where they are
    quantised."""
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
