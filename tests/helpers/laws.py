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


def assert_sampled_texts_follow(spec: SelfSpeculator, setting: str) -> set[tuple[int, int]]:
    """Texts sampled from `spec` by `OPTIONS[setting]` follow the distribution of its plain model.

    Returns (drafted, accepted) of the rows' first rounds.
    """
    options: dict[str, Any] = {"top_k": 0, **OPTIONS[setting]}
    counts = torch.zeros(2, V**LENGTH, dtype=torch.long)
    powers = torch.tensor([V**i for i in reversed(range(LENGTH))])
    first_rounds: set[tuple[int, int]] = set()
    for _ in range(CALLS):
        texts = spec.generate(
            PROMPTS,
            attention_mask=MASK,
            do_sample=True,
            max_new_tokens=LENGTH,
            num_return_sequences=ROWS,
            pad_token_id=0,
            **options,
        )[:, PROMPTS.shape[1] :]
        texts = torch.nn.functional.pad(texts, (0, LENGTH - texts.shape[1]))
        for index, rows in enumerate(texts.split(ROWS)):
            counts[index] += torch.bincount((rows * powers).sum(dim=1), minlength=V**LENGTH)
        first_rounds |= {(drafted, accepted) for _, drafted, accepted in spec.stats.history[0]}
    expected = torch.stack([_law(spec.model, PROMPTS[:1, 1:], options), _law(spec.model, PROMPTS[1:], options)])
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(2, dtype=torch.double))
    assert_follows(counts, expected)
    return first_rounds


@torch.no_grad()
def _law(model: PreTrainedModel, prompt: Tensor, options: dict[str, Any]) -> Tensor:
    """The probability of each of the `V ** LENGTH` texts after a prompt, by the plain model, token by token."""
    texts = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)
    tokens = torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
    logits = model(input_ids=tokens).logits.float()
    chosen = {name: value for name, value in options.items() if name not in ("eos_token_id", "logits_processor")}
    config = model.generation_config.from_dict({"do_sample": True, **chosen})
    chain = model._get_logits_processor(config, input_ids_seq_length=prompt.shape[1])
    chain.extend(options.get("logits_processor", ()))
    probability = torch.ones(len(texts), dtype=torch.double)
    stopped = torch.zeros(len(texts), dtype=torch.bool)
    for step in range(LENGTH):
        end = prompt.shape[1] + step
        p = torch.softmax(chain(tokens[:, :end], logits[:, end - 1]), dim=-1).gather(1, tokens[:, end : end + 1])[:, 0]
        # Only padding, token 0, follows a stop token.
        probability *= torch.where(stopped, (tokens[:, end] == 0).double(), p.double())
        stopped |= tokens[:, end] == options.get("eos_token_id", -1)
    return probability
