"""Replay: compute in parallel what a draft would have got accepted, from text that the target wrote.

A round starts at some token of the text. A token drafted at depth d matters only if the d tokens before it in the round
were accepted, that is, equal the text's tokens. So depth d is one pass of the draft over *all* starts whose first d
tokens may have been accepted. The token at position t = start + d attends to two groups of keys: the target's recorded
keys for j < start, which the cache holds when the round begins; and the draft's own keys of depths 0..d.

Greedy decoding accepts or rejects a drafted token. When sampling, given that the text's token x followed an accepted
prefix, x was an accepted draft with probability w = min(1, q(x) / p(x)): the probability that x is drafted and accepted
is min(p(x), q(x)), and the probability of x is p(x) (Leviathan et al. 2023, Alg. 1, arXiv:2211.17192).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.models.draft_view import change_draft, draft_view
from selfspec.models.draft_weights import DraftWeights
from selfspec.models.rope import longrope_switch, pin_longrope
from selfspec.models.views import run_view, target_view
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet
from selfspec_search.replay.memory import Memory
from selfspec_search.replay.processing import process_packed
from selfspec_search.replay.recording import Recording, batches, probabilities
from selfspec_search.replay.replay_pass import ReplayPass, Starts, Step
from selfspec_search.replay.sampling_settings import Sampling
from selfspec_search.replay.table import Table
from selfspec_search.replay.texts import Text

Result = TypeVar("Result")

LEAST_CHANCE = 1e-3
"""Probability: a sampled round is replayed deeper while all its tokens were accepted with at least this chance."""


class Replay:
    """Replays drafts of a model on texts that the model wrote. One draft view and one recording serve all draft specs.

    Args:
        model: the model that wrote the texts.
        texts: the texts of `write_texts`, in any order.
        depths: the most tokens that a round may draft (gamma_max).
        sampling: how the texts' tokens were chosen.
        memory: bytes for keys, values and draft passes, in addition to the model; None for `Memory.default`. The
            passes that record the texts and the draft weights are not counted.
        draft_weights: made for passes over many tokens; by default created when a draft spec first needs them.

    Raises:
        InputError: the texts lie on both sides of a longrope switch, or `memory` is too small.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Sequence[Text],
        depths: int,
        *,
        sampling: Sampling | None = None,
        memory: int | None = None,
        draft_weights: DraftWeights | None = None,
    ) -> None:
        self.texts, self.depths = texts, depths
        self._only: Sequence[int] = range(len(texts))
        self.sampling = sampling or Sampling()
        self.processors = self.sampling.processors(model)
        self.draft_weights = draft_weights or DraftWeights(model, many_tokens=True)
        self.view = draft_view(model)
        target = target_view(model)
        _pin_longrope(model, texts, (self.view, target), depths)
        budget = Memory(model, depths, memory, sampled=self.sampling.do_sample)
        budget.check(texts)
        self.recordings = [Recording.of(target, [texts[i] for i in batch], batch) for batch in batches(texts)]
        self.tokens = torch.cat([text.tokens.to(model.device) for text in texts])
        begins = [0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()]
        self.chosen = self._chosen(target, budget.most_starts(texts)) if self.sampling.do_sample else None
        starts, most_starts = Starts.of(self.recordings, begins), budget.most_starts(texts)
        self._threads = min(threads_for(model.device), most_starts)
        chunk_size = max(1, min(most_starts // self._threads, -(-len(starts) // self._threads)))
        places = torch.arange(len(starts), device=model.device).split(chunk_size)
        self.chunks = [starts.only(index) for index in places]
        # Steps hold masks. Keeping the steps between trials is free only if one trial holds all of them at once.
        kept = len(self.chunks) <= self._threads
        self._first_steps = [Step.of(self.recordings, chunk, 0) if kept else None for chunk in self.chunks]

    def run(self, draft_spec: DraftSpec | SkipSet, how_deep: Callable[[Table], int] | None = None) -> Table:
        """The acceptance table of a draft spec.

        `how_deep` receives the estimate from depth 0 (`Table.from_first_depth`) and returns the number of depths to
        replay. If `how_deep` returns 0, the table has no depths.
        """
        change_draft(self.view, draft_spec, self.draft_weights)
        table, depths = Table.empty(self.texts, self.depths), self.depths
        begun: list[Starts | None] = [None] * len(self.chunks)
        if how_deep is not None:
            begun = self._each(lambda chunk: self._replay_first_depth(chunk, table))
            depths = min(depths, how_deep(table.only(self._only).from_first_depth()))
        if depths:
            self._each(lambda chunk: self._replay_other_depths(chunk, begun[chunk], depths, table))
        return table.only(self._only).shallow(depths)

    def first_depth(self, draft_spec: DraftSpec | SkipSet) -> Table:
        """The estimate from depth 0 alone."""
        change_draft(self.view, draft_spec, self.draft_weights)
        table = Table.empty(self.texts, self.depths)
        self._each(lambda chunk: self._replay_first_depth(chunk, table))
        return table.only(self._only).from_first_depth()

    def _each(self, do: Callable[[int], Result]) -> list[Result]:
        """Call `do` with the index of every chunk, on all threads."""
        chunks = range(len(self.chunks))
        if self._threads == 1:
            return [do(chunk) for chunk in chunks]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(do, chunks))

    def _replay_first_depth(self, chunk: int, table: Table, *, keep: bool = False) -> Starts | None:
        """Replay depth 0. Return the starts still alive, or None if memory cannot hold the starts of all chunks."""
        alive = self._advance(replace(self.chunks[chunk], own={}), 0, table, self._first_steps[chunk])
        return alive if keep or len(self.chunks) <= self._threads else None

    def _replay_other_depths(self, chunk: int, begun: Starts | None, depths: int, table: Table) -> None:
        alive = self._replay_first_depth(chunk, table, keep=True) if begun is None else begun
        assert alive is not None
        for depth in range(1, depths):
            alive = self._advance(alive, depth, table, None)

    def only(self, indices: Sequence[int]) -> Replay:
        """A replay of some of the texts. The new replay shares the recordings; its tables hold only these texts."""
        few, wanted = copy(self), torch.tensor(list(indices), device=self.tokens.device)
        chunks = [chunk.only(torch.isin(chunk.texts, wanted).nonzero()[:, 0]) for chunk in self.chunks]
        few._only = indices
        few.chunks = [chunk for chunk in chunks if len(chunk)]
        few._first_steps = [None] * len(few.chunks)
        return few

    @torch.inference_mode()
    def _advance(self, alive: Starts, depth: int, table: Table, step: Step | None) -> Starts:
        """Draft one token at `depth` for every start alive, enter its weight in the table, and drop failed starts."""
        if len(alive) == 0:
            return alive
        step = step or Step.of(self.recordings, alive, depth)
        places = alive.begins + step.positions
        logits = run_view(
            self.view, self.tokens[places][None], step.positions[None], ReplayPass(step, alive.own, depth)
        )[0].float()  # a v
        weight = self._accepted(logits, alive, places + 1)  # a
        table.note(alive.texts, alive.starts, depth, weight)
        alive.chance = alive.chance * weight
        least = LEAST_CHANCE if self.sampling.do_sample else 0.5
        return alive.only(((alive.chance >= least) & (alive.draftable > depth + 1)).nonzero()[:, 0])

    def _accepted(self, logits: Tensor, alive: Starts, places: Tensor) -> Tensor:
        """The probability `a` that the text's token was an accepted draft, given that decoding wrote that token.

        0 or 1 for greedy decoding.
        """
        tokens = self.tokens[places]
        scores = process_packed(self.processors, logits, self.tokens, alive.begins, places - alive.begins)
        if self.chosen is None:
            return (scores.argmax(dim=-1) == tokens).float()
        q = torch.softmax(scores, dim=-1).gather(1, tokens[:, None])[:, 0]
        # At the edge of top-k or top-p, rounding may set p to 0 for a token that decoding wrote. Then q decides: the
        # token was accepted if the draft could propose that token.
        p = self.chosen[places].clamp(min=torch.finfo(q.dtype).tiny)
        return (q / p).clamp(min=0, max=1)

    def _chosen(self, target: PreTrainedModel, most: int) -> Tensor:
        """p of every token of every text, after logits processors; 1 for the tokens of the prompts."""
        written = [probabilities(target, text, self.processors, most) for text in self.texts]
        prompts = [torch.ones(text.prompt, device=target.device) for text in self.texts]
        return torch.cat([part for text in zip(prompts, written, strict=True) for part in text])


def threads_for(device: torch.device) -> int:
    """Chunks to replay in parallel: one for each core if PyTorch uses one thread, otherwise one.

    PyTorch is limited to one thread when the model is too small for parallel operations. Chunks still run in parallel.
    """
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pin_longrope(
    model: PreTrainedModel, texts: Sequence[Text], views: tuple[PreTrainedModel, ...], depths: int
) -> None:
    switch = longrope_switch(model)
    if switch is None:
        return
    long = {text.prompt > switch for text in texts}
    if len(long) > 1 or any(text.prompt <= switch < text.prompt + text.allowed + depths + 1 for text in texts):
        raise InputError(
            f"this model's longrope switches at {switch} tokens, and the texts lie on both sides; "
            "give prompts whose texts all stay on one side"
        )
    for view in views:
        pin_longrope(view, long=True in long)
