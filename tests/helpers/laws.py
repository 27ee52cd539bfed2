"""Sampled text against its exact distribution, by chi-square.

A test of sampled text fixes its seed. With a random seed, each test would raise a false alarm with probability 1e-6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from selfspec import SelfSpeculator, pure

FALSE_ALARM = 1e-6
V = 5
"""Tokens: the vocabulary of models whose texts are all counted."""
LENGTH = 4
"""Tokens of each text."""
EOS = 3
PROMPTS = torch.tensor([[0, 4, 1, 2], [1, 4, 2, 4]])  # the first is padded; the second repeats a token
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
ROWS, CALLS = 499, 2  # of each prompt, and in how many calls


def steer(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A processor of the user's own: the last token decides how sharp p is, and which token is impossible."""
    last = input_ids[:, -1:]
    return (scores * (0.5 + last % 3)).scatter(1, (last + 1) % V, -torch.inf)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "all together": {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
    "stop token": {"eos_token_id": EOS},
    "own processor": {"logits_processor": LogitsProcessorList([pure(steer)])},
}
"""Ways to sample, as options of `generate`."""


def assert_follows(counts: Tensor, probabilities: Tensor) -> None:
    """Each row of counts (`g v`) is drawn from its row of probabilities, and no impossible token was drawn.

    One chi-square test over all rows. Cells that expect fewer than five are pooled within their row.
    """
    assert counts.sum() > 500, "too few draws for a test"
    assert not counts[probabilities == 0].any(), "an impossible token was drawn"
    statistic, freedom = 0.0, 0
    for observed, p in zip(counts.double().numpy(), probabilities.double().numpy(), strict=True):
        expected = p * observed.sum()
        common = expected >= 5
        observed = np.append(observed[common], observed[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        if expected[-1] < 5:  # a rare remainder distorts the statistic
            observed, expected = observed[:-1], expected[:-1]
        if len(expected) > 1:
            statistic += ((observed - expected) ** 2 / expected).sum()
            freedom += len(expected) - 1
    assert freedom > 0, "every row has one likely token: nothing is tested"
    alarm = chi2.sf(statistic, freedom)
    assert alarm > FALSE_ALARM, f"chi-square {statistic:.1f} at {freedom} degrees of freedom: probability {alarm:.1e}"


def assert_sampled_texts_follow(
    spec: SelfSpeculator, options: dict[str, Any], *, length: int = LENGTH
) -> set[tuple[int, int]]:
    """Texts of `length` tokens sampled from `spec` follow the distribution of its plain model.

    Returns (drafted, accepted) of the rows' first rounds.
    """
    options, v = {"top_k": 0, **options}, spec.model.config.vocab_size
    counts = torch.zeros(2, v**length, dtype=torch.long)
    powers = torch.tensor([v**i for i in reversed(range(length))])
    first_rounds: set[tuple[int, int]] = set()
    for _ in range(CALLS):
        texts = spec.generate(
            PROMPTS,
            attention_mask=MASK,
            do_sample=True,
            max_new_tokens=length,
            num_return_sequences=ROWS,
            pad_token_id=0,
            **options,
        )[:, PROMPTS.shape[1] :]
        texts = torch.nn.functional.pad(texts, (0, length - texts.shape[1]))
        for index, rows in enumerate(texts.split(ROWS)):
            counts[index] += torch.bincount((rows * powers).sum(dim=1), minlength=v**length)
        first_rounds |= {(drafted, accepted) for _, drafted, accepted in spec.stats.history[0]}
    expected = torch.stack([_law(spec.model, prompt, options, length) for prompt in (PROMPTS[:1, 1:], PROMPTS[1:])])
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(2, dtype=torch.double))
    assert_follows(counts, expected)
    return first_rounds


@torch.no_grad()
def _law(model: PreTrainedModel, prompt: Tensor, options: dict[str, Any], length: int) -> Tensor:
    """The probability of each of the `v ** length` texts after a prompt, by the plain model, token by token."""
    v, chain, eos = model.config.vocab_size, _chain_of(model, prompt, options), options.get("eos_token_id", -1)
    tokens, place = prompt, torch.zeros(1, dtype=torch.long)  # texts with a probability above 0, and their indices
    probability, stopped = torch.ones(1, dtype=torch.double), torch.zeros(1, dtype=torch.bool)
    padding = torch.nn.functional.one_hot(torch.tensor(0), v).double()  # after a stop token
    for _ in range(length):
        p = torch.softmax(chain(tokens, model(input_ids=tokens).logits[:, -1].float()), dim=-1).double()
        probability = probability[:, None] * torch.where(stopped[:, None], padding, p)
        before, token = probability.nonzero(as_tuple=True)
        probability, place = probability[before, token], place[before] * v + token
        tokens = torch.cat([tokens[before], token[:, None]], dim=1)
        stopped = stopped[before] | (token == eos)
    return torch.zeros(v**length, dtype=torch.double).index_put_((place,), probability)


def _chain_of(model: PreTrainedModel, prompt: Tensor, options: dict[str, Any]) -> LogitsProcessorList:
    """The processors that Hugging Face builds from these options."""
    held: list[LogitsProcessorList] = []

    def hold(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
        held.append(logits_processor)
        return input_ids

    model.generate(prompt, custom_generate=hold, do_sample=True, max_new_tokens=LENGTH, pad_token_id=0, **options)
    return held[0]
