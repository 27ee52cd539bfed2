"""Texts: what the target writes after each prompt. The search decodes batches through this module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.logits_processors import CONTEXT_FREE
from selfspec.decoding.request import Request
from selfspec.decoding.round import decode
from selfspec.decoding.stats import Stats
from selfspec.errors import InputError
from selfspec.runtime.runtime import Runtime
from selfspec_search.replay.sampling_settings import Sampling

ROWS_PER_BATCH = 16
"""Rows: the most prompts that the target continues together."""
_TIMED_TOKENS = 4
"""Tokens: written after the prompts of one batch to learn what texts cost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A prompt and the target's continuation."""

    tokens: Tensor  # t, the prompt and the tokens written after the prompt
    prompt: int  # tokens of the prompt
    allowed: int  # the most tokens that the request allowed to write

    @property
    def written(self) -> int:
        return len(self.tokens) - self.prompt

    def __len__(self) -> int:
        return len(self.tokens)


def check_prompts(model: PreTrainedModel, prompts: Sequence[Tensor], what: str) -> None:
    """Raise `InputError` unless every prompt is a 1-D tensor of at least two token ids of the model's vocabulary."""
    if not prompts:
        raise InputError(f"no {what} prompts were given; give at least one, better 32 or more")
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or len(prompt) < 2 or prompt.is_floating_point():
            raise InputError(
                f"{what} prompt {index} is {prompt.dtype} of shape {tuple(prompt.shape)}; "
                "a 1-D tensor of at least two token ids is expected"
            )
        if int(prompt.max()) >= vocabulary or int(prompt.min()) < 0:
            raise InputError(
                f"{what} prompt {index} holds a token outside the model's vocabulary of 0..{vocabulary - 1}; "
                "use the tokenizer that belongs to the model"
            )


def write_texts(
    runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, Text]]:
    """Let the target continue each prompt, greedily by default. Yields (index of the prompt, text), batch by batch."""
    sampling = sampling or Sampling()
    # Processors that read earlier tokens would also read the padding, so their batches hold prompts of one length.
    alike = any(type(processor) not in CONTEXT_FREE for processor in sampling.processors(runtime.model))
    for batch in _batches([len(prompt) for prompt in prompts], alike=alike):
        written, _ = decode_batch(runtime, NoDrafter(), [prompts[index] for index in batch], new_tokens, sampling)
        for index, tokens in zip(batch, written, strict=True):
            yield index, Text(tokens=tokens, prompt=len(prompts[index]), allowed=new_tokens)


@dataclass(frozen=True, kw_only=True)
class TextSeconds:
    """Seconds that writing all texts takes: the prefill of all prompts, and each further token of all texts."""

    prefill: float
    token: float

    def tokens_within(self, seconds: float) -> int:
        """New tokens of each text that can be written in `seconds`."""
        return int((seconds - self.prefill) / self.token)


def time_texts(runtime: Runtime, prompts: Sequence[Tensor], sampling: Sampling) -> TextSeconds:
    """Measure what writing texts costs, by a few tokens after the prompts of the first batch, the shortest ones."""
    batches = list(_batches([len(prompt) for prompt in prompts], alike=False))
    batch = [prompts[index] for index in batches[0]]
    _, stats = decode_batch(runtime, NoDrafter(), batch, _TIMED_TOKENS, sampling)
    prefill = stats.seconds["prefill"]
    per_token = prefill / (len(batch) * max(map(len, batch)))
    return TextSeconds(
        prefill=per_token * sum(map(len, prompts)),
        token=(stats.seconds["total"] - prefill) / len(stats.history) * len(batches),
    )


def _batches(lengths: Sequence[int], *, alike: bool) -> Iterator[list[int]]:
    """Indices of prompts in batches, sorted by length; if `alike`, all prompts of a batch have one length."""
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = groupby(by_length, key=lambda index: lengths[index] if alike else 0)
    for members in (list(group) for _, group in groups):
        for first in range(0, len(members), ROWS_PER_BATCH):
            yield members[first : first + ROWS_PER_BATCH]


def decode_batch(
    runtime: Runtime, drafter: Drafter, prompts: Sequence[Tensor], new_tokens: int, sampling: Sampling | None = None
) -> tuple[list[Tensor], Stats]:
    """Decode a batch with the rounds of `decoding`, greedily by default.

    Returns the prompt and continuation of each row, 1-D each, and the stats.
    """
    request = request_for(runtime.model, prompts, new_tokens, drafter.gamma, sampling=sampling)
    stats = Stats(rows=request.rows)
    runtime.reserve(request.rows, request.max_length + request.room)
    for _ in decode(runtime, drafter, request, stats):
        pass
    stops = zip(request.sequences, request.pads.tolist(), request.stopped_at, strict=True)
    return [row[pad:stop].clone() for row, pad, stop in stops], stats


def request_for(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    new_tokens: int,
    gamma: int,
    *,
    sampling: Sampling | None = None,
    stops: bool = True,
) -> Request:
    """A request, greedy by default, that ends after `new_tokens` tokens or, if `stops`, at the model's stop tokens."""
    sampling = sampling or Sampling()
    width = max(len(prompt) for prompt in prompts)
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device="cpu")
    # Processors read the padding, as in `generate`. Padding repeats the prompt's first token, so that a penalty on
    # repeated tokens does not change.
    rows = [torch.cat([prompt[:1].expand(width - len(prompt)), prompt]) for prompt in prompts]
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=width + new_tokens)])
    if stops and model.generation_config is not None and model.generation_config.eos_token_id is not None:
        criteria.append(EosTokenCriteria(eos_token_id=model.generation_config.eos_token_id))
    return Request(
        prompts=torch.stack(rows).to(model.device),
        pads=pads.to(model.device),
        max_length=width + new_tokens,
        room=gamma + 1,
        sampling=sampling.do_sample,
        processors=sampling.processors(model),
        criteria=criteria,
        pad_token=0,
    )
