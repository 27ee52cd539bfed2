"""Replay: what a draft would have got accepted, computed in parallel from text that the target wrote.

A round starts at some token of the text, and a token drafted at depth d only matters if the d tokens before it in the
round were accepted, that is, equal to the text's own. So depth d is one pass of the draft over *all* starts whose first
d tokens may have been: the token at position t = start + d attends to the target's recorded keys for j < start, which
is what the cache holds when the round begins, and to the draft's own keys of depths 0..d, which it wrote since.

Greedy decoding accepts a drafted token or it does not. When sampling, given that the text's token x came out behind an
accepted prefix, it was an accepted draft with probability w = min(1, q(x) / p(x)), for the chance that a draft of x is
both made and accepted is min(p(x), q(x)), and that x comes out at all is p(x) (Leviathan et al. 2023, Alg. 1).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
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
"""Sampled drafts are followed while at least this chance is left that all their tokens were accepted."""


class Replay:
    """Replays drafts of one model on texts that it wrote. One draft view and one recording serve every draft spec.

    Args:
        model: the model that wrote the texts.
        texts: as `write_texts` yields them, in any order.
        depths: the most tokens that a round may draft (gamma_max).
        sampling: how the texts' tokens were chosen.
        memory: bytes that keys, values and passes of drafts may take beside the model; None for `Memory.default`. The
            passes that record the texts, one batch of few tokens at a time, come on top while the replay is made, and
            so do quantised copies.
        copies: the draft's own layers, for passes over many tokens; by default they are made as draft specs ask for
            them,
            and kept.

    Raises:
        InputError: texts on both sides of a longrope switch, which no one pass can serve; too little memory.
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
        self._only: Sequence[int] | None = None
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
        everyone = Starts.of(self.recordings, begins)
        self._threads = min(threads_for(model.device), budget.most_starts(texts))
        most = min(budget.most_starts(texts) // self._threads, -(-len(everyone) // self._threads))
        places = torch.arange(len(everyone), device=model.device).split(max(1, most))
        self.chunks = [everyone.only(index) for index in places]
        # Steps hold masks, so they are kept between trials only where all are held at once in a trial anyway.
        kept = len(self.chunks) <= self._threads
        self._first_steps = [Step.of(self.recordings, chunk, 0) if kept else None for chunk in self.chunks]

    def run(self, draft_spec: DraftSpec | SkipSet, how_deep: Callable[[Table], int] | None = None) -> Table | None:
        """The table for a draft by this draft spec.

        `how_deep` sees an estimate from depth 0 alone (`Table.from_first_depth`), says how many depths are worth
        replaying, and may end the trial by 0: then None is returned.
        """
        change_draft(self.view, draft_spec, self.draft_weights)
        table, depths = Table.empty(self.texts, self.depths), self.depths
        begun: list[Starts | None] = [None] * len(self.chunks)
        if how_deep is not None:
            begun = self._each(lambda chunk: self._begin(chunk, table))
            depths = min(depths, how_deep(self._wanted(table).from_first_depth()))
        if depths == 0:
            return None
        self._each(lambda chunk: self._go_on(chunk, begun[chunk], depths, table))
        return self._wanted(table).shallow(depths)

    def _wanted(self, table: Table) -> Table:
        return table if self._only is None else table.only(self._only)

    def _each(self, do: Callable[[int], Result]) -> list[Result]:
        """Do something for every chunk, as many at a time as there are threads."""
        chunks = range(len(self.chunks))
        if self._threads == 1:
            return [do(chunk) for chunk in chunks]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(do, chunks))

    def _begin(self, chunk: int, table: Table, *, keep: bool = False) -> Starts | None:
        """Depth 0; what goes on, unless there are more chunks than can be held at once."""
        alive = self._advance(self.chunks[chunk].afresh(), 0, table, self._first_steps[chunk])
        return alive if keep or len(self.chunks) <= self._threads else None

    def _go_on(self, chunk: int, begun: Starts | None, depths: int, table: Table) -> None:
        alive = self._begin(chunk, table, keep=True) if begun is None else begun
        assert alive is not None
        for depth in range(1, depths):
            alive = self._advance(alive, depth, table, None)

    def first_depth(self, draft_spec: DraftSpec | SkipSet) -> Table:
        """The estimate from depth 0 alone."""
        seen: list[Table] = []

        def stop(first: Table) -> int:
            seen.append(first)
            return 0

        self.run(draft_spec, stop)
        return seen[0]

    def only(self, indices: Sequence[int]) -> Replay:
        """The same replay, over the starts of some of the texts: its tables hold these texts alone."""
        few, wanted = copy(self), torch.tensor(list(indices), device=self.tokens.device)
        chunks = [chunk.only(torch.isin(chunk.texts, wanted).nonzero()[:, 0]) for chunk in self.chunks]
        few._only = list(indices)
        few.chunks = [chunk for chunk in chunks if len(chunk)]
        few._first_steps = [None] * len(few.chunks)
        return few

    @torch.inference_mode()
    def _advance(self, alive: Starts, depth: int, table: Table, step: Step | None) -> Starts:
        """Draft one token at `depth` for every start alive, note it in the table, and return those that go on."""
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
        """The chance that the text's token was an accepted draft, given that it came out: `a`, 0 or 1 if greedy."""
        tokens = self.tokens[places]
        scores = self._processed(logits, alive.begins, places - alive.begins)
        if self.chosen is None:
            return (scores.argmax(dim=-1) == tokens).float()
        q = torch.softmax(scores, dim=-1).gather(1, tokens[:, None])[:, 0]
        # At the edge of top-k or top-p, rounding may leave a token out of p that did come out: p is 0 then, and q
        # decides. A draft that gave the token any chance had it accepted; one that gave it none never drafted it.
        p = self.chosen[places].clamp(min=torch.finfo(q.dtype).tiny)
        return (q / p).clamp(min=0, max=1)

    def _processed(self, logits: Tensor, begins: Tensor, lengths: Tensor) -> Tensor:
        if not self.processors:
            return logits
        return process_packed(self.processors, logits, self.tokens, begins, lengths)

    def _chosen(self, target: PreTrainedModel, most: int) -> Tensor:
        """p of every token of every text, as processed and drawn from; 1 for those of the prompts."""
        parts: list[Tensor] = []
        for text in self.texts:
            parts.append(torch.ones(text.prompt, device=target.device))
            parts.append(probabilities(target, text, self.processors, most))
        return torch.cat(parts)


def threads_for(device: torch.device) -> int:
    """How many chunks to replay at a time: one for each core, where PyTorch itself was told to use one thread.

    Whoever did that had a model too small to share one operation among cores; whole chunks can be shared all the same.
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
            f"this model's longrope switches at {switch} tokens; give prompts that stay, with what is written, "
            "on one side of it"
        )
    for view in views:
        pin_longrope(view, long=True in long)
