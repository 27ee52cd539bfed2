"""Stats, and the request that they count, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import ENDS_SKIPPED, prompts
from pairs import llama, speculator
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from selfspec import Plan, Stats, wrap
from selfspec.decoding.acceptance import Draft, accept
from selfspec.decoding.request import Request
from selfspec.plan.lookup import PromptLookup
from selfspec.runtime.runtime import Runtime

EOS = 9
V = 11
WIDTH = 3


def request(max_length: int, rows: int = 2, eos: bool = True, room: int = 4) -> Request:
    """Two prompts of three tokens, the second padded by one."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)] + ([EosTokenCriteria(EOS)] if eos else []))
    return Request(
        prompts=torch.tensor([[1, 2, 3], [0, 4, 5]])[:rows],
        pads=torch.tensor([0, 1])[:rows],
        max_length=max_length,
        room=room,
        sampling=False,
        processors=LogitsProcessorList(),
        criteria=criteria,
        pad_token=0,
    )


def play(request: Request, stats: Stats, drafts: list[list[int]], best: list[list[int]]) -> None:
    """One round: what each row drafted, and the target's own token at each of its positions."""
    n = max(map(len, drafts))
    tokens = torch.tensor([row + [0] * (n - len(row)) for row in drafts], dtype=torch.long).reshape(len(drafts), n)
    draft = Draft(tokens, torch.tensor([len(row) for row in drafts]), None)
    scores = torch.nn.functional.one_hot(torch.tensor([row + [0] * (n + 1 - len(row)) for row in best]), V).float()
    host_values = request.commit(draft, accept(draft, scores, sampling=False), scores)
    committed = request.receive(host_values.tolist(), scores, scores)
    stats.count_pass(committed)


def test_two_rows_of_three_rounds_counted_by_hand() -> None:
    rows, stats = request(max_length=20), Stats(rows=2)
    play(rows, stats, [[1, 2, 3], [4, 5]], [[1, 2, 7, 8], [4, 5, 6]])  # 2 of 3 accepted and recovered; all 2 and bonus
    play(rows, stats, [[1, 2, 3], [6, EOS, 3]], [[5, 2, 3, 4], [6, EOS, 3, 4]])  # none of 3; stops at its second token
    play(rows, stats, [[EOS, 2], []], [[EOS, 2, 3], [1, 1, 1]])  # stops at once; the finished row does not count
    assert rows.is_done()
    assert rows.ends.tolist() == rows.stopped_at == [8, 8]
    assert rows.result().tolist() == [[1, 2, 3, 1, 2, 7, 5, EOS], [0, 4, 5, 4, 5, 6, 6, EOS]]
    assert (stats.tokens, stats.rounds, stats.passes) == (5 + 5, 5, 3)
    assert (stats.drafted, stats.accepted) == (3 + 2 + 3 + 3 + 2, 2 + 2 + 0 + 2 + 1)
    assert stats.history == [((0, 3, 2), (1, 2, 2)), ((0, 3, 0), (1, 3, 2)), ((0, 2, 1),)]
    assert stats.tokens_per_round == 10 / 5
    assert stats.acceptance_rate == 7 / 13
    # Tokens drafted after a stop token count as neither accepted nor rejected.
    assert stats.reached_at == [5, 3, 1]
    assert stats.accepted_at == [4, 3, 0]
    assert stats.agreement == [4 / 5, 1.0, 0.0]


def test_tokens_beyond_the_limit_do_not_count() -> None:
    rows, stats = request(max_length=5, rows=1), Stats(rows=1)
    play(rows, stats, [[1, 2, 3]], [[1, 2, 3, 4]])
    assert rows.ends.tolist() == rows.stopped_at == [5]
    assert rows.result().tolist() == [[1, 2, 3, 1, 2]]
    assert (stats.tokens, stats.accepted, stats.drafted) == (2, 2, 3)
    assert stats.reached_at == stats.accepted_at == [1, 1, 0]


def test_rows_that_end_at_different_times_are_padded_and_commit_no_more() -> None:
    rows, stats = request(max_length=9), Stats(rows=2)
    play(rows, stats, [[], []], [[EOS], [1]])
    assert rows.finished.tolist() == [True, False]
    assert rows.stopped_at == [4, None]
    for token in (2, EOS):
        play(rows, stats, [[], []], [[7], [token]])
    assert rows.ends.tolist() == [4, 6]
    assert rows.result().tolist() == [[1, 2, 3, EOS, 0, 0], [0, 4, 5, 1, 2, EOS]]
    assert stats.tokens == 1 + 3


@pytest.mark.parametrize(("max_length", "limit"), [(20, 4), (8, 4), (7, 3), (5, 1), (4, 0)])
def test_a_row_drafts_at_most_one_token_less_than_it_may_still_write(max_length: int, limit: int) -> None:
    assert request(max_length).draft_limits(4).tolist() == [limit, limit]
    assert request(max_length).longest_draft(4) == limit


def test_a_finished_row_drafts_nothing() -> None:
    rows = request(max_length=20)
    play(rows, Stats(), [[], []], [[EOS], [1]])
    assert rows.draft_limits(4).tolist() == [0, 4]


