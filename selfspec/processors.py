"""Hugging Face's logits processors and stopping criteria, on rows that are unequally long.

Each row's padded prompt, committed and preceding drafted tokens are what `model.generate` would have shown a processor
at that point, and the row keeps its index in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

_CONTEXT_FREE = frozenset(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)
"""Functions of the scores alone."""

_CONTEXTUAL = frozenset(
    getattr(logits_process, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensAtBeginLogitsProcessor",
    )
)
"""Functions of the tokens before and the scores, and of nothing else."""

_KNOWN_CRITERIA = frozenset(
    {
        stopping_criteria.MaxLengthCriteria,
        stopping_criteria.MaxTimeCriteria,
        stopping_criteria.StopStringCriteria,
        stopping_criteria.EosTokenCriteria,
    }
)


def needs_lockstep(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> list[str]:
    """Processors and criteria that must see each context exactly once, as in plain decoding: watermarks, guidance, the
    user's own. Anything that is not known to be a pure function is among them."""
    unknown = [type(p).__name__ for p in processors if type(p) not in _CONTEXT_FREE | _CONTEXTUAL]
    return unknown + [type(c).__name__ for c in criteria if type(c) not in _KNOWN_CRITERIA]


def process(processors: LogitsProcessorList, logits: Tensor, sequences: Tensor, ends: Tensor) -> Tensor:
    """Processed float32 scores for logits `b t v`, where row r at step j follows `sequences[r, :ends[r, j]]`."""
    scores = logits.to(torch.float32, copy=True)
    for processor in processors:
        if type(processor) in _CONTEXT_FREE:
            b = scores.shape[0]
            scores = processor(sequences[:, :0], scores.flatten(0, 1)).unflatten(0, (b, -1))
        else:
            scores = _process_by_length(processor, scores, sequences, ends)
    return scores


def _process_by_length(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor
) -> Tensor:
    """Call a processor once for each distinct length, with every row in its place; keep the rows of that length."""
    processed = torch.empty_like(scores)
    for end in ends.unique().tolist():
        rows, steps = torch.nonzero(ends == end, as_tuple=True)
        batch = torch.zeros_like(scores[:, 0])
        batch[rows] = scores[rows, steps]
        processed[rows, steps] = processor(sequences[:, :end], batch)[rows]
    return processed
