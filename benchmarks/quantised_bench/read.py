"""Read: the share of the model's weights that a draft's pass reads: about its cost, where reading decides."""

from __future__ import annotations

from transformers import PreTrainedModel

from selfspec import Recipe
from selfspec.models.draft_weights import branch

FULL_BITS = 16


def read_share(model: PreTrainedModel, recipe: Recipe, bits: float | None) -> float:
    """Of the weights in 16 bits: those of the sub-layers that are not skipped and of the head, in `bits` where they are
    quantised."""
    read = whole = 0.0
    for kind in ("attn", "mlp"):
        for layer in range(model.config.num_hidden_layers):
            size = sum(parameter.numel() for parameter in branch(model, kind, layer).parameters())
            choice = recipe.choice(kind, layer)
            whole += size * FULL_BITS
            read += size * {"keep": FULL_BITS, "quantise": bits or FULL_BITS, "skip": 0.0}[choice]
    vocabulary, width = model.get_output_embeddings().weight.shape
    kept = vocabulary if recipe.vocabulary is None else len(recipe.vocabulary)
    head_bits = bits if recipe.quantised is not None and recipe.quantised.head else None
    return float((read + kept * width * (head_bits or FULL_BITS)) / (whole + vocabulary * width * FULL_BITS))
