"""Hugging Face's logits processors and stopping criteria, on rows of unequal length.

A processor sees each row as `model.generate` would show the row at that point: padded prompt, committed tokens and the
drafted tokens before the position. The row keeps its index in the batch.
"""

from __future__ import annotations

from copy import copy
from types import ModuleType

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from selfspec.decoding.pure import is_pure


def _classes(module: ModuleType, names: str) -> frozenset[type]:
    return frozenset(getattr(module, name) for name in names.split())


CONTEXT_FREE = _classes(
    logits_process,
    """
    TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper TopHLogitsWarper MinPLogitsWarper TypicalLogitsWarper
    EpsilonLogitsWarper EtaLogitsWarper LogitNormalization InfNanRemoveLogitsProcessor SuppressTokensLogitsProcessor
    """,
)
"""Processors that are functions of the scores alone."""

_CONTEXTUAL = _classes(
    logits_process,
    """
    RepetitionPenaltyLogitsProcessor NoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor
    EncoderNoRepeatNGramLogitsProcessor SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor
    ExponentialDecayLengthPenalty SuppressTokensAtBeginLogitsProcessor
    """,
)
"""Processors that are functions of the preceding tokens and the scores alone."""

_CAPTURABLE = _classes(
    logits_process,
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper RepetitionPenaltyLogitsProcessor",
)
"""Processors that a CUDA graph may hold: they neither read the device nor keep state."""

_KNOWN_CRITERIA = _classes(stopping_criteria, "MaxLengthCriteria MaxTimeCriteria StopStringCriteria EosTokenCriteria")
"""Stopping criteria that need not see each context exactly once."""


def needs_lockstep(processors: LogitsProcessorList, criteria: StoppingCriteriaList, rows: int) -> list[str]:
    """Why rows must advance one token at a time, as in plain decoding; empty if they need not.

    Watermarks, guidance and the user's own processors and criteria must see each context exactly once, unless the user
    declares them `pure`. So must every processor that is not known to be a pure function.
    """
    known = CONTEXT_FREE | _CONTEXTUAL
    unknown = [type(p).__name__ for p in processors if type(p) not in known and not _is_declared(p)]
    unknown += [type(c).__name__ for c in criteria if type(c) not in _KNOWN_CRITERIA and not is_pure(c)]
    reasons = [f"{name} must see each context once" for name in unknown]
    if rows > 1 and not has_stop_token(criteria):
        reasons += [
            f"without a stop token, rows that met {type(c).__name__} run on until all have"
            for c in criteria
            if type(c) in _KNOWN_CRITERIA - {stopping_criteria.MaxLengthCriteria} or is_pure(c)
        ]
    return reasons


def has_stop_token(criteria: StoppingCriteriaList) -> bool:
    """Whether Hugging Face pads rows that ended; without a stop token, these rows run on until all rows have ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def rebind_pads(processors: LogitsProcessorList, pads: Tensor) -> LogitsProcessorList:
    """The same processors; those that ignore exactly each row's padding become copies that read `pads` (`b`).

    Captured work can read `pads`, which keeps its address. Reads the device where a processor ignores prompt tokens.
    """

    def rebound(processor: logits_process.LogitsProcessor) -> logits_process.LogitsProcessor:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if type(processor) is not logits_process.RepetitionPenaltyLogitsProcessor or not isinstance(ignored, Tensor):
            return processor
        if not _ignores_padding(processor) and not torch.equal(ignored.to(pads.device), pads):
            return processor
        processor = copy(processor)
        processor.prompt_ignore_length, processor.ignores_padding = pads, True  # type: ignore[attr-defined]
        return processor

    return LogitsProcessorList(rebound(processor) for processor in processors)


def _ignores_padding(processor: logits_process.LogitsProcessor) -> bool:
    return getattr(processor, "ignores_padding", False)


def uncaptured_reason(processors: LogitsProcessorList) -> str | None:
    """Why a CUDA graph cannot hold these processors; None if it can."""
    for processor in processors:
        if type(processor) not in _CAPTURABLE:
            return f"{type(processor).__name__} is not captured"
        if getattr(processor, "prompt_ignore_length", None) is not None and not _ignores_padding(processor):
            return f"{type(processor).__name__} that ignores other tokens than padding is not captured"
        if any(isinstance(value, Tensor) for name, value in vars(processor).items() if name != "prompt_ignore_length"):
            return f"{type(processor).__name__} with a tensor among its settings is not captured"
    return None


def settings_of(processor: logits_process.LogitsProcessor) -> tuple[object, ...]:
    """A capturable processor's type and settings, which a graph bakes in; `pads` is not baked in."""
    settings = ((name, value) for name, value in vars(processor).items() if name != "prompt_ignore_length")
    return (type(processor), *settings)


