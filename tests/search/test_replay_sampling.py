"""Replay of sampled texts, of logits processors, and of prompt lookup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import ENDS_SKIPPED, FIRST_DROPPED, LAYERS, damped_model
from replays import (
    DEPTHS,
    LENGTHS,
    SAMPLING,
    accepted,
    assert_replay_equals_decoding,
    clear_differences,
    decode_rounds,
    llama_runtime,
    random_prompts,
    texts_of,
)
from selfspec_search.replay import replay_pass
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.replay import LEAST_CHANCE, Replay
from selfspec_search.replay.rounds import Drafting, rounds_of
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.texts import Text, decode_batch
from transformers import PreTrainedModel

from selfspec.demo import held_out_prompts
from selfspec.drafters.build import drafter_of
from selfspec.errors import InputError
from selfspec.huggingface.loading import load
from selfspec.huggingface.prompts import load_prompts
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_replay_applies_processors_to_target_and_draft_as_decoding_does(penalty: float) -> None:
    runtime, sampling = llama_runtime(), Sampling(repetition_penalty=penalty)
    prompts = random_prompts(*LENGTHS)
    texts = texts_of(runtime, prompts, sampling=sampling)
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(texts, texts_of(runtime, prompts), strict=True))
    table = Replay(runtime.model, texts, DEPTHS, sampling=sampling).run(ENDS_SKIPPED)
    ways = [Drafting(3), Drafting(5)]
    # One text at a time, as in the search: the penalty would also read padding.
    for index, text in enumerate(texts):
        assert_replay_equals_decoding(runtime, table.only([index]), [text], ways, sampling)


def test_sampled_decoding_takes_the_rounds_that_replay_expects() -> None:
    # Compares the mean rounds of many decodings of one prompt with the expectation over as many texts of the target.
    # The means of independent samples differ by more than 4 standard errors once in 16,000 runs (a false alarm).
    runtime = llama_runtime()
    torch.manual_seed(3)
    prompts = random_prompts(7) * 320
    texts = texts_of(runtime, prompts, 13, SAMPLING)
    table = Replay(runtime.model, texts, 4, sampling=SAMPLING).run(ENDS_SKIPPED)
    way = Drafting(4)
    plan = Plan(skip_set=ENDS_SKIPPED, gamma=way.gamma)
    rounds = torch.zeros(len(prompts))
    for first in range(0, len(prompts), 64):
        _, stats = decode_batch(runtime, drafter_of(plan, runtime), prompts[first : first + 64], 13, SAMPLING)
        for step in stats.history:
            for row, _, _ in step:
                rounds[first + row] += 1
    replayed = rounds_of(table, [way])
    expected = torch.from_numpy(replayed.visits[0].sum(axis=1)).float()
    error = (rounds.var() / len(rounds) + expected.var() / len(expected)).sqrt()
    assert abs(rounds.mean() - expected.mean()) < 4 * error
    assert error < 0.02 * rounds.mean(), "the standard error is too large for a comparison"
    assert 1.1 * rounds.mean() < 13, "too few drafted tokens are accepted"


def test_a_sampled_target_accepts_its_own_draft_always() -> None:
    runtime = llama_runtime()
    texts = texts_of(runtime, random_prompts(*LENGTHS), sampling=SAMPLING)
    table = Replay(runtime.model, texts, DEPTHS, sampling=SAMPLING).run(SkipSet())
    assert table.agreement == pytest.approx(1, abs=1e-4)


@pytest.mark.rounding
def test_a_weight_is_the_chance_that_the_text_was_an_accepted_draft() -> None:
    # Without the last MLP, the draft has the same keys as the target, so one plain pass gives q at every position.
    model, sampling = damped_model("llama", FIRST_DROPPED), Sampling(do_sample=True, temperature=0.8, top_k=30)
    draft = SkipSet(mlp={LAYERS - 1})
    torch.manual_seed(5)
    (text,) = texts_of(Runtime(model, draft), random_prompts(7), 41, sampling)
    table = Replay(model, [text], DEPTHS, sampling=sampling).run(draft)
    p = chances(model, text, sampling)
    skipped = model.model.layers[-1].mlp.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    q = chances(model, text, sampling)
    skipped.remove()
    expected = (q / p).clamp(max=1).numpy()
    assert 0.2 < expected.mean() < 0.98
    for depth in range(DEPTHS):
        drafted = np.arange(len(expected)) + depth < min(text.written, text.allowed - 1)
        known = drafted & (table.reach[0, :, depth] >= LEAST_CHANCE)
        assert known.any()
        for start in np.flatnonzero(known):
            assert table.weight[0, start, depth] == pytest.approx(expected[start + depth], abs=1e-4)


def chances(model: PreTrainedModel, text: Text, sampling: Sampling) -> torch.Tensor:
    """The probability of each written token, from one plain pass."""
    with torch.inference_mode():
        scores = sampling.processors(model)(text.tokens[None, :0], model(text.tokens[None]).logits[0].float())
    return scores.softmax(dim=-1)[torch.arange(text.prompt - 1, len(text) - 1), text.tokens[text.prompt :]]


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.8}], ids=["top_k", "top_p"])
def test_a_token_that_rounding_excludes_from_p_has_weight_0_or_1(cut: dict[str, Any]) -> None:
    # Which tokens rounding excludes depends on the processor, so this test excludes every token.
    runtime, sampling = llama_runtime(), Sampling(do_sample=True, **cut)
    texts = texts_of(runtime, random_prompts(*LENGTHS), 61, sampling)
    replay = Replay(runtime.model, texts, DEPTHS, sampling=sampling)
    replay.chosen.zero_()
    table = replay.run(ENDS_SKIPPED)
    assert set(np.unique(table.weight)) == {0, 1}, "accepted if the draft can propose the token, else rejected"


@pytest.mark.rounding
@pytest.mark.parametrize("fused", [True, False], ids=["fused attention", "plain attention"])
def test_in_bfloat16_rounds_differ_from_decoding_by_near_ties_of_the_draft_alone(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    # Replay and decoding round differently, so they may resolve a near-tie of the draft differently. Decoding writes
    # the texts: so near-ties of the target change the text for both, and every round can be compared.
    if not fused:  # as on other devices
        monkeypatch.setattr(replay_pass, "_FLASH", None)
    loaded = load("demo", device="cpu", dtype="bfloat16")
    prompts = load_prompts(held_out_prompts(), loaded.tokenizer, context=loaded.context, new_tokens=61)[:6]
    attn, mlp = [3, 5, 7, 9, *range(11, 16)], [6, 8, 10, *range(12, 16)]
    draft, another = SkipSet(attn=attn, mlp=mlp), SkipSet(attn=[*attn, 6], mlp=[*mlp, 9, 11])
    runtime, way = Runtime(loaded.model, draft), Drafting(4)
    begun = [Text(tokens=prompt, prompt=len(prompt), allowed=61) for prompt in prompts]
    written, rounds = decode_rounds(runtime, begun, way)
    texts = [replace(text, tokens=tokens) for text, tokens in zip(begun, written, strict=True)]
    assert {0, way.gamma} <= {count for row in accepted(rounds) for count in row}, "rounds are too alike"
    replay = Replay(runtime.model, texts, way.gamma)
    table, of_another = replay.run(draft), replay.run(another)
    assert list(clear_differences(runtime, table, texts, rounds, way)) == []
    assert any(clear_differences(runtime, of_another, texts, rounds, way)), (
        "the near-tie rule is too wide: it explains the rounds of another draft"
    )


def test_sampling_that_cannot_be_replayed_is_refused() -> None:
    model = damped_model("llama", ENDS_SKIPPED)
    with pytest.raises(InputError, match="temperature"):
        Sampling(do_sample=True, temperature=-1.0).processors(model)
    model.generation_config.min_length = 9
    model.generation_config.eos_token_id = 1
    with pytest.raises(InputError, match="MinLengthLogitsProcessor, which the search cannot replay"):
        Sampling().processors(model)


# --- Prompt lookup ---


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("least", [1, 2])
def test_lookup_is_replayed_round_by_round(least: int, gamma: int) -> None:
    runtime = llama_runtime()
    prompts = [prompt % 5 + 1 for prompt in random_prompts(17, 1, 29, 11)]
    texts = texts_of(runtime, prompts, 41)
    table = Replay(runtime.model, texts, DEPTHS).run(ENDS_SKIPPED)
    lookup = PromptLookup(gamma=4, min_ngram=least, max_ngram=8)
    way = Drafting(gamma, lookup)
    assert_replay_equals_decoding(runtime, table, texts, [way])
    rounds = [
        drafted for text in rounds_of(table, [way], LookupTable.of(texts, DEPTHS)).history(0) for drafted, _ in text
    ]
    assert {0, 4} <= set(rounds) if gamma == 0 else {3, 4} <= set(rounds)
