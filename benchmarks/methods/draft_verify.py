"""Draft & Verify (Zhang et al., ACL 2024, arXiv:2309.08168): Bayesian optimisation of the measured decoding speed.

A skip set is one bit per attention and MLP; a Gaussian process models the speed over the bits. The objective is the
time per token of decoding 8 prompts x 32 tokens with *adaptive draft exit*: a draft ends when its confidence falls
below a threshold, and after each round the threshold moves to bring the acceptance rate near a target. Each prompt
begins with the first threshold. The paper runs 1000 trials, hours on a GPU; here the budget ends the trials, and the
two fastest skip sets are offered.

The paper leaves open where to begin and how to propose. Here: two known good skip sets, then random ones, then the most
promising among random skip sets and those one bit away from the best three.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from selfspec_search.space import Sublayer, skip_set_of, sublayers
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from methods.context import JUDGED, Candidate, Context, Selection, Stopwatch
from methods.fixed import evenly
from methods.gaussian_process import Floats, GaussianProcess
from selfspec.decoding.acceptance import Draft
from selfspec.decoding.drafter import Drafter
from selfspec.decoding.request import Request
from selfspec.decoding.round import decode
from selfspec.decoding.stats import Stats
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime

PROMPTS, NEW_TOKENS = 8, 32
LONGEST_DRAFT = 8
FIRST_THRESHOLD, TARGET_RATE, STEP = 0.8, 0.9, 0.01
KEEP_RATE, KEEP_THRESHOLD = 0.5, 0.9
"""Weights of the old acceptance rate and the old threshold in an update, as in the authors' code."""
DRAWN_FIRST = 5
PROPOSALS = 1000
PARENTS = 3


class AdaptiveExit(Drafter):
    """Drafts one row of one text greedily by layer skipping, with adaptive draft exit.

    The first token below the threshold is drafted too, as in the paper, and ends the draft. So every round drafts at
    least one token, and the threshold always learns.
    """

    key = "adaptive exit"
    uncaptured_reason = "the host reads the confidence of every drafted token"

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.gamma, self.threshold = runtime, LONGEST_DRAFT, FIRST_THRESHOLD
        self.rate, self.drafted, self.end = 0.0, 0, 0

    def draft(self, request: Request, n: int) -> Draft:
        end = int(request.ends[0])
        if self.drafted:
            self.learn(self.drafted, end - self.end - 1)
        tokens = self._tokens(request, n)
        self.drafted, self.end = len(tokens), end
        if not tokens:
            return Draft.empty(1, request.sequences.device)
        drafted = torch.stack(tokens, dim=1)
        return Draft(drafted, torch.full_like(request.ends, len(tokens)), None, steps=len(tokens))

    def learn(self, drafted: int, accepted: int) -> None:
        """Move the threshold after a round. A good rate lowers it, unless the length limit ended the draft."""
        self.rate = KEEP_RATE * self.rate + (1 - KEEP_RATE) * accepted / drafted
        if self.rate <= TARGET_RATE:
            self.threshold += (1 - KEEP_THRESHOLD) * STEP
        elif drafted < self.gamma:
            self.threshold -= (1 - KEEP_THRESHOLD) * STEP

    def _tokens(self, request: Request, n: int) -> list[Tensor]:
        lengths, start = self.runtime.cache.lengths, self.runtime.cache.lengths.clone()
        tokens: list[Tensor] = []
        token = request.last_tokens()
        for _ in range(n):
            probs = self.runtime.run("draft", token[:, None])[:, 0].float().softmax(dim=-1)  # 1 v
            confidence, token = probs.max(dim=-1)
            request.sequences.scatter_(1, request.ends[:, None] + len(tokens), token[:, None])
            tokens.append(token)
            lengths += 1
            if float(confidence) < self.threshold:
                break
        lengths.copy_(start)
        return tokens


