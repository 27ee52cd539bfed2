"""Replays, and the rounds that decoding takes on the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from models import ENDS_SKIPPED, VOCABULARY, damped_model
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.rounds import Drafting, rounds_of
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text, decode_batch, write_texts
from torch import Tensor

from selfspec.drafters.build import drafter_of
from selfspec.plan.plan import Plan
from selfspec.runtime.prefill import prefill
from selfspec.runtime.runtime import Runtime

NEW_TOKENS = 23
DEPTHS = 5
LENGTHS = (1, 3, 7, 13, 2)
SAMPLING = Sampling(do_sample=True, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)

History = list[list[tuple[float, int]]]


def random_prompts(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def texts_of(
    runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int = NEW_TOKENS, sampling: Sampling | None = None
) -> list[Text]:
    texts = dict(write_texts(runtime, prompts, new_tokens, sampling))
    return [texts[index] for index in range(len(prompts))]


def decoded_rounds(runtime: Runtime, texts: Sequence[Text], way: Drafting, sampling: Sampling | None = None) -> History:
    """Decode all texts in one ragged batch and check that decoding writes the same texts; return the rounds."""
    written, rounds = decode_rounds(runtime, texts, way, sampling)
    assert all(torch.equal(tokens, text.tokens) for tokens, text in zip(written, texts, strict=True))
    return rounds


def decode_rounds(
    runtime: Runtime, texts: Sequence[Text], way: Drafting, sampling: Sampling | None = None
) -> tuple[list[Tensor], History]:
    """Decode after the texts' prompts in one ragged batch; return the tokens and the rounds."""
    plan = Plan(skip_set=runtime.draft_spec.skip_set, gamma=way.gamma, prompt_lookup=way.lookup)
    prompts = [text.tokens[: text.prompt] for text in texts]
    written, stats = decode_batch(runtime, drafter_of(plan, runtime), prompts, texts[0].allowed, sampling)
    rounds: History = [[] for _ in texts]
    for step in stats.history:
        for row, drafted, accepted in step:
            rounds[row].append((drafted, accepted))
    return written, rounds


def clear_differences(
    runtime: Runtime, table: Table, texts: Sequence[Text], rounds: History, way: Drafting
) -> Iterator[tuple[int, int]]:
    """(text, start) of each round of decoding that the replay does not explain.

    The replay explains a round if replay and decoding accept the same number of tokens, or if the draft has a near-tie
    at the first token that only one of them accepts. Near-tie: the gap between the text's token and the best other
    token is at most twice the rounding, as in `selfspec.benchmark.lossless`. The rounding is the largest logit
    difference, anywhere in the text, between passes of 1 token and of gamma + 1 tokens. At a single place, two passes
    may agree by luck.
    """
    expected = rounds_of(table, [way]).accepted[0]
    for index, counts in enumerate(accepted(rounds)):
        starts = list(accumulate((count + 1 for count in counts[:-1]), initial=0))
        pairs = [(start, count, round(expected[index, start])) for start, count in zip(starts, counts, strict=True)]
        differing = [(start, min(pair)) for start, *pair in pairs if pair[0] != pair[1]]
        tie = 2 * _rounding(runtime, texts[index], way.gamma) if differing else 0.0
        yield from ((index, start) for start, depth in differing if _gap(runtime, texts[index], start, depth) > tie)


def _rounding(runtime: Runtime, text: Text, gamma: int) -> float:
    one_by_one, by_rounds = (_draft_logits(runtime, text, 0, text.written, t) for t in (1, gamma + 1))
    return (one_by_one - by_rounds).abs().max().item()


def _gap(runtime: Runtime, text: Text, start: int, depth: int) -> float:
    token = int(text.tokens[text.prompt + start + depth])
    logits = _draft_logits(runtime, text, start, start + depth + 1, 1)[-1]
    others = torch.cat([logits[:token], logits[token + 1 :]])
    return (logits[token] - others.max()).abs().item()


@torch.inference_mode()
def _draft_logits(runtime: Runtime, text: Text, start: int, end: int, t: int) -> Tensor:
    """The draft's float32 logits, `end - start v`, for a text's written tokens, in passes of `t` tokens.

    The cache holds the tokens that it holds when a round begins at `start`.
    """
    first, last = text.prompt - 1 + start, text.prompt - 1 + end
    runtime.reserve(1, len(text))
    prefill(runtime, text.tokens[None, :first], torch.tensor([first]))
    logits = []
    for chunk in text.tokens[None, first:last].split(t, dim=1):
        logits.append(runtime.run("draft", chunk)[0].float())
        runtime.cache.lengths += chunk.shape[1]
    return torch.cat(logits)


def accepted(rounds: History) -> list[list[int]]:
    return [[count for _, count in row] for row in rounds]


def assert_replay_equals_decoding(
    runtime: Runtime, table: Table, texts: Sequence[Text], ways: list[Drafting], sampling: Sampling | None = None
) -> None:
    replayed = rounds_of(table, ways, LookupTable.of(texts, DEPTHS))
    for index, way in enumerate(ways):
        assert replayed.history(index) == decoded_rounds(runtime, texts, way, sampling), way


def llama_runtime() -> Runtime:
    return Runtime(damped_model("llama", ENDS_SKIPPED), ENDS_SKIPPED)


def llama_texts(sampling: Sampling | None = None) -> tuple[Runtime, list[Text]]:
    """A tiny Llama, and its texts after prompts of `LENGTHS` tokens."""
    runtime = llama_runtime()
    return runtime, texts_of(runtime, random_prompts(*LENGTHS), sampling=sampling)
