"""Prompt lookup and the cascade draft well, and the output is the model's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ENDS_SKIPPED, PAD, prompts
from pairs import assert_same, llama
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from selfspec import Plan, PlanError, SelfSpeculator, wrap
from selfspec.decoding.request import Request
from selfspec.drafters.prompt_lookup import NgramIndex, PromptLookupDrafter, latest_match
from selfspec.plan.lookup import PromptLookup

LOOKUP = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)


def request_of(*rows: list[int], new_tokens: int = 9) -> Request:
    """Rows of unequal length, padded on the left with a token that also occurs in them."""
    width = max(map(len, rows))
    pads = torch.tensor([width - len(row) for row in rows])
    padded = torch.tensor([[3] * (width - len(row)) + row for row in rows])
    return Request(
        prompts=padded,
        pads=pads,
        max_length=width + new_tokens,
        room=LOOKUP.gamma + 1,
        sampling=False,
        processors=LogitsProcessorList(),
        criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=width + new_tokens)]),
        pad_token=3,
    )


def drafted(*rows: list[int], lookup: PromptLookup = LOOKUP, scan: bool = False) -> list[list[int]]:
    request = request_of(*rows)
    request.is_captured = scan  # captured rounds scan the whole row
    drafter = PromptLookupDrafter(lookup)
    drafter.look(request)
    draft = drafter.draft(request, int(request.found.max()))
    written = [
        row[end : end + n].tolist() for row, end, n in zip(request.sequences, request.ends, draft.lengths, strict=True)
    ]
    returned = [row[:n].tolist() for row, n in zip(draft.tokens, draft.lengths, strict=True)]
    assert written == returned, "drafted tokens follow the committed tokens"
    return returned


@pytest.mark.parametrize(
    ("rows", "drafts"),
    [
        ([[5, 6, 7, 8, 9, 1, 2, 7, 4, 4, 4, 4, 5, 6, 7]], [[8, 9, 1, 2]]),
        ([[1, 2, 11, 12, 13, 14, 1, 2, 21, 22, 23, 24, 1, 2]], [[21, 22, 23, 24]]),
        ([[9, 1, 2, 3, 1, 2, 3]], [[1, 2, 3, 1]]),
        ([[7, 7]], [[7, 7, 7, 7]]),
        ([[4, 3, 8, 8, 4, 3], [3], [5, 6, 3]], [[8, 8, 4, 3], [], []]),
    ],
    ids=["longest match", "latest of equal matches", "copy goes on", "one token", "own tokens, no padding"],
)
def test_lookup_drafts_the_tokens_after_a_match(rows: list[list[int]], drafts: list[list[int]]) -> None:
    assert drafted(*rows) == drafts


def test_a_match_shorter_than_min_ngram_drafts_nothing() -> None:
    assert drafted([1, 5, 6, 7, 9, 5], lookup=PromptLookup(gamma=4, min_ngram=2, max_ngram=3)) == [[]]
    request = request_of([1, 2, 4])
    _, length = latest_match(request.sequences, request.pads, request.ends, 3)
    assert length.tolist() == [0]


def naive(tokens: list[int], lookup: PromptLookup) -> list[int]:
    """The definition, token by token."""
    best, place = 0, 0
    for end in range(1, len(tokens)):
        n = 0
        while n < min(lookup.max_ngram, end) and tokens[end - 1 - n] == tokens[-1 - n]:
            n += 1
        if n >= max(best, 1):
            best, place = n, end
    if best < lookup.min_ngram:
        return []
    copied = list(tokens)
    for step in range(lookup.gamma):
        copied.append(copied[place + step])
    return copied[len(tokens) :]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=13), min_size=1, max_size=4),
    least=st.integers(1, 3),
    more=st.integers(0, 3),
)
def test_rows_draft_as_defined_by_index_and_by_scan(rows: list[list[int]], least: int, more: int) -> None:
    lookup = PromptLookup(gamma=4, min_ngram=least, max_ngram=least + more)
    expected = [naive(row, lookup) for row in rows]
    assert drafted(*rows, lookup=lookup, scan=True) == expected
    assert drafted(*rows, lookup=lookup) == expected


@given(text=st.lists(st.integers(3, 5), min_size=2, max_size=23), cuts=st.sets(st.integers(1, 22)))
def test_a_grown_index_finds_the_match_of_a_whole_index_and_of_a_scan(text: list[int], cuts: set[int]) -> None:
    grown, places = NgramIndex(4), sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    for start, end in pairwise(places):
        grown.extend(text[start:end])
        whole = NgramIndex(4)
        whole.extend(text[:end])
        place, length = latest_match(torch.tensor([text]), torch.tensor([0]), torch.tensor([end]), 4)
        assert grown.match == whole.match == ((int(place), int(length)) if length else (0, 0))


def test_each_request_begins_with_an_empty_index() -> None:
    spec = speculator(0)
    for rows in (3, 1, 3):
        tokens, mask = repetitive(rows)
        for moved in (tokens, (tokens + mask) * mask):
            assert_same(moved, attention_mask=mask, max_new_tokens=23, do_sample=False, spec=spec)
            assert spec.stats.accepted


# --- Through the whole runtime ---


def speculator(gamma: int, threshold: float | None = None) -> SelfSpeculator:
    return wrap(llama(), Plan(skip_set=ENDS_SKIPPED, gamma=gamma, exit_threshold=threshold, prompt_lookup=LOOKUP))


def repetitive(rows: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts in which most tokens occur more than once."""
    tokens, mask = prompts(*(11, 17, 5)[:rows], seed=3)
    return torch.where(mask.bool(), tokens % 5 + 1, PAD), mask


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("gamma", [0, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_output_is_the_models_own(rows: int, gamma: int, threshold: float | None) -> None:
    tokens, mask = repetitive(rows)
    stats = assert_same(
        tokens, attention_mask=mask, max_new_tokens=31, do_sample=False, spec=speculator(gamma, threshold)
    )
    assert 0 < stats.accepted < stats.drafted
    if gamma == 0:
        assert stats.seconds["draft"] > 0
        assert any(drafted == 0 for step in stats.history for _, drafted, _ in step), "lookup must fail in some round"


def test_a_cascade_drafts_by_layers_where_lookup_finds_nothing() -> None:
    tokens, mask = repetitive(3)
    options = {"attention_mask": mask, "max_new_tokens": 31, "do_sample": False}
    alone = assert_same(tokens, **options, spec=speculator(0))
    cascade = assert_same(tokens, **options, spec=speculator(3))
    assert cascade.drafted > alone.drafted
    assert not any(drafted == 0 for step in cascade.history[:-3] for row, drafted, _ in step if row == 0)


def test_a_lookup_plan_survives_its_file_and_describes_itself() -> None:
    plan = Plan(skip_set=ENDS_SKIPPED, gamma=0, prompt_lookup=LOOKUP)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.speculates
    assert again.longest_draft == 4
    assert "lookup of 1 to 3 tokens, 4 drafted" in str(again)
    assert str(Plan(skip_set=ENDS_SKIPPED, gamma=2, prompt_lookup=LOOKUP)).count("on a miss") == 1


def test_inconsistent_lookup_settings_are_refused() -> None:
    with pytest.raises(PlanError, match="min_ngram is 5, but it must be at most max_ngram, 3"):
        PromptLookup(gamma=4, min_ngram=5, max_ngram=3)
    with pytest.raises(PlanError, match="gamma"):
        Plan.from_json(
            '{"selfspec_version": 2, "skip_set": {"attn": [], "mlp": []}, "gamma": 0, "prompt_lookup": {"gamma": 0}}'
        )
