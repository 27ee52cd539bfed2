"""Replay computes, without decoding, exactly what decoding does in every round."""

from __future__ import annotations

from statistics import fmean

import pytest
import selfspec_search.replay.recording
import selfspec_search.replay.replay
import torch
from models import ENDS_SKIPPED, FIRST_DROPPED, VOCABULARY, damped_model, distinct_trigrams
from replays import (
    DEPTHS,
    LENGTHS,
    NEW_TOKENS,
    assert_replay_equals_decoding,
    llama_runtime,
    random_prompts,
    texts_of,
)
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting, rounds_of

from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime


@pytest.mark.rounding
@pytest.mark.parametrize("skip_set", [ENDS_SKIPPED, FIRST_DROPPED], ids=["ends skipped", "first dropped"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo3", "gemma2"])
def test_replay_accepts_what_decoding_accepts_in_every_round(family: str, skip_set: SkipSet) -> None:
    runtime = Runtime(damped_model(family, skip_set), skip_set)
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(skip_set)
    assert table is not None
    assert 0.3 < table.agreement < 0.95
    assert fmean(distinct_trigrams(text.tokens.tolist()) for text in texts) > 0.7, "the texts loop"
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in (1, 2, 5)])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_that_hide_a_rounds_own_tokens_hide_them_in_replay(family: str, window: int) -> None:
    runtime = Runtime(damped_model(family, ENDS_SKIPPED, sliding_window=window), ENDS_SKIPPED)
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    assert table is not None
    assert 0.2 < table.agreement < 0.98
    assert (table.weight[..., window:] > 0).any(), "no round gets as deep as the window"
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in (2, 5)])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_every_draft_length_accepts_what_decoding_accepts_in_every_round(family: str) -> None:
    runtime = Runtime(damped_model(family, ENDS_SKIPPED), ENDS_SKIPPED)
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    assert table is not None
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in range(1, DEPTHS + 1)])


def test_one_replay_serves_random_skip_sets_one_after_another() -> None:
    runtime = llama_runtime()
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    replay = Replay(runtime.model, texts, DEPTHS)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        attn, mlp = (torch.rand(2, 7, generator=generator) < 0.3).tolist()
        skip_set = SkipSet(attn=[i for i in range(7) if attn[i]], mlp=[i for i in range(7) if mlp[i]])
        runtime.draft_with(skip_set)
        table = replay.run(skip_set)
        assert table is not None
        assert_replay_equals_decoding(runtime, table, texts, [Drafting(3)])


def test_the_empty_skip_set_agrees_everywhere() -> None:
    runtime = llama_runtime()
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    table = Replay(runtime.model, texts, DEPTHS).run(SkipSet())
    assert table is not None
    assert table.agreement == 1.0
    replayed = rounds_of(table, [Drafting(DEPTHS)])
    assert replayed.visits.sum() == len(texts) * -(-NEW_TOKENS // (DEPTHS + 1))


def test_rounds_end_at_a_stop_token_as_in_decoding() -> None:
    runtime = llama_runtime()
    free = texts_of(runtime, random_prompts(*LENGTHS))
    # A token that some texts meet midway, and that drafts guess right at times.
    stop = max(range(VOCABULARY), key=lambda token: sum(token in text.tokens[text.prompt + 4 :] for text in free))
    runtime.model.generation_config.eos_token_id = stop
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    assert any(text.written < NEW_TOKENS for text in texts)
    assert any(text.written == NEW_TOKENS for text in texts)
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    assert table is not None
    assert_replay_equals_decoding(runtime, table, texts, [Drafting(gamma) for gamma in range(1, DEPTHS + 1)])


def test_batches_of_texts_do_not_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = llama_runtime()
    texts = texts_of(runtime, random_prompts(*LENGTHS))
    whole = Replay(runtime.model, texts, DEPTHS)
    monkeypatch.setattr(selfspec_search.replay.recording, "TEXTS_TOGETHER", 2)
    split = Replay(runtime.model, texts, DEPTHS)
    assert (len(whole.recordings), len(split.recordings)) == (1, 3)
    one, other = whole.run(ENDS_SKIPPED), split.run(ENDS_SKIPPED)
    assert one is not None
    assert other is not None
    assert (one.weight == other.weight).all()


def test_the_first_depth_alone_can_end_a_trial_or_shorten_it() -> None:
    runtime = llama_runtime()
    replay = Replay(runtime.model, texts_of(runtime, random_prompts(*LENGTHS)), DEPTHS)
    whole = replay.run(ENDS_SKIPPED)
    assert whole is not None
    assert replay.run(ENDS_SKIPPED, lambda first: 0) is None
    shallow = replay.run(ENDS_SKIPPED, lambda first: 2)
    assert shallow is not None
    assert shallow.depths == 2
    assert (shallow.weight == whole.weight[..., :2]).all()


def test_the_first_depth_alone_estimates_the_rounds_well() -> None:
    runtime = llama_runtime()
    replay = Replay(runtime.model, texts_of(runtime, random_prompts(*LENGTHS * 3), 61), DEPTHS)
    whole, first = replay.run(ENDS_SKIPPED), replay.first_depth(ENDS_SKIPPED)
    assert whole is not None
    assert (whole.weight[..., 0] == first.weight[..., 0]).all()
    exact, estimate = (rounds_of(table, [Drafting(4)]).visits.sum() for table in (whole, first))
    assert estimate == pytest.approx(exact, rel=0.1)