def process(processors: LogitsProcessorList, logits: Tensor, sequences: Tensor, ends: Tensor) -> Tensor:
    """Processed float32 scores for logits `b t v`, where row r at step j follows `sequences[r, :ends[r, j]]`."""
    scores = logits.to(torch.float32, copy=True)
    lengths: list[int] | None = None
    for processor in processors:
        if type(processor) in CONTEXT_FREE:
            scores = processor(sequences[:, :0], scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
        elif _is_order_free(processor):
            scores = _process_by_step(processor, scores, sequences, ends)
        elif _is_declared(processor):
            scores = _process_declared(processor, scores, sequences, ends)
        else:
            lengths = lengths or ends.unique().tolist()
            scores = _process_by_length(processor, scores, sequences, ends, lengths)
    return scores


def _is_declared(processor: logits_process.LogitsProcessor) -> bool:
    """Whether the user declared the processor pure, or the function of `prefix_allowed_tokens_fn`."""
    if type(processor) is logits_process.PrefixConstrainedLogitsProcessor:
        return processor._num_beams == 1 and is_pure(processor._prefix_allowed_tokens_fn)
    return is_pure(processor)


def _is_order_free(processor: logits_process.LogitsProcessor) -> bool:
    """Whether the result depends only on the set of preceding tokens, so that the last token may be repeated.

    A repetition penalty that ignores padding qualifies, since the last token is never padding. A penalty that ignores
    other prompt tokens does not.
    """
    is_penalty = type(processor) is logits_process.RepetitionPenaltyLogitsProcessor
    return is_penalty and (getattr(processor, "prompt_ignore_length", None) is None or _ignores_padding(processor))


def _process_by_step(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor
) -> Tensor:
    """Call an order-free processor once for each step; a row's last token fills the columns after its end."""
    columns = torch.arange(sequences.shape[1], device=ends.device)
    processed = []
    for step, end in enumerate(ends.split(1, dim=1)):  # b 1
        before = torch.where(columns < end, sequences, sequences.gather(1, end - 1))
        processed.append(processor(before, scores[:, step]))
    return torch.stack(processed, dim=1)


def _process_by_length(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor, lengths: list[int]
) -> Tensor:
    """Call a processor once for each distinct length, on the whole batch; keep the rows of that length."""
    processed = torch.empty_like(scores)
    for length in lengths:
        rows, steps = torch.nonzero(ends == length, as_tuple=True)
        batch = torch.zeros_like(scores[:, 0])
        batch[rows] = scores[rows, steps]
        processed[rows, steps] = processor(sequences[:, :length].contiguous(), batch)[rows]
    return processed


def _process_declared(
    processor: logits_process.LogitsProcessor, scores: Tensor, sequences: Tensor, ends: Tensor
) -> Tensor:
    """Call a processor that was declared pure with all rows of a step that have the same length.

    A grammar need not know what follows a token that it forbids, so a row is left out after its first forbidden token:
    no later token of the row can be accepted.
    """
    processed, possible = scores.clone(), torch.ones_like(ends[:, 0], dtype=torch.bool)  # b
    for step, end in enumerate(ends.unbind(dim=1)):
        if step:
            drafted = sequences.gather(1, ends[:, step - 1 : step])  # b 1
            possible &= processed[:, step - 1].gather(1, drafted)[:, 0] > -torch.inf
        for length in end[possible].unique().tolist():
            rows = torch.nonzero(possible & (end == length))[:, 0]
            on_rows = _numbered(processor, rows.tolist())
            processed[rows, step] = on_rows(sequences[rows, :length], scores[rows, step])
    return processed


def _numbered(processor: logits_process.LogitsProcessor, rows: list[int]) -> logits_process.LogitsProcessor:
    """A processor for these rows alone: the function of `prefix_allowed_tokens_fn` also takes a row's number."""
    if type(processor) is not logits_process.PrefixConstrainedLogitsProcessor:
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return logits_process.PrefixConstrainedLogitsProcessor(lambda index, tokens: allowed(rows[index], tokens), 1)
