"""A replay and the real loop, run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from models import ENDS_SKIPPED, VOCABULARY, damped_model
from selfspec_search.replay.lookup_table import LookupTable
from selfspec_search.replay.rounds import Drafting, walk
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


def begun(rounds: Rounds, ends: Sequence[int], gamma: int) -> set[tuple[int, int, int]]:
    """Each round that can only lie before its text's end: text, tokens written before it, and how many it accepted."""
    return {
        (text, start, count)
        for text, counts in enumerate(accepted(rounds))
        for start, count in zip(accumulate((n + 1 for n in counts), initial=0), counts, strict=False)
        if start + gamma < ends[text]
    }


def in_common(tokens: Tensor, text: Text) -> int:
    """How many of the text's written tokens `tokens` repeats before it goes another way."""
    length = min(len(tokens), len(text))
    return int((tokens[:length] == text.tokens[:length]).cumprod(0).sum()) - text.prompt


def accepted(rounds: Rounds) -> list[list[int]]:
    return [[count for _, count in row] for row in rounds]


def assert_replay_equals_decoding(
    runtime: Runtime,
    table: Table,
    texts: Sequence[Text],
    ways: list[Drafting],
    sampling: Sampling | None = None,
) -> None:
    walked = walk(table, ways, LookupTable.of(texts, DEPTHS))
    for index, way in enumerate(ways):
        decoded, replayed = decoded_rounds(runtime, texts, way, sampling), walked.rounds(index)
        assert replayed == decoded, way


def bfloat16_runtime() -> Runtime:
    return Runtime(damped_model("llama", ENDS_SKIPPED, dtype=torch.bfloat16), ENDS_SKIPPED)


def llama_runtime() -> Runtime:
    model: PreTrainedModel = damped_model("llama", ENDS_SKIPPED)
    return Runtime(model, ENDS_SKIPPED)
