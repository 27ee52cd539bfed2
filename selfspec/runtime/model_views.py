"""ModelViews: a model's target view and draft view, the draft weights, and what the probe found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from selfspec.models.draft_view import attention_modules, change_draft, draft_view
from selfspec.models.draft_weights import DraftWeights, check_memory, check_vocabulary
from selfspec.models.rope import longrope_switch, pin_longrope
from selfspec.models.support import probe
from selfspec.models.views import state_of, target_view
from selfspec.plan.draft_spec import DraftSpec
from selfspec.runtime.kv_cache import KVCache

ViewName = Literal["target", "draft"]


class ModelViews:
    """Both views of a model, as the model is when they are built.

    Args:
        model: a supported model.
        draft_spec: what the draft is made of.
        draft_weights: shared with other views of the model; by default these views make their own.
        draft_memory: the most bytes that the draft weights may take; None for no limit.

    Attributes:
        layer_shapes: what each attention layer caches, by layer.
        masks: windows, and query heads for each key head, with which layers ask for a mask.
        needs: what the model asks of an attention backend.

    Raises:
        InputError: the draft weights would take more than `draft_memory`.
        PlanError: the draft's vocabulary holds tokens that the model does not have.
        UnsupportedModelError: the probe found a difference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft_spec: DraftSpec,
        draft_weights: DraftWeights | None = None,
        draft_memory: int | None = None,
    ) -> None:
        self.model, self._draft_memory = model, draft_memory
        self._check(draft_spec)
        self.draft_weights = draft_weights or DraftWeights(model)
        self._owns_weights = draft_weights is None
        self._by_name = {"target": target_view(model), "draft": draft_view(model, draft_spec, self.draft_weights)}
        recorded = probe(model, self["target"])
        self.layer_shapes, self.masks, self.needs = recorded.shapes, recorded.masks, recorded.needs(model)
        self._pinned_long: bool | None = None  # the side of the longrope switch that is served
        self._state = state_of(model)

    def __getitem__(self, name: ViewName) -> PreTrainedModel:
        return self._by_name[name]

    def __iter__(self) -> Iterator[PreTrainedModel]:
        return iter(self._by_name.values())

    def are_current(self) -> bool:
        """Whether the views still compute what the model computes: nobody moved, cast or re-adapted it."""
        return state_of(self.model) == self._state

    def change_draft(self, draft_spec: DraftSpec) -> None:
        """Make the draft by another draft spec. A draft spec that is refused changes nothing."""
        draft_spec.validate(self.model.config.num_hidden_layers)
        self._check(draft_spec)
        change_draft(self["draft"], draft_spec, self.draft_weights)
        if self._owns_weights:
            self.draft_weights.keep_only(draft_spec)

    def pin_longrope(self, longest: int) -> bool:
        """Serve the side of the longrope switch on which prompts of up to `longest` tokens are; whether that changed
        anything."""
        switch = longrope_switch(self.model)
        if switch is None or self._pinned_long == (longest > switch):
            return False
        self._pinned_long = longest > switch
        for view in self:
            pin_longrope(view, long=self._pinned_long)
        return True

    def attach(self, cache: KVCache) -> None:
        """Let both views write to a cache."""
        cache.attach(self._attention_modules())

    def detach(self) -> None:
        """Take the cache from both views."""
        for attention in self._attention_modules():
            KVCache.detach(attention)

    def _attention_modules(self) -> Iterator[nn.Module]:
        for view in self:
            yield from attention_modules(view)

    def _check(self, draft_spec: DraftSpec) -> None:
        check_memory(self.model, draft_spec, self._draft_memory)
        check_vocabulary(self.model, draft_spec)
