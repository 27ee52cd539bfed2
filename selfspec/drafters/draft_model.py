"""A draft model: a separate, smaller model of the same vocabulary drafts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decode_options import DecodeOptions
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Committed, Origin, Request
from selfspec.drafters.layer_skip import StepwiseDrafter
from selfspec.errors import InputError, UnsupportedModelError
from selfspec.models.rope import longrope_switch
from selfspec.models.support import check_supported
from selfspec.plan import Plan
from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.prefill import extend, prefill_prompts
from selfspec.runtime.runtime import Runtime

WIDEST = 16
"""Of more tokens that the draft model lacks, all but the last go through without its head."""


class DraftModelDrafter(StepwiseDrafter):
    """Classic speculative decoding: a model of its own, on a cache of its own, drafts (Leviathan et al. 2023).

    Between rounds its cache holds at most all committed tokens but the last one, in every row. After a round in which
    all drafted tokens were accepted it lacks one more, the last drafted one, which was never fed; after rounds that
    somebody else drafted it lacks more. So a draft begins with a catch-up, a pass over the last tokens of every row, as
    many as the row lacks that lacks most, as the host knows. What is cached already is written again, the same as it
    was.

    Beyond the positions that the draft model knows, rows draft nothing.

    Args:
        runtime: the draft model's.
        beside: the target, whose vocabulary may be larger: q is 0 for tokens that the draft model does not know.
    """

    def __init__(
        self, runtime: Runtime, gamma: int, exit_threshold: float | None = None, *, beside: PreTrainedModel
    ) -> None:
        super().__init__(runtime, gamma, exit_threshold)
        self._n, self._width = 0, 1
        self.vocabulary, self.own_vocabulary = vocabulary_size(beside), vocabulary_size(runtime.model)

    @property
    def key(self) -> Hashable:
        return "draft model", self._width  # which the host chose

    @property
    def label(self) -> str:
        return f"draft model {self.gamma}"

    def origin(self, row: int) -> Origin | None:
        return "draft model"

    # --- On the host ---

    def begin(self, request: Request) -> None:
        b, width = request.prompts.shape
        self._pads = request.pads.tolist()
        self._cached = [width - 1] * b  # of each row, padding included
        self._reach = reach(self.runtime.model, width - min(self._pads))
        self.runtime.reserve(b, request.max_length + request.room)
        if self._longest(request):
            prefill_prompts(self.runtime, self._known(request.prompts), request.pads)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        self._n = self._longest(request)
        if not self._n and request.longest_draft(self.gamma):
            return NoDrafter(), 0  # beyond its positions
        self._width = self._to_catch_up(request)
        return self, self._n

    def observe(self, committed: Sequence[Committed]) -> None:
        if not self._n or all(row.origin != "draft model" for row in committed):
            return
        for row in committed:
            # The last drafted token was not fed; where lookup drafted, other tokens were than those committed.
            fed = min(row.accepted, self._n - 1) if row.origin == "draft model" else 0
            self._cached[row.row] = row.start + fed

    def _longest(self, request: Request) -> int:
        """The most tokens worth drafting in any row within the draft model's positions."""
        shortest = min((end - pad for end, pad, _, _ in self._unfinished(request)), default=0)
        return max(0, min(request.longest_draft(self.gamma), self._reach + 1 - shortest))

    def _to_catch_up(self, request: Request) -> int:
        """How many of their last tokens the rows are fed at first."""
        lacking = max((end - cached for end, _, cached, _ in self._unfinished(request)), default=1)
        if not self.runtime.static:
            return lacking
        # Every other length would be compiled, or captured.
        return min(max(2, 1 << (lacking - 1).bit_length()), self.runtime.cache.slots)

    def _unfinished(self, request: Request) -> list[tuple[int, int, int, int | None]]:
        rows = zip(request.known_ends, self._pads, self._cached, request.stopped_at, strict=True)
        return [row for row in rows if row[-1] is None]

    # --- On the device ---

    def _limits(self, request: Request, n: int) -> Tensor:
        texts = request.ends - request.pads  # b
        return torch.minimum(request.draft_limits(n), (self._reach + 1 - texts).clamp(min=0))

    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        logits = self._catch_up(request) if step == 0 else self.runtime.run("target", self._known(token)[:, None])
        missing = self.vocabulary - self.own_vocabulary
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _catch_up(self, request: Request) -> Tensor:
        """Logits `b 1 v` behind each row's last committed token, once all before it are cached."""
        texts, width = request.ends - request.pads, self._width  # b
        if width > WIDEST:
            extend(self.runtime, self._last(request, width)[:, :-1], static=self.runtime.static)
            width = 2 if self.runtime.static else 1
        logits = self.runtime.run("target", self._last(request, width))  # b t v
        at = texts - 1 - self.runtime.cache.lengths  # b
        self.runtime.cache.lengths.copy_(texts - 1)
        return logits.gather(1, at[:, None, None].expand(-1, -1, logits.shape[-1]))

    def _last(self, request: Request, width: int) -> Tensor:
        """Each row's last committed tokens, `b width`, for which the cache's lengths make room; all of a shorter row's,
        and what lies behind them, which nobody sees."""
        starts = (request.ends - request.pads - width).clamp(min=0)  # b
        self.runtime.cache.lengths.copy_(starts)
        columns = (request.pads + starts)[:, None] + torch.arange(width, device=starts.device)
        return self._known(request.sequences.gather(1, columns.clamp(max=request.sequences.shape[1] - 1)))

    def _known(self, tokens: Tensor) -> Tensor:
        """The same tokens, with another in the place of those that the draft model does not know."""
        return tokens.clamp(max=self.own_vocabulary - 1) if self.own_vocabulary < self.vocabulary else tokens


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many logits it has."""
    return int(model.config.get_text_config().vocab_size)


def reach(model: PreTrainedModel, prompt_length: int) -> int:
    """How many tokens of a text with such a prompt the model's positions reach."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    switch = longrope_switch(model)
    if switch is not None and prompt_length <= switch:
        return switch  # where its frequencies would change
    return int(most) if most is not None else torch.iinfo(torch.int32).max


