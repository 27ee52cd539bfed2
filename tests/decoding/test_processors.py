"""Logits processors on rows of unequal length: each row as in plain decoding; and which ones need lock-step."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import prompts
from pairs import llama, speculator
from torch import Tensor
from transformers import generation as hf

from selfspec.decoding import logits_processors as ours
from selfspec.decoding.logits_processors import needs_lockstep, process

V = 7
SEQUENCES = torch.tensor(
    [[0, 0, 3, 1, 3, 1, 2, 3, 0, 0], [4, 5, 4, 6, 5, 4, 4, 5, 6, 4], [0, 2, 2, 2, 6, 6, 2, 2, 1, 1]]
)
ENDS = torch.tensor([[4, 5, 6], [7, 8, 9], [6, 7, 8]])

KNOWN: list[hf.LogitsProcessor] = [
    hf.TemperatureLogitsWarper(0.7),
    hf.TopKLogitsWarper(3),
    hf.TopPLogitsWarper(0.8),
    hf.MinPLogitsWarper(0.2),
    hf.TypicalLogitsWarper(0.6),
    hf.LogitNormalization(),
    hf.SuppressTokensLogitsProcessor([2, 3]),
    hf.RepetitionPenaltyLogitsProcessor(1.7),
    hf.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([3, 1, 0])),
    hf.NoRepeatNGramLogitsProcessor(2),
    hf.EncoderRepetitionPenaltyLogitsProcessor(2.0, SEQUENCES[:, :3]),
    hf.EncoderNoRepeatNGramLogitsProcessor(2, SEQUENCES[:, :3]),
    hf.SequenceBiasLogitsProcessor([[[4, 5], 3.0], [[2], -1.0]]),
    hf.NoBadWordsLogitsProcessor([[3, 1], [6]], eos_token_id=0),
    hf.MinLengthLogitsProcessor(7, 2),
    hf.MinNewTokensLengthLogitsProcessor(3, 4, 2),
    hf.ForcedEOSTokenLogitsProcessor(8, 5),
    hf.ExponentialDecayLengthPenalty((2, 1.5), 2, 3),
    hf.SuppressTokensAtBeginLogitsProcessor([1, 2], 6),
]


def row_by_row(processor: hf.LogitsProcessor, logits: Tensor) -> Tensor:
    """Each row and step by itself, in a batch whose length is the row's length at that step."""
    expected = torch.empty_like(logits)
    for row in range(3):
        for step in range(3):
            scores = processor(SEQUENCES[:, : int(ENDS[row, step])], logits[:, step].clone())
            expected[row, step] = scores[row]
    return expected


@pytest.mark.parametrize("processor", KNOWN, ids=lambda p: type(p).__name__)
def test_each_ragged_row_is_processed_as_in_plain_decoding(processor: hf.LogitsProcessor) -> None:
    logits = torch.randn(3, 3, V)
    before = logits.clone()
    scores = process(hf.LogitsProcessorList([processor]), logits, SEQUENCES, ENDS)
    assert torch.equal(scores, row_by_row(processor, logits))
    assert not torch.equal(scores, logits), "this processor changes nothing here"
    assert torch.equal(logits, before), "raw logits stay raw"


def test_processors_are_applied_in_their_order() -> None:
    chain = hf.LogitsProcessorList(
        [hf.RepetitionPenaltyLogitsProcessor(1.7), hf.TopKLogitsWarper(2), hf.LogitNormalization()]
    )
    logits = torch.randn(3, 3, V)
    expected = logits
    for processor in chain:
        expected = row_by_row(processor, expected)
    assert torch.equal(process(chain, logits, SEQUENCES, ENDS), expected)


def test_scores_of_a_bfloat16_model_are_float32() -> None:
    scores = process(hf.LogitsProcessorList(), torch.ones(3, 3, V, dtype=torch.bfloat16), SEQUENCES, ENDS)
    assert scores.dtype == torch.float32


def test_every_processor_on_the_fast_path_is_compared_above() -> None:
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


class OwnTemperature(hf.TemperatureLogitsWarper):
    """A subclass may do anything."""


class Counts(hf.LogitsProcessor):
    """Records each context it sees, and raises one token's score by a choice that depends on the number of calls."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []
        self.shapes: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.contexts.append(input_ids)
        self.shapes.append((scores.shape, scores.dtype, input_ids.is_contiguous()))
        scores[:, 5 + len(self.contexts) % 7] += 4.0  # in place, as the user is free to do
        return scores


@pytest.mark.parametrize("eos", [None, [170, 22]], ids=["no stop token", "stop tokens"])
def test_the_users_own_processor_sees_each_context_once_in_hugging_faces_order(eos: list[int] | None) -> None:
    tokens, mask = prompts(5, 9, 2)
    options = {"attention_mask": mask, "max_new_tokens": 13, "eos_token_id": eos, "repetition_penalty": 1.2}
    theirs, mine = Counts(), Counts()
    expected = llama().generate(tokens, logits_processor=hf.LogitsProcessorList([theirs]), **options)
    got = speculator().generate(tokens, logits_processor=hf.LogitsProcessorList([mine]), **options)
    assert torch.equal(got, expected)
    assert len(mine.contexts) == len(theirs.contexts)
    assert all(torch.equal(a, b) for a, b in zip(mine.contexts, theirs.contexts, strict=True))
    assert mine.shapes == theirs.shapes
    assert speculator().stats.slower_paths == ["plain lock-step decoding: Counts must see each context once"]
    assert speculator().stats.drafted == 0


def test_only_processors_known_to_be_pure_keep_the_fast_path() -> None:
    limit = hf.StoppingCriteriaList([hf.MaxLengthCriteria(9)])
    assert needs_lockstep(hf.LogitsProcessorList(KNOWN), limit, 3) == []
    assert needs_lockstep(hf.LogitsProcessorList([OwnTemperature(0.5)]), limit, 1) == [
        "OwnTemperature must see each context once"
    ]
    assert needs_lockstep(hf.LogitsProcessorList(), hf.StoppingCriteriaList([lambda ids, scores: False]), 1) == [
        "function must see each context once"
    ]


def test_known_criteria_are_those_that_hugging_face_makes_itself() -> None:
    made = inspect.getsource(type(llama())._get_stopping_criteria)
    assert all(criterion.__name__ in made for criterion in ours._KNOWN_CRITERIA)
    assert hf.StopStringCriteria in ours._KNOWN_CRITERIA
