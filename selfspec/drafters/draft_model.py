"""Draft model: a separate, smaller model of the same tokenizer drafts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decode_options import DecodeOptions
from selfspec.decoding.acceptance import Committed, Origin
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Request
from selfspec.drafters.layer_skip import StepwiseDrafter
from selfspec.errors import InputError, UnsupportedModelError
from selfspec.models.rope import longrope_switch
from selfspec.models.support import check_supported, vocabulary_size
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.plan import Plan
from selfspec.runtime.prefill import extend, prefill_prompts
from selfspec.runtime.runtime import Runtime
from selfspec.utils.settings import SettingError

WIDEST_WITH_HEAD = 16
"""Tokens of each row: a wider catch-up pass runs all but the last tokens without the draft model's head."""


class DraftModelDrafter(StepwiseDrafter):
    """Drafts with a model of its own on a KV cache of its own (Leviathan et al. 2023).

    Between rounds the draft model's cache holds at most all committed tokens but the last one, in every row. It lacks
    the last drafted token after a round that accepts all, and more tokens after rounds that another drafter drafted.
    So a draft begins with a catch-up pass: feed each row its last `k` tokens, `k` being the largest backlog in the
    batch. Tokens that are cached already are written again, unchanged.

    Rows draft nothing beyond the positions of the draft model.

    Args:
        runtime: the draft model's runtime.
        target: the target. Its vocabulary may have another size: q is 0 for tokens that the draft model does not know,
            and tokens that the target does not have are never drafted.
    """

    def __init__(
        self, runtime: Runtime, gamma: int, exit_threshold: float | None = None, *, target: PreTrainedModel
    ) -> None:
        super().__init__(runtime, gamma, exit_threshold)
        self._n, self._catch_up_width = 0, 1
        self.vocabulary, self.own_vocabulary = (vocabulary_size(model.config) for model in (target, runtime.model))

    @property
    def key(self) -> Hashable:
        return "draft model", self._catch_up_width

    @property
    def label(self) -> str:
        return f"draft model {self.gamma}"

    def origin(self, row: int) -> Origin | None:
        return "draft model"

    # --- On the host ---

    def begin(self, request: Request) -> None:
        b, width = request.prompts.shape
        self._pads = request.pads.tolist()
        self._cached = [width - 1] * b  # tokens of each row, padding included
        self._positions = positions(self.runtime.model, width - min(self._pads))
        self.runtime.reserve(b, request.first_width(static=self.runtime.static))
        if self._longest(request):
            prefill_prompts(self.runtime, self._known(request.prompts), request.pads)

    def choose(self, request: Request) -> tuple[Drafter, int]:
        self._n = self._longest(request)
        if not self._n and request.longest_draft(self.gamma):
            return NoDrafter(), 0
        if request.reach > self.runtime.capacity:
            self.runtime.grow(request.wider())
        backlog = max((request.known_ends[row] - self._cached[row] for row in request.unfinished()), default=1)
        if self.runtime.static:  # few widths: each is compiled or captured
            backlog = min(max(2, 1 << (backlog - 1).bit_length()), self.runtime.cache.slots)
        self._catch_up_width = backlog
        return self, self._n

    def observe(self, committed: Sequence[Committed]) -> None:
        if not self._n or all(row.origin != "draft model" for row in committed):
            return
        for row in committed:
            # The last drafted token was not fed. In rows that lookup drafted, the fed tokens were not committed.
            fed = min(row.accepted, self._n - 1) if row.origin == "draft model" else 0
            self._cached[row.row] = row.start + fed

    def _longest(self, request: Request) -> int:
        """The most tokens worth drafting in any row within the draft model's positions."""
        shortest = min((request.known_ends[row] - self._pads[row] for row in request.unfinished()), default=0)
        return max(0, min(request.longest_draft(self.gamma), self._positions + 1 - shortest))

    # --- On the device ---

    def _limits(self, request: Request, n: int) -> Tensor:
        texts = request.ends - request.pads  # b
        return torch.minimum(request.draft_limits(n), (self._positions + 1 - texts).clamp(min=0))

    def _logits(self, request: Request, token: Tensor, step: int) -> Tensor:
        logits = self._catch_up(request) if step == 0 else self.runtime.run("target", self._known(token)[:, None])
        missing = self.vocabulary - self.own_vocabulary  # where it is negative, `pad` removes the last columns
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _catch_up(self, request: Request) -> Tensor:
        """Cache each row's backlog; logits `b 1 v` after its last committed token."""
        texts, width = request.ends - request.pads, self._catch_up_width  # b
        if width > WIDEST_WITH_HEAD:
            extend(self.runtime, self._last(request, width)[:, :-1], static=self.runtime.static)
            width = 2 if self.runtime.static else 1
        logits = self.runtime.run("target", self._last(request, width))  # b t v
        at = texts - 1 - self.runtime.cache.lengths  # b
        self.runtime.cache.lengths.copy_(texts - 1)
        return logits.gather(1, at[:, None, None].expand(-1, -1, logits.shape[-1]))

    def _last(self, request: Request, width: int) -> Tensor:
        """Each row's last `width` committed tokens, `b width`; sets the cache's lengths to the tokens before them.

        A shorter row gives all its tokens and the columns after its end, which no committed token attends to."""
        starts = (request.ends - request.pads - width).clamp(min=0)  # b
        self.runtime.cache.lengths.copy_(starts)
        columns = (request.pads + starts)[:, None] + torch.arange(width, device=starts.device)
        return self._known(request.sequences.gather(1, columns.clamp(max=request.sequences.shape[1] - 1)))

    def _known(self, tokens: Tensor) -> Tensor:
        """The same tokens; tokens that the draft model does not know become its last token."""
        return tokens.clamp(max=self.own_vocabulary - 1) if self.own_vocabulary < self.vocabulary else tokens


