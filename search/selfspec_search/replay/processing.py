"""The logits processors of a `Sampling` for a model, and their use on logits of packed texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from selfspec.decoding.logits_processors import CONTEXT_FREE
from selfspec.errors import InputError
from selfspec.huggingface.options import set_aside

_CONTEXTUAL = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor)
"""Processors that depend on a text's tokens only, not on the batch or the end of the prompt."""


def processors_of(options: dict[str, Any], model: PreTrainedModel) -> LogitsProcessorList:
    """The processors of `Sampling.processors`; `options` are keyword arguments of `generate`."""
    prepared: list[LogitsProcessorList] = []

    def take(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> Tensor:
        prepared.append(given["logits_processor"])
        return input_ids

    prompt = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    given_options = options | {"max_new_tokens": 2**10, "cache_implementation": "dynamic", "stop_strings": None}
    set_aside(model, None, given_options, streams=True)
    try:
        model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), custom_generate=take, **given_options
        )
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from None
    for processor in prepared[0]:
        if type(processor) not in CONTEXT_FREE and type(processor) not in _CONTEXTUAL:
            raise InputError(
                f"the model's generation config asks for {type(processor).__name__}, which the search cannot "
                "replay; remove that setting from the generation config"
            )
    return prepared[0]


def process_packed(
    processors: LogitsProcessorList, logits: Tensor, tokens: Tensor, begins: Tensor, lengths: Tensor
) -> Tensor:
    """Processed float32 scores `a v` for logits `a v`; the context of each is `tokens[begins : begins + lengths]`."""
    if not processors:
        return logits.float()
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
