"""Sampling: how the target chooses its tokens, in the search as later in `generate`; greedy by default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from selfspec.decoding.logits_processors import CONTEXT_FREE
from selfspec.errors import InputError

_CONTEXTUAL = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor)
"""Functions of a text's own tokens and nothing else: neither of its place in a batch nor of where its prompt ended."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of `generate` that the search honours; None leaves a setting to the model's own generation config."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was set, as keyword arguments of `generate`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolved(self, model: PreTrainedModel) -> dict[str, Any]:
        """What is in force: what was set, the processors that this model's generation config adds, and its stops."""
        config = model.generation_config
        processors = {
            type(processor).__name__: {name: _plain(value) for name, value in vars(processor).items()}
            for processor in self.processors(model)
        }
        stops = config.eos_token_id if config is not None else None
        return {**self.to_dict(), "processors": processors, "stops": _plain(stops)}

    def processors(self, model: PreTrainedModel) -> LogitsProcessorList:
        """The processors that `model.generate` would apply, those of the model's own generation config included.

        Raises:
            InputError: values that Hugging Face refuses, or a processor that cannot be replayed.
        """
        prepared: list[LogitsProcessorList] = []

        def take(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> Tensor:
            prepared.append(given["logits_processor"])
            return input_ids

        prompt = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        options = self.to_dict() | {"max_new_tokens": 2**10, "cache_implementation": "dynamic"}
        try:
            model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), custom_generate=take, **options
            )
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from None
        for processor in prepared[0]:
            if type(processor) not in CONTEXT_FREE and type(processor) not in _CONTEXTUAL:
                raise InputError(
                    f"the model's generation config asks for {type(processor).__name__}, which the search cannot "
                    "replay; remove that setting from the config"
                )
        return prepared[0]


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, list)) or value is None else str(value)


def process_packed(
    processors: LogitsProcessorList, logits: Tensor, tokens: Tensor, begins: Tensor, lengths: Tensor
) -> Tensor:
    """Processed float32 scores for logits `a v`, each behind its own `tokens[begins : begins + lengths]` (`a` each)."""
    scores = logits.to(torch.float32, copy=True)
    for processor in processors:
        if type(processor) in CONTEXT_FREE:
            scores = processor(tokens[None, :0], scores)
            continue
        for length in lengths.unique().tolist():
            these = (lengths == length).nonzero()[:, 0]
            contexts = tokens[begins[these][:, None] + torch.arange(length, device=tokens.device)]
            scores[these] = processor(contexts, scores[these])
    return scores