def positions(model: PreTrainedModel, prompt_length: int) -> int:
    """The model's positions, in tokens, for a text whose prompt has `prompt_length` tokens."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    switch = longrope_switch(model)
    if switch is not None and prompt_length <= switch:
        return switch  # the rope frequencies change there
    return int(most) if most is not None else torch.iinfo(torch.int32).max


# --- Checks ---


def draft_runtime(target: Runtime, draft_model: PreTrainedModel, options: DecodeOptions) -> Runtime:
    """A runtime of `draft_model`, which drafts for the target's model.

    The target's graphs capture the draft model's passes too, so a change of either model drops the graphs.

    Raises:
        UnsupportedModelError: the draft model's family is not supported.
        InputError: the draft model does not fit the model.
    """
    with _naming_the_draft_model():
        check_supported(draft_model)
        check_pair(target.model, draft_model)
        return Runtime(draft_model, backend=options.backend, compile=options.compile, captured_with=target)


def refresh(runtime: Runtime, target: Runtime) -> None:
    """Rebuild the views of a draft model that was changed, and check that it still fits the target's model."""
    with _naming_the_draft_model():
        runtime.refresh()
    check_pair(target.model, runtime.model)


def check_pair(model: PreTrainedModel, draft_model: PreTrainedModel) -> None:
    """Raise `InputError` unless `draft_model` can draft for `model`."""
    if draft_model.device != model.device:
        raise InputError(
            f"the draft model is on {draft_model.device}, but the model is on {model.device}; "
            f"move it there: draft_model.to('{model.device}')"
        )


def check_plan(
    plan: Plan,
    draft_memory: int | str | None = None,
    advice: str = "Plan(skip_set=SkipSet(), gamma=4) is a plan for a draft model",
) -> None:
    """Raise `InputError` unless a draft model can draft by this plan; `advice` says how to get a plan that fits."""
    if plan.draft_spec != DraftSpec():
        raise InputError(
            f"the plan drafts with the model's own layers ({plan.draft_spec}), and a draft model was given too; "
            f"leave out the draft model or the plan's layers: {advice}"
        )
    if not plan.gamma:
        raise InputError(f"the plan's gamma is 0, so a draft model would never draft; {advice}")
    if draft_memory is not None:
        raise SettingError(
            "draft_memory", "limits the draft weights of the model's own layers, but a draft model drafts; leave it out"
        )


def draft_model_bytes(model: PreTrainedModel, runtime: Runtime) -> int:
    """Bytes of a draft model that `model` does not share: weights and KV cache."""
    shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = {t.data_ptr(): t.nbytes for t in (*runtime.model.parameters(), *runtime.model.buffers())}
    return sum(nbytes for pointer, nbytes in own.items() if pointer not in shared) + runtime.cache_bytes


@contextmanager
def _naming_the_draft_model() -> Iterator[None]:
    """Make an `UnsupportedModelError` say that the draft model is unsupported."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the draft model cannot be used: {error}") from None