# --- What may draft ---


def draft_runtime(target: Runtime, draft_model: PreTrainedModel, options: DecodeOptions) -> Runtime:
    """A runtime of `draft_model`, which is to draft for the target's model.

    The target's graphs capture the draft model's passes as well, so what changes either model drops them.

    Raises:
        UnsupportedModelError: the draft model's family is not supported.
        InputError: it does not go with the model.
    """
    with _of_the_draft_model():
        check_supported(draft_model)
    check_pair(target.model, draft_model)
    with _of_the_draft_model():
        return Runtime(draft_model, backend=options.backend, compile=options.compile, captured_with=target)


def refresh(runtime: Runtime, target: Runtime) -> None:
    """Build the draft model's views again if it was changed since, and check that it still goes with the target's."""
    with _of_the_draft_model():
        runtime.refresh()
    check_pair(target.model, runtime.model)


def check_pair(model: PreTrainedModel, draft_model: PreTrainedModel) -> None:
    """Raise `InputError` unless `draft_model` can draft for `model`."""
    if draft_model.device != model.device:
        raise InputError(
            f"the draft model is on {draft_model.device}, but the model is on {model.device}; "
            f"move it there: draft_model.to('{model.device}')"
        )
    own, other = vocabulary_size(draft_model), vocabulary_size(model)
    if own > other:
        raise InputError(
            f"the draft model's vocabulary has {own} tokens, but the model's has {other}; "
            "give a draft model of the same tokenizer"
        )


def check_plan(plan: Plan, draft_memory: int | str | None = None) -> None:
    """Raise `InputError` unless a draft model can draft by this plan."""
    advice = "Plan(skip_set=SkipSet(), gamma=4) is a plan for a draft model"
    if plan.draft_spec != DraftSpec():
        raise InputError(
            f"the plan drafts with layers of the model itself ({plan.draft_spec}), so a draft model has nothing to do; "
            f"leave one of them out: {advice}"
        )
    if not plan.gamma:
        raise InputError(f"the plan's gamma is 0, so a draft model would never draft; {advice}")
    if draft_memory is not None:
        raise InputError(
            "draft_memory limits copies of the model's own layers, and a draft model is in memory already; leave it out"
        )


def bytes_beside(model: PreTrainedModel, runtime: Runtime) -> int:
    """What a draft model takes beside the model: weights that they do not share, and its cache."""
    shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = {t.data_ptr(): t.nbytes for t in (*runtime.model.parameters(), *runtime.model.buffers())}
    return sum(nbytes for pointer, nbytes in own.items() if pointer not in shared) + runtime.cache_bytes


@contextmanager
def _of_the_draft_model() -> Iterator[None]:
    """Let what is refused say that it is the draft model."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the draft model cannot be used: {error}") from None
