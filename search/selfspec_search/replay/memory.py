"""Memory: how many starts a replay may take into one pass within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.models.probe import probe
from selfspec.models.views import target_view
from selfspec.utils.sizes import in_words
from selfspec_search.replay.recording import MOST_PADDING, batches
from selfspec_search.replay.texts import Text

START_BYTES = 100
"""Bytes: a start's columns in `Starts`, their temporary copies, and the start's token."""
CPU_BUDGET = 4 * 2**30
"""Bytes: the default budget on a CPU."""
ACCELERATOR_SHARE = 0.5
"""Share of an accelerator's free memory that is the default budget."""


class Memory:
    """Upper estimates, in bytes, of the memory that a replay of `depths` depths takes in addition to the model."""

    def __init__(
        self, model: PreTrainedModel, depths: int, budget: int | None = None, *, sampled: bool = False
    ) -> None:
        config, item = model.config.get_text_config(), model.dtype.itemsize
        shapes = probe(model, target_view(model)).shapes.values()
        self.budget = self.default(model.device) if budget is None else budget
        self.per_token: int = sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes) * item
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        # Logits, their float32 copies for processors and softmax, and the sorts and sums of top-p; the activations of a
        # layer; keys and values of all depths, twice while failed starts are dropped.
        logits = item + (32 if sampled else 12)
        activations = 12 * hidden + _mlp_activations(config, hidden)
        self._per_start: int = vocabulary * logits + activations * item + 2 * depths * self.per_token
        self._heads = int(config.num_attention_heads)
        # Masks of depth 0: with and without a window, for every query head that shares a key, with padding.
        groups = -(-self._heads // min(shape.heads for shape in shapes))
        self._kept_masks = 2 * groups * item * MOST_PADDING

    @staticmethod
    def default(device: torch.device) -> int:
        if device.type == "cuda":
            return int(ACCELERATOR_SHARE * torch.cuda.mem_get_info(device)[0])
        return CPU_BUDGET

    def recorded(self, texts: Sequence[Text]) -> int:
        """Bytes of the recorded keys and values, padding included, and of all starts' columns."""
        padded = sum(len(batch) * max(len(texts[index]) for index in batch) for batch in batches(texts))
        return (self.per_token + START_BYTES) * padded

    def per_start(self, texts: Sequence[Text]) -> int:
        """Bytes of one start in a pass, with the masks and attention scores of the longest text."""
        return self._per_start + (12 * self._heads * MOST_PADDING + self._kept_masks) * max(map(len, texts))

    def most_starts(self, texts: Sequence[Text]) -> int:
        """Starts that fit into one pass through all depths, at least 1."""
        return max(1, (self.budget - self.recorded(texts)) // self.per_start(texts))

    def check(self, texts: Sequence[Text]) -> None:
        """Raise `InputError` if the budget is too small for the recorded texts and one start."""
        recorded, one = self.recorded(texts), self.per_start(texts)
        if self.budget < recorded + one:
            raise InputError(
                f"a memory budget of {in_words(self.budget)} is too small: the keys and values of {len(texts)} texts "
                f"take {in_words(recorded)}, and one position {in_words(one)}; give at least "
                f"{in_words(recorded + one)}, or fewer or shorter prompts"
            )


def _mlp_activations(config: Any, hidden: int) -> int:
    """Values that an MLP holds for one token. Each active expert of a mixture also holds a copy of its input."""
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 0
    of_experts = experts * (3 * (getattr(config, "moe_intermediate_size", None) or wide) + 3 * hidden)
    return int(max(3 * wide, of_experts))