def test_kept_scores_are_those_of_committed_tokens_then_zeros() -> None:
    rows = request(max_length=9)
    rows.keep_scores = True
    play(rows, Stats(), [[1, 2], [4, 5]], [[1, EOS, 3], [3, 5, 6]])
    play(rows, Stats(), [[], []], [[8], [EOS]])
    steps = rows.result_steps(rows.scores)
    assert [step.argmax(dim=-1).tolist() for step in steps] == [[1, 3], [EOS, EOS]]
    assert all(step.shape == (2, V) for step in steps)


# --- On a model ---

TOKENS, MASK = prompts(5, 9, 2)


def written(new_tokens: int, eos: int | None = None, gamma: int = 4) -> tuple[Tensor, Stats]:
    spec = speculator(gamma)
    tokens = spec.generate(TOKENS, attention_mask=MASK, max_new_tokens=new_tokens, eos_token_id=eos)
    return tokens[:, TOKENS.shape[1] :], spec.stats


def test_the_tokens_counted_are_the_tokens_returned() -> None:
    tokens, stats = written(23)
    assert stats.tokens == tokens.numel()
    eos = int(tokens[0, 6])
    tokens, stats = written(23, eos)
    assert stats.tokens == sum(row.index(eos) + 1 if eos in row else 23 for row in tokens.tolist())


@pytest.mark.parametrize("new_tokens", range(1, 8))
def test_every_round_drafts_gamma_tokens_or_one_less_than_are_allowed(new_tokens: int) -> None:
    _, stats = written(new_tokens)
    left = [new_tokens] * 3
    for rounds in stats.history:
        for row, drafted, accepted in rounds:
            assert drafted == min(4, left[row] - 1)
            left[row] -= accepted + 1
    assert left == [0, 0, 0]


def test_totals_are_the_sums_of_the_history() -> None:
    _, stats = written(23)
    rounds = [entry for entries in stats.history for entry in entries]
    assert stats.passes == len(stats.history)
    assert stats.rounds == len(rounds)
    assert stats.drafted == sum(drafted for _, drafted, _ in rounds)
    assert stats.accepted == sum(accepted for _, _, accepted in rounds)
    assert stats.tokens == sum(accepted + 1 for _, _, accepted in rounds)
    for position, agreement in enumerate(stats.agreement):
        reached = [accepted for _, drafted, accepted in rounds if drafted > position and accepted >= position]
        assert stats.reached_at[position] == len(reached)
        assert agreement == sum(accepted > position for accepted in reached) / len(reached)


def test_times_add_up_and_stats_go_to_json() -> None:
    _, stats = written(23)
    parts = sum(stats.seconds[name] for name in ("prefill", "draft", "verify"))
    assert 0 < parts < stats.seconds["total"]
    assert stats.other_seconds == pytest.approx(stats.seconds["total"] - parts)
    assert stats.tokens_per_second == stats.tokens / stats.seconds["total"]
    data = json.loads(json.dumps(stats.to_dict()))
    assert data["tokens"] == stats.tokens
    assert data["agreement"] == stats.agreement
    assert "history" not in data
    assert f"{stats.tokens} tokens in {stats.rounds} rounds" in str(stats)


def test_rates_of_an_empty_call_are_zero() -> None:
    stats = Stats()
    assert (stats.tokens_per_round, stats.acceptance_rate, stats.tokens_per_second, stats.agreement) == (0, 0, 0, [])


def test_a_plan_without_speculation_counts_one_token_a_round() -> None:
    tokens, stats = written(11, gamma=0)
    assert (stats.tokens, stats.rounds, stats.passes) == (33, 33, 11)
    assert (stats.drafted, stats.reached_at, stats.acceptance_rate) == (0, [], 0)
    assert tokens.shape == (3, 11)


def test_each_call_has_stats_of_its_own_and_a_closed_stream_counts_its_rounds() -> None:
    spec = wrap(llama(), Plan(skip_set=ENDS_SKIPPED, gamma=4))
    assert spec.stats.tokens == 0
    first = spec.generate(TOKENS, attention_mask=MASK, max_new_tokens=5, return_dict_in_generate=True).stats
    stream = spec.stream(TOKENS[1:2], max_new_tokens=23)
    next(stream)
    stream.close()
    assert first.tokens == 15
    assert spec.stats is not first
    assert (spec.stats.rows, spec.stats.passes) == (1, 1)
    assert spec.stats.tokens == spec.stats.accepted + 1
    assert spec.stats.backend == "sdpa"


@pytest.mark.parametrize("lookup", [None, PromptLookup(gamma=3, min_ngram=1)], ids=["threshold", "cascade"])
def test_the_steps_counted_are_the_passes_of_the_draft(
    lookup: PromptLookup | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask = prompts(11, 5)
    spec = wrap(llama(), Plan(skip_set=ENDS_SKIPPED, gamma=5, exit_threshold=0.02, prompt_lookup=lookup))
    views, run = [], Runtime.run

    def counted(self: Runtime, view: Any, *args: Any) -> Tensor:
        views.append(view)
        return run(self, view, *args)

    monkeypatch.setattr(Runtime, "run", counted)
    spec.generate(tokens, attention_mask=mask, max_new_tokens=41, do_sample=False)
    assert spec.stats.steps == views.count("draft") > 0
    assert spec.stats.passes == views.count("target")
