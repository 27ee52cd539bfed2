"""Memory: how many starts a replay may take into one pass, so that all it holds stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.models.support import probe
from selfspec.models.views import target_view
from selfspec.utils.sizes import in_words
from selfspec_search.replay.recording import PADDING, batches
from selfspec_search.replay.texts import Text

_COLUMNS = 100
"""Bytes of a start's places, kept and on the way, and of its text's token."""
ON_CPU = 4 * 2**30
"""The budget where none is given and there is no accelerator whose free memory could be asked for."""
SHARE = 0.5
"""Of an accelerator's free memory, the budget where none is given."""


class Memory:
    """Estimates, from above, of what a replay of `depths` holds beside the model, in bytes."""

    def __init__(
        self, model: PreTrainedModel, depths: int, budget: int | None = None, *, sampled: bool = False
    ) -> None:
        config, item = model.config.get_text_config(), model.dtype.itemsize
        shapes = probe(model, target_view(model)).shapes.values()
        self.budget = self.default(model.device) if budget is None else budget
        self.per_token: int = sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes) * item
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        # Logits, their float32 copies for processors and softmax, and what top-p sorts and sums; a layer's activations;
        # keys and values of all depths, twice while starts are dropped.
        draft_weights = item + (32 if sampled else 12)
        activations = 12 * hidden + _mlp_activations(config, hidden)
        self._per_start: int = vocabulary * draft_weights + activations * item + 2 * depths * self.per_token
        self._heads = int(config.num_attention_heads)
        # Those of depth 0: for windows and without, for every query head that shares a key, laid out with padding.
        groups = -(-self._heads // min(shape.heads for shape in shapes))
        self._kept_masks = 2 * groups * item * PADDING

    @staticmethod
    def default(device: torch.device) -> int:
        if device.type == "cuda":
            return int(SHARE * torch.cuda.mem_get_info(device)[0])
        return ON_CPU

    def recorded(self, texts: Sequence[Text]) -> int:
        """Keys and values of the texts, padded as they are recorded, and the places of all starts."""
        padded = sum(len(batch) * max(len(texts[index]) for index in batch) for batch in batches(texts))
        return (self.per_token + _COLUMNS) * padded

    def per_start(self, texts: Sequence[Text]) -> int:
        """One start's share of a pass, with the scores and masks of attention to the longest text, and kept masks."""
        return self._per_start + (12 * self._heads * PADDING + self._kept_masks) * max(map(len, texts))

    def most_starts(self, texts: Sequence[Text]) -> int:
        """How many starts may go through all depths together, at least one."""
        return max(1, (self.budget - self.recorded(texts)) // self.per_start(texts))

    def check(self, texts: Sequence[Text]) -> None:
        """Raise `InputError` where the budget does not hold the recorded texts and one start."""
        recorded, one = self.recorded(texts), self.per_start(texts)
        if self.budget < recorded + one:
            raise InputError(
                f"a memory budget of {in_words(self.budget)} is too small: the keys and values of {len(texts)} texts "
                f"take {in_words(recorded)}, and one position {in_words(one)}; give at least "
                f"{in_words(recorded + one)}, or fewer or shorter prompts"
            )


def _mlp_activations(config: Any, hidden: int) -> int:
    """Values that an MLP holds of one token; a mixture of experts, for each that a token is sent to, inputs as well."""
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 0
    of_experts = experts * (3 * (getattr(config, "moe_intermediate_size", None) or wide) + 3 * hidden)
    return int(max(3 * wide, of_experts))
