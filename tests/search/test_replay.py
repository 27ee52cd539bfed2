"""Replay computes, without decoding, exactly the rounds of decoding."""

from __future__ import annotations

from statistics import fmean

import pytest
import selfspec_search.replay.recording
import torch
from models import ENDS_SKIPPED, FIRST_DROPPED, VOCABULARY, damped_model, distinct_trigrams
from replays import (
    DEPTHS,
    LENGTHS,
    NEW_TOKENS,
    assert_replay_equals_decoding,
    llama_runtime,
    llama_texts,
    random_prompts,
    texts_of,
)
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, rounds_of

from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime


@pytest.mark.rounding
@pytest.mark.parametrize("skip_set", [ENDS_SKIPPED, FIRST_DROPPED], ids=["ends skipped", "first dropped"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo3", "gemma2", "qwen3"])
def test_replay_accepts_what_decoding_accepts_in_every_round(family: str, skip_set: SkipSet) -> None:
    runtime = Runtime(damped_model(family, skip_set), skip_set)
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(skip_set)
    assert 0.3 < table.agreement < 0.95
    assert fmean(distinct_trigrams(text.tokens.tolist()) for text in texts) > 0.7, "the texts loop"
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in range(1, DEPTHS + 1)])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_shorter_than_the_round_hides_the_same_tokens_in_replay(family: str, window: int) -> None:
    runtime = Runtime(damped_model(family, ENDS_SKIPPED, sliding_window=window), ENDS_SKIPPED)
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    assert 0.2 < table.agreement < 0.98
    assert (table.weight[..., window:] > 0).any(), "no round is longer than the window"
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in (2, 5)])


def test_one_replay_serves_many_skip_sets() -> None:
    runtime, texts = llama_texts()
    replay = Replay(runtime.model, texts, DEPTHS)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        attn, mlp = (torch.rand(2, 7, generator=generator) < 0.3).tolist()
        skip_set = SkipSet(attn=[i for i in range(7) if attn[i]], mlp=[i for i in range(7) if mlp[i]])
        runtime.draft_with(skip_set)
        table = replay.run(skip_set)
        assert_replay_equals_decoding(runtime, table, texts, [Drafting(3)])


def test_a_draft_that_skips_nothing_is_always_accepted() -> None:
    runtime, texts = llama_texts()
    table = Replay(runtime.model, texts, DEPTHS).run(SkipSet())
    assert table.agreement == 1.0
    replayed = rounds_of(table, [Drafting(DEPTHS)])
    assert replayed.visits.sum() == len(texts) * -(-NEW_TOKENS // (DEPTHS + 1))


def test_rounds_end_at_a_stop_token_as_in_decoding() -> None:
    runtime = llama_runtime()
    free = texts_of(runtime, random_prompts(*LENGTHS))
    # A token that occurs in the middle of some texts.
    stop = max(range(VOCABULARY), key=lambda token: sum(token in text.tokens[text.prompt + 4 :] for text in free))
    runtime.model.generation_config.eos_token_id = stop
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    assert any(text.written < NEW_TOKENS for text in texts)
    assert any(text.written == NEW_TOKENS for text in texts)
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in range(1, DEPTHS + 1)])


def test_batches_of_texts_do_not_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, texts = llama_texts()
    whole = Replay(runtime.model, texts, DEPTHS)
    monkeypatch.setattr(selfspec_search.replay.recording, "TEXTS_TOGETHER", 2)
    split = Replay(runtime.model, texts, DEPTHS)
    assert (len(whole.recordings), len(split.recordings)) == (1, 3)
    one, other = whole.run(ENDS_SKIPPED), split.run(ENDS_SKIPPED)
    assert (one.weight == other.weight).all()


def test_how_deep_can_end_a_replay_after_the_first_depth_or_shorten_the_replay() -> None:
    runtime = llama_runtime()
    replay = Replay(runtime.model, texts_of(runtime, random_prompts(*LENGTHS)), DEPTHS)
    assert replay.run(ENDS_SKIPPED, lambda first: 0).depths == 0
    whole, shallow = replay.run(ENDS_SKIPPED), replay.run(ENDS_SKIPPED, lambda first: 2)
    assert shallow.depths == 2
    assert (shallow.weight == whole.weight[..., :2]).all()


def test_the_first_depth_estimates_the_number_of_rounds_within_ten_percent() -> None:
    runtime = llama_runtime()
    replay = Replay(runtime.model, texts_of(runtime, random_prompts(*LENGTHS * 3), 61), DEPTHS)
    whole, first = replay.run(ENDS_SKIPPED), replay.first_depth(ENDS_SKIPPED)
    assert (whole.weight[..., 0] == first.weight[..., 0]).all()
    exact, estimate = (rounds_of(table, [Drafting(4)]).visits.sum() for table in (whole, first))
    assert estimate == pytest.approx(exact, rel=0.1)
