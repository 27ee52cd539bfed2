"""The user's own processors and criteria, declared pure: drafts go on, and the output is that of `model.generate`."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from models import ENDS_SKIPPED, VOCABULARY, assert_exercised, prompts
from pairs import assert_same, llama, speculator
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from selfspec import InputError, Plan, PromptLookup, SelfSpeculator, pure, wrap
from selfspec.decoding.logits_processors import needs_lockstep, process

TOKENS, MASK = prompts(5, 9, 2)
WIDTH = TOKENS.shape[1]
NEW = 23
PAD_AFTER = 3  # a stop token that no text here holds


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": NEW, "eos_token_id": PAD_AFTER, **options}


def one(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS[1:2], "max_new_tokens": NEW, **options}


# --- Processors ---


@pure
class SameParity(LogitsProcessor):
    """A grammar: after an even token an even one, and a text that breaks the grammar is an error."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, WIDTH:]
        assert (new % 2 == TOKENS[1, -1] % 2).all(), "a context that the grammar forbids"
        scores[:, 1 - int(TOKENS[1, -1] % 2) :: 2] = -torch.inf  # in place, as the user is free to do
        return scores


class Subclass(SameParity):
    """Not declared: a subclass may do anything."""


def shift(input_ids: Tensor, scores: Tensor, by: float = 3.0) -> Tensor:
    """Raises the scores of tokens that depend on the last token."""
    likelier = (input_ids[:, -1:] * 7 + torch.arange(40)) % VOCABULARY
    return scores.scatter_add(1, likelier, torch.full_like(scores[:, :40], by))


