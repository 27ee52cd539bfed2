"""A replay and the real loop, run side by side."""

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
from transformers import PreTrainedModel

from selfspec.drafters.build import drafter_of
from selfspec.plan import Plan
from selfspec.runtime.runtime import Runtime

NEW_TOKENS = 23
DEPTHS = 5
LENGTHS = (1, 3, 7, 13, 2)
SAMPLING = Sampling(do_sample=True, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)

Rounds = list[list[tuple[float, int]]]


def random_prompts(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def texts_of(
    runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int = NEW_TOKENS, sampling: Sampling | None = None
) -> list[Text]:
    texts = dict(write_texts(runtime, prompts, new_tokens, sampling))
    return [texts[index] for index in range(len(prompts))]


def decoded_rounds(runtime: Runtime, texts: Sequence[Text], way: Drafting, sampling: Sampling | None = None) -> Rounds:
    """What the real loop does on all texts in one ragged batch; checks that it writes the same texts."""
    written, rounds = decode_rounds(runtime, texts, way, sampling)
    assert all(torch.equal(tokens, text.tokens) for tokens, text in zip(written, texts, strict=True))
    return rounds


def decode_rounds(
    runtime: Runtime, texts: Sequence[Text], way: Drafting, sampling: Sampling | None = None
) -> tuple[list[Tensor], Rounds]:
    """What the real loop writes behind the texts' prompts, in one ragged batch, and in which rounds."""
    plan = Plan(skip_set=runtime.draft_spec.skip_set, gamma=way.gamma, prompt_lookup=way.lookup)
    prompts = [text.tokens[: text.prompt] for text in texts]
    written, stats = decode_batch(runtime, drafter_of(plan, runtime), prompts, texts[0].allowed, sampling)
    rounds: Rounds = [[] for _ in texts]
    for step in stats.history:
        for row, drafted, accepted in step:
            rounds[row].append((drafted, accepted))
    return written, rounds


def clear_differences(
    runtime: Runtime, table: Table, texts: Sequence[Text], rounds: Rounds, way: Drafting
) -> Iterator[tuple[int, int]]:
    """(text, start) of each round that the replay does not explain, of `rounds` in which decoding wrote `texts`.

    A round is explained if the replay accepts as many tokens, or if the draft has a near-tie at the first token that
    only one of the two accepts: one of the two then chose the text's token, and the other one did not. A near-tie is
    what `selfspec.benchmark.lossless` calls one for the target, but for the rounding: the gap between the text's token
    and the best other token is at most twice the largest logit difference, anywhere in the text, between passes of 1
    token and of gamma + 1 tokens. At a single place two passes may agree bit for bit by luck, and a third one still
    differ."""
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

    The target caches what stands before the last token of the first `start`, as it has when a round begins there.
    """
    first, last = text.prompt - 1 + start, text.prompt - 1 + end
    runtime.reserve(1, len(text))
    runtime.prefill(text.tokens[None, :first], torch.tensor([first]))
    logits = []
    for chunk in text.tokens[None, first:last].split(t, dim=1):
        logits.append(runtime.run("draft", chunk)[0].float())
        runtime.cache.lengths += chunk.shape[1]
    return torch.cat(logits)


def accepted(rounds: Rounds) -> list[list[int]]:
    return [[count for _, count in row] for row in rounds]


def assert_replay_equals_decoding(
    runtime: Runtime,
    table: Table,
    texts: Sequence[Text],
    ways: list[Drafting],
    sampling: Sampling | None = None,
) -> None:
    walked = rounds_of(table, ways, LookupTable.of(texts, DEPTHS))
    for index, way in enumerate(ways):
        decoded, replayed = decoded_rounds(runtime, texts, way, sampling), walked.history(index)
        assert replayed == decoded, way


def llama_runtime() -> Runtime:
    model: PreTrainedModel = damped_model("llama", ENDS_SKIPPED)
    return Runtime(model, ENDS_SKIPPED)
