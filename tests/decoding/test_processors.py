"""Processors on rows that are unequally long: as if each row were decoded plainly, and by the right path."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import prompts
from pairs import llama, speculator
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MinLengthLogitsProcessor, StoppingCriteriaList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from selfspec.decoding import logits_processors as ours
from selfspec.decoding.logits_processors import needs_lockstep, process

V = 7
SEQUENCES = torch.tensor(
    [[0, 0, 3, 1, 3, 1, 2, 3, 0, 0], [4, 5, 4, 6, 5, 4, 4, 5, 6, 4], [0, 2, 2, 2, 6, 6, 2, 2, 1, 1]]
)
ENDS = torch.tensor([[4, 5, 6], [7, 8, 9], [6, 7, 8]])

KNOWN: list[LogitsProcessor] = [
    TemperatureLogitsWarper(0.7),
    TopKLogitsWarper(3),
    TopPLogitsWarper(0.8),
    MinPLogitsWarper(0.2),
    TypicalLogitsWarper(0.6),
    LogitNormalization(),
    SuppressTokensLogitsProcessor([2, 3]),
    RepetitionPenaltyLogitsProcessor(1.7),
    RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([3, 1, 0])),
    NoRepeatNGramLogitsProcessor(2),
    EncoderRepetitionPenaltyLogitsProcessor(2.0, SEQUENCES[:, :3]),
    EncoderNoRepeatNGramLogitsProcessor(2, SEQUENCES[:, :3]),
    SequenceBiasLogitsProcessor([[[4, 5], 3.0], [[2], -1.0]]),
    NoBadWordsLogitsProcessor([[3, 1], [6]], eos_token_id=0),
    MinLengthLogitsProcessor(7, 2),
    MinNewTokensLengthLogitsProcessor(3, 4, 2),
    ForcedEOSTokenLogitsProcessor(8, 5),
    ExponentialDecayLengthPenalty((2, 1.5), 2, 3),
    SuppressTokensAtBeginLogitsProcessor([1, 2], 6),
]


def row_by_row(processor: LogitsProcessor, logits: Tensor) -> Tensor:
    """Each row and step by itself, in a batch as long as it is at that step."""
    expected = torch.empty_like(logits)
    for row in range(3):
        for step in range(3):
            scores = processor(SEQUENCES[:, : int(ENDS[row, step])], logits[:, step].clone())
            expected[row, step] = scores[row]
    return expected


@pytest.mark.parametrize("processor", KNOWN, ids=lambda p: type(p).__name__)
def test_ragged_rows_are_processed_as_if_each_were_decoded_plainly(processor: LogitsProcessor) -> None:
    logits = torch.randn(3, 3, V)
    before = logits.clone()
    scores = process(LogitsProcessorList([processor]), logits, SEQUENCES, ENDS)
    assert torch.equal(scores, row_by_row(processor, logits))
    assert not torch.equal(scores, logits), "this processor changes nothing here"
    assert torch.equal(logits, before), "raw logits stay raw"


def test_processors_are_applied_in_their_order() -> None:
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), TopKLogitsWarper(2), LogitNormalization()])
    logits = torch.randn(3, 3, V)
    expected = logits
    for processor in chain:
        expected = row_by_row(processor, expected)
    assert torch.equal(process(chain, logits, SEQUENCES, ENDS), expected)


def test_scores_are_float32_whatever_the_model_computes_in() -> None:
    scores = process(LogitsProcessorList(), torch.ones(3, 3, V, dtype=torch.bfloat16), SEQUENCES, ENDS)
    assert scores.dtype == torch.float32


def test_every_processor_on_the_fast_path_was_compared_above() -> None:
    compared = {type(processor) for processor in KNOWN}
    fast = ours.CONTEXT_FREE | ours._CONTEXTUAL
    left_out = {name.__name__ for name in fast - compared}
    assert left_out == {
        "TopHLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",  # acts on sequences of one token alone; see test_options.py
    }


# --- Which path ---


class OwnTemperature(TemperatureLogitsWarper):
    """A subclass may do anything."""


class Counts(LogitsProcessor):
    """Records each context that it is shown, as it is handed over, and pushes one token by how often it was asked."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []
        self.shapes: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.contexts.append(input_ids)
        self.shapes.append((scores.shape, scores.dtype, input_ids.is_contiguous()))
        scores[:, 5 + len(self.contexts) % 7] += 4.0  # in place, as the user is free to do
        return scores


@pytest.mark.parametrize("eos", [None, [170, 22]], ids=["no stop token", "stop tokens"])
def test_a_processor_of_the_users_own_sees_each_context_once_and_in_hugging_faces_order(eos: list[int] | None) -> None:
    tokens, mask = prompts(5, 9, 2)
    options = {"attention_mask": mask, "max_new_tokens": 13, "eos_token_id": eos, "repetition_penalty": 1.2}
    theirs, mine = Counts(), Counts()
    expected = llama().generate(tokens, logits_processor=LogitsProcessorList([theirs]), **options)
    got = speculator().generate(tokens, logits_processor=LogitsProcessorList([mine]), **options)
    assert torch.equal(got, expected)
    assert len(mine.contexts) == len(theirs.contexts)
    assert all(torch.equal(a, b) for a, b in zip(mine.contexts, theirs.contexts, strict=True))
    assert mine.shapes == theirs.shapes
    assert speculator().stats.slower_paths == ["plain lock-step decoding: Counts must see each context once"]
    assert speculator().stats.drafted == 0


def test_what_is_known_to_be_pure_keeps_the_fast_path_and_all_else_does_not() -> None:
    limit = StoppingCriteriaList([MaxLengthCriteria(9)])
    assert needs_lockstep(LogitsProcessorList(KNOWN), limit, 3) == []
    assert needs_lockstep(LogitsProcessorList([OwnTemperature(0.5)]), limit, 1) == [
        "OwnTemperature must see each context once"
    ]
    assert needs_lockstep(LogitsProcessorList(), StoppingCriteriaList([lambda ids, scores: False]), 1) == [
        "function must see each context once"
    ]


def test_hugging_faces_known_criteria_are_those_it_can_make_itself() -> None:
    made = inspect.getsource(type(llama())._get_stopping_criteria)
    assert all(criterion.__name__ in made for criterion in ours._KNOWN_CRITERIA)
    assert StopStringCriteria in ours._KNOWN_CRITERIA