class Method:
    def shift(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return shift(input_ids, scores)


PROCESSORS: dict[str, Any] = {
    "class": SameParity(),
    "object": pure(Subclass()),
    "function": pure(partial(shift, by=2.0)),
    "method": pure(Method().shift),
}


def served(*names: str, **options: Any) -> dict[str, Any]:
    return batch(logits_processor=LogitsProcessorList(PROCESSORS[name] for name in names), **options)


@pytest.mark.parametrize("name", PROCESSORS)
def test_declared_processors_keep_drafts_and_the_models_tokens(name: str) -> None:
    spec = speculator(4)
    stats = assert_same(**served(name, repetition_penalty=1.2), spec=spec)
    assert not stats.slower_paths
    ours = spec.generate(**served(name))
    assert_exercised(spec.stats, ours, WIDTH)
    assert not torch.equal(ours, llama().generate(**batch())), "changes nothing"


def lookup_speculator() -> SelfSpeculator:
    lookup = PromptLookup(gamma=5, min_ngram=1, max_ngram=2)
    return wrap(llama(), Plan(skip_set=ENDS_SKIPPED, gamma=3, prompt_lookup=lookup), policy="fixed")


def test_a_grammar_is_not_called_after_a_looked_up_token_that_it_forbids() -> None:
    row = torch.tensor([[8, 8, 7, 8, 8, 7, 8, 8, int(TOKENS[1, -1])]])
    options = {"max_new_tokens": NEW, "logits_processor": LogitsProcessorList([SameParity(), pure(partial(shift))])}
    spec = lookup_speculator()
    stats = assert_same(row, **options, spec=spec)
    drafted, accepted = stats.by_origin["lookup"]
    assert drafted > accepted


def test_a_declared_processor_gets_rows_of_one_length_and_never_one_that_it_forbade() -> None:
    seen: list[list[list[int]]] = []

    @pure
    def bans_4(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0]
        seen.append(input_ids.tolist())
        return scores.index_fill(1, torch.tensor([4]), -torch.inf)

    sequences = torch.tensor([[0, 1, 2, 3, 5, 6], [7, 8, 4, 9, 9, 0], [1, 1, 1, 4, 2, 2]])
    ends = torch.tensor([[2, 3, 4], [2, 3, 4], [3, 4, 5]])
    logits = torch.zeros(3, 3, 5 + 5)
    scores = process(LogitsProcessorList([bans_4]), logits, sequences, ends)
    assert seen == [[[0, 1], [7, 8]], [[1, 1, 1]], [[0, 1, 2]], [[0, 1, 2, 3]]]
    banned = scores[..., 4].isneginf()
    assert banned.tolist() == [[True, True, True], [True, False, False], [True, False, False]]


def test_a_declared_function_of_allowed_tokens_knows_the_row() -> None:
    def allowed(row: int, tokens: Tensor) -> list[int]:
        assert len(tokens) >= WIDTH
        return [(row * 50 + int(tokens[-1]) * 7 + k) % VOCABULARY for k in range(40)]

    assert_same(**batch(prefix_allowed_tokens_fn=allowed))
    assert "PrefixConstrained" in speculator().stats.slower_paths[0]
    stats = assert_same(**batch(prefix_allowed_tokens_fn=pure(allowed)))
    assert stats.drafted > stats.accepted > 0
    assert not stats.slower_paths


def test_several_sequences_of_a_prompt_share_the_row_number_of_allowed_tokens_in_lock_step() -> None:
    rows: set[int] = set()

    @pure
    def allowed(row: int, tokens: Tensor) -> list[int]:
        rows.add(row)
        return [7, 8, 9]

    speculator().generate(**batch(prefix_allowed_tokens_fn=allowed, do_sample=True, num_return_sequences=2))
    assert rows == {0, 1, 2}
    assert speculator().stats.slower_paths


# --- Criteria ---


class Counted:
    """Counts its calls; holds by a function of one row's tokens."""

    def __init__(self, holds: Any) -> None:
        self.holds, self.calls = holds, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.tensor([self.holds(row) for row in input_ids.tolist()])


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """The rows' new tokens."""
    tokens: list[list[int]] = llama().generate(**batch())[:, WIDTH:].tolist()
    return tokens


@pytest.mark.parametrize("index", range(6))
def test_a_declared_criterion_ends_the_row_where_it_first_holds(plain: list[list[int]], index: int) -> None:
    criterion = pure(Counted(lambda row: len(row) > WIDTH and row[-1] == plain[1][index]))
    stats = assert_same(**one(stopping_criteria=StoppingCriteriaList([criterion])), spec=speculator(5))
    assert not stats.slower_paths
    assert criterion.calls == 2 * stats.tokens <= 2 * (index + 1), "as often as by model.generate"


@pytest.mark.parametrize("length", range(1, 9))
def test_a_lasting_criterion_is_asked_once_a_round_and_cuts_at_the_same_token(length: int) -> None:
    lasting = pure(Counted(lambda row: len(row) >= WIDTH + length), lasting=True)
    spec = speculator(5)
    ours = spec.generate(**one(stopping_criteria=StoppingCriteriaList([lasting])))
    assert torch.equal(ours, llama().generate(**one(max_new_tokens=length)))
    before_last = sum(accepted + 1 for ((_, _, accepted),) in spec.stats.history[:-1])
    assert lasting.calls == len(spec.stats.history) + length - before_last, "and for each token of the last round"


def test_lasting_and_momentary_criteria_in_a_batch(plain: list[list[int]]) -> None:
    kinds = [
        pure(Counted(lambda row: row[WIDTH:][:8] == plain[0][:8]), lasting=True),
        pure(Counted(lambda row: row[WIDTH:][3:4] == plain[2][3:4]), lasting=True),
        pure(Counted(lambda row: row[WIDTH:][-2:] == plain[1][4:6])),
    ]
    stats = assert_same(**batch(stopping_criteria=StoppingCriteriaList(kinds)))
    assert not stats.slower_paths
    assert stats.tokens == 8 + 6 + 4


def test_a_batch_without_a_stop_token_runs_on_in_lock_step(plain: list[list[int]]) -> None:
    criterion = pure(Counted(lambda row: row[-1] in (plain[0][2], plain[1][6], plain[2][4])))
    stats = assert_same(**batch(eos_token_id=None, stopping_criteria=StoppingCriteriaList([criterion])))
    assert "run on until all have" in stats.slower_paths[0]


def test_a_cancel_button_ends_the_round_in_which_it_is_pressed() -> None:
    cancelled = threading.Event()
    button = pure(lambda input_ids, scores: cancelled.is_set(), lasting=True)
    stream = speculator(4).stream(**one(max_new_tokens=200, stopping_criteria=StoppingCriteriaList([button])))
    tokens = [next(stream) for _ in range(9)]
    cancelled.set()
    tokens += stream
    assert 9 <= len(tokens) < 9 + 2 * 5
    assert tokens == llama().generate(**one(max_new_tokens=len(tokens)))[0, WIDTH:].tolist()
    assert speculator(4).stats.drafted


# --- The declaration ---


class Holds(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return False


def test_only_what_was_declared_is_pure() -> None:
    nothing, declared = LogitsProcessorList(), Holds()
    assert pure(declared) is declared
    for processor, criterion, known in (
        (SameParity(), declared, True),
        (Subclass(), declared, False),
        (SameParity(), Holds(), False),
        (PROCESSORS["object"], declared, True),
        (shift, declared, False),
        (Method().shift, declared, True),
    ):
        reasons = needs_lockstep(LogitsProcessorList([processor]), StoppingCriteriaList([criterion]), 1)
        assert (reasons == []) == known
    assert needs_lockstep(nothing, StoppingCriteriaList([declared]), 1) == []


def test_what_cannot_carry_a_mark_is_refused() -> None:
    for declared in (len, 7, object()):
        with pytest.raises(InputError, match="cannot be declared pure; wrap it in a function"):
            pure(declared)
