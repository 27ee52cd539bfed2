"""Hugging Face's logits processors and stopping criteria, on rows that are unequally long.

Each row's padded prompt, committed and preceding drafted tokens are what `model.generate` would have shown a processor
at that point, and the row keeps its index in the batch.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

CONTEXT_FREE = frozenset(
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

_CAPTURABLE = frozenset(
    {
        logits_process.TemperatureLogitsWarper,
        logits_process.TopKLogitsWarper,
        logits_process.TopPLogitsWarper,
        logits_process.MinPLogitsWarper,
        logits_process.RepetitionPenaltyLogitsProcessor,
    }
)
"""They neither read the device nor keep state, so a CUDA graph may hold what they do."""

_KNOWN_CRITERIA = frozenset(
    {
        stopping_criteria.MaxLengthCriteria,
        stopping_criteria.MaxTimeCriteria,
        stopping_criteria.StopStringCriteria,
        stopping_criteria.EosTokenCriteria,
    }
)


def needs_lockstep(processors: LogitsProcessorList, criteria: StoppingCriteriaList, rows: int) -> list[str]:
    """Why these rows must advance one token at a time, as in plain decoding; empty if they need not.

    Watermarks, guidance and the user's own processors and criteria must see each context exactly once; so must anything
    that is not known to be a pure function.
    """
    unknown = [type(p).__name__ for p in processors if type(p) not in CONTEXT_FREE | _CONTEXTUAL]
    unknown += [type(c).__name__ for c in criteria if type(c) not in _KNOWN_CRITERIA]
    reasons = [f"{name} must see each context once" for name in unknown]
    if rows > 1 and not has_stop_token(criteria):
        reasons += [
            f"without a stop token, rows that met {type(c).__name__} run on until all have"
            for c in criteria
            if type(c) in _KNOWN_CRITERIA - {stopping_criteria.MaxLengthCriteria}
        ]
    return reasons


def has_stop_token(criteria: StoppingCriteriaList) -> bool:
    """Whether Hugging Face pads the rows that ended: without a stop token, it lets them run on until all have ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def ignoring_padding(processors: LogitsProcessorList, pads: Tensor) -> LogitsProcessorList:
    """The same processors, but of those that ignore just each row's padding copies that say so; reads the device."""
    return LogitsProcessorList(_bound(p, pads) if _ignores_just(p, pads) else p for p in processors)


def looking_at(processors: LogitsProcessorList, pads: Tensor) -> LogitsProcessorList:
    """The same processors, but those that ignore padding look it up in `pads`, which outlives a request."""
    return LogitsProcessorList(_bound(p, pads) if _ignores_padding(p) else p for p in processors)


def _ignores_just(processor: logits_process.LogitsProcessor, pads: Tensor) -> bool:
    if type(processor) is not logits_process.RepetitionPenaltyLogitsProcessor:
        return False
    ignored = getattr(processor, "prompt_ignore_length", None)
    return isinstance(ignored, Tensor) and torch.equal(ignored.to(pads.device), pads)


def _ignores_padding(processor: logits_process.LogitsProcessor) -> bool:
    return getattr(processor, "ignores_padding", False)


def _bound(processor: logits_process.LogitsProcessor, pads: Tensor) -> logits_process.LogitsProcessor:
    bound = copy(processor)
    bound.prompt_ignore_length, bound.ignores_padding = pads, True  # type: ignore[attr-defined]
    return bound


def uncaptured_reason(processors: LogitsProcessorList) -> str | None:
    """Why what these processors do cannot be captured in a CUDA graph, or None if it can."""
    for processor in processors:
        if type(processor) not in _CAPTURABLE:
            return f"{type(processor).__name__} is not captured"
        if getattr(processor, "prompt_ignore_length", None) is not None and not _ignores_padding(processor):
            return f"{type(processor).__name__} that ignores other tokens than padding is not captured"
        if any(isinstance(value, Tensor) for name, value in vars(processor).items() if name != "prompt_ignore_length"):
            return f"{type(processor).__name__} with a tensor among its settings is not captured"
    return None


def settings_of(processor: logits_process.LogitsProcessor) -> tuple[object, ...]:
    """A capturable processor's kind and settings, which a graph bakes in."""
    settings = ((name, value) for name, value in vars(processor).items() if name != "prompt_ignore_length")
    return (type(processor), *settings)  # `ignores_padding` tells whether there is one


def _is_order_free(processor: logits_process.LogitsProcessor) -> bool:
    """Whether it asks of the tokens before only which they are: to repeat the last one behind it changes nothing.

    Nor does it where padding is ignored, which the last token never is; it may be among others that are.
    """
    is_penalty = type(processor) is logits_process.RepetitionPenaltyLogitsProcessor
    return is_penalty and (getattr(processor, "prompt_ignore_length", None) is None or _ignores_padding(processor))


def process(processors: LogitsProcessorList, logits: Tensor, sequences: Tensor, ends: Tensor) -> Tensor:
    """Processed float32 scores for logits `b t v`, where row r at step j follows `sequences[r, :ends[r, j]]`."""
    scores = logits.to(torch.float32, copy=True)
    lengths: list[int] | None = None
    for processor in processors:
        if type(processor) in CONTEXT_FREE:
            b = scores.shape[0]
            scores = processor(sequences[:, :0], scores.flatten(0, 1)).unflatten(0, (b, -1))
        elif _is_order_free(processor):
            scores = _process_by_step(processor, scores, sequences, ends)
        else:
            lengths = lengths or ends.unique().tolist()
            scores = _process_by_length(processor, scores, sequences, ends, lengths)
    return scores


def _process_by_step(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor
) -> Tensor:
    """Call an order-free processor once for each step: what is not yet there repeats a row's last token."""
    columns = torch.arange(sequences.shape[1], device=ends.device)
    processed = []
    for step, end in enumerate(ends.split(1, dim=1)):  # b 1
        before = torch.where(columns < end, sequences, sequences.gather(1, end - 1))
        processed.append(processor(before, scores[:, step]))
    return torch.stack(processed, dim=1)


def _process_by_length(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor, lengths: list[int]
) -> Tensor:
    """Call a processor once for each distinct length, with every row in its place; keep the rows of that length."""
    processed = torch.empty_like(scores)
    for length in lengths:
        rows, steps = torch.nonzero(ends == length, as_tuple=True)
        batch = torch.zeros_like(scores[:, 0])
        batch[rows] = scores[rows, steps]
        processed[rows, steps] = processor(sequences[:, :length].contiguous(), batch)[rows]
    return processed