def draft_verify(context: Context, budget: float, seed: int) -> Selection:
    """The skip sets that decoded the prompts fastest."""
    watch, random = Stopwatch(budget), np.random.default_rng(seed)
    runtime = Runtime(context.model)
    prompts = evenly(context.prompts, PROMPTS)
    runtime.reserve(1, max(map(len, prompts)) + NEW_TOKENS + LONGEST_DRAFT + 2)
    speeds: dict[SkipSet, float] = {}
    while True:
        skip_set = propose(speeds, context.num_layers, random)
        speeds[skip_set] = speed(runtime, skip_set, prompts)
        if not watch.allows_another():
            fastest = sorted(speeds, key=lambda skip_set: -speeds[skip_set])[:JUDGED]
            return Selection(offered=[Candidate(skip_set=skip_set) for skip_set in fastest], tried=len(speeds))


def propose(speeds: dict[SkipSet, float], num_layers: int, random: np.random.Generator) -> SkipSet:
    """The next skip set to try, which is a new one."""
    layers = range(num_layers)
    for start in (SkipSet(attn=layers[1::2], mlp=layers[1::2]), SkipSet(attn=layers[1:-1])):
        if start not in speeds:
            return start
    drawn = [skip_set for skip_set in _random_sets(num_layers, random) if skip_set not in speeds]
    if len(speeds) < 2 + DRAWN_FIRST:
        return drawn[0]
    best = sorted(speeds, key=lambda skip_set: -speeds[skip_set])[:PARENTS]
    near = [flipped(parent, sublayer) for parent in best for sublayer in sublayers(num_layers)]
    choices = [*drawn, *dict.fromkeys(skip_set for skip_set in near if skip_set not in speeds)]
    process = GaussianProcess.fit(_points([*speeds], num_layers), np.array([*speeds.values()]))
    return choices[process.most_promising(_points(choices, num_layers))]


def speed(runtime: Runtime, skip_set: SkipSet, prompts: Sequence[Tensor]) -> float:
    """Tokens per second of decoding the prompts with a draft without `skip_set`."""
    runtime.draft_with(skip_set)
    tokens, start = 0, perf_counter()
    for prompt in prompts:
        tokens += len(decode_row(runtime, AdaptiveExit(runtime), prompt, NEW_TOKENS)[0])
    return tokens / (perf_counter() - start)


def decode_row(runtime: Runtime, drafter: Drafter, prompt: Tensor, new_tokens: int) -> tuple[Tensor, Stats]:
    """`new_tokens` greedy tokens after a prompt, without stop tokens; and the stats."""
    limit = len(prompt) + new_tokens
    request = Request(
        prompts=prompt[None].to(runtime.model.device),
        pads=torch.zeros(1, dtype=torch.long, device=runtime.model.device),
        max_length=limit,
        room=drafter.gamma + 1,
        sampling=False,
        processors=LogitsProcessorList(),
        criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=limit)]),
        pad_token=0,
    )
    stats = Stats(rows=1)
    runtime.reserve(1, limit + request.room)
    for _ in decode(runtime, drafter, request, stats):
        pass
    return request.sequences[0, len(prompt) : limit], stats


def _random_sets(num_layers: int, random: np.random.Generator) -> list[SkipSet]:
    """Random skip sets: the share of skipped sub-layers is drawn first, so every size occurs."""
    steps = sublayers(num_layers)
    rows = random.random((PROPOSALS, len(steps))) < random.random((PROPOSALS, 1))
    return [skip_set_of([steps[index] for index in np.flatnonzero(row)]) for row in rows]


def _points(skip_sets: Sequence[SkipSet], num_layers: int) -> Floats:
    steps = sublayers(num_layers)
    rows = [set(skip_set) for skip_set in skip_sets]
    return np.array([[float(step in row) for step in steps] for row in rows])


def flipped(skip_set: SkipSet, sublayer: Sublayer) -> SkipSet:
    """The skip set with one sub-layer added or removed."""
    return skip_set_of(set(skip_set) ^ {sublayer})
