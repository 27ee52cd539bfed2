"""The draft view: what a draft spec leaves out, and what it runs in copies of its own.

A skipped `self_attn` or `mlp` is replaced by a module that returns zeros (in every supported family a branch is added
to the residual stream, so zeros are a skip), and a layer that loses both is dropped. In a quantised sub-layer each
linear layer is replaced by its copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.models.draft_weights import DraftWeights, linears
from selfspec.models.views import decoder_layers, view_of
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.sublayers import SkipSet


class SkippedAttention(nn.Module):
    """Stands where the draft skips an attention sub-layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Stands where the draft skips an MLP sub-layer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def draft_view(
    model: PreTrainedModel, draft_spec: DraftSpec | SkipSet | None = None, draft_weights: DraftWeights | None = None
) -> PreTrainedModel:
    """`model` as a draft spec makes it, sharing every tensor with `model` but those of `draft_weights`."""
    view = view_of(model)
    change_draft(view, draft_spec, draft_weights)
    return view


@dataclass(frozen=True)
class _Place:
    """Where a linear layer of a sub-layer hangs, and the model's own."""

    name: str
    parent: nn.Module
    child: str
    own: nn.Module


@dataclass(frozen=True)
class _FullStack:
    """What a draft view was before anything was left out, so that its draft spec can change without another copy."""

    layers: tuple[nn.Module, ...]
    branches: tuple[dict[str, nn.Module], ...]
    places: dict[tuple[str, int], tuple[_Place, ...]]
    head: nn.Module
    config: dict[str, Any]


def change_draft(
    view: PreTrainedModel, draft_spec: DraftSpec | SkipSet | None, draft_weights: DraftWeights | None = None
) -> None:
    """Make the draft by `draft_spec`, and nothing else, from now on; what it quantises or trims comes from
    `draft_weights`.

    Costs microseconds where the copies are there: a search calls it per trial. Dropped layers take their entries of
    every per-layer list in the config with them: gemma3 and olmo3 pick RoPE and mask by position in such a list, so an
    unfiltered one would draft with the wrong layer's.
    """
    draft_spec = DraftSpec.of(draft_spec)
    decoder, config = view.get_decoder(), vars(view.config.get_text_config())
    full: _FullStack | None = getattr(view, "selfspec_full_stack", None)
    if full is None:
        full = _full_stack(view)
        object.__setattr__(view, "selfspec_full_stack", full)
    draft_spec.validate(len(full.layers))
    skip_set = draft_spec.skip_set
    for index, (layer, own) in enumerate(zip(full.layers, full.branches, strict=True)):
        layer.self_attn = SkippedAttention() if index in skip_set.attn else own["attn"]
        layer.mlp = SkippedMLP() if index in skip_set.mlp else own["mlp"]
    _place_draft_weights(view, full, draft_spec, draft_weights)
    kept = [index for index in range(len(full.layers)) if index not in skip_set.dropped_layers()]
    decoder.layers = nn.ModuleList(full.layers[index] for index in kept)
    # Through vars(): a config that validates itself would refuse the states between these assignments.
    config["num_hidden_layers"] = len(kept)
    config.update({name: type(value)(value[index] for index in kept) for name, value in full.config.items()})


def _full_stack(view: PreTrainedModel) -> _FullStack:
    layers, config = tuple(decoder_layers(view)), vars(view.config.get_text_config())
    branches = tuple({"attn": layer.get_submodule("self_attn"), "mlp": layer.get_submodule("mlp")} for layer in layers)
    places = {
        (kind, index): tuple(
            _Place(name, branch.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], part)
            for name, part in linears(branch)
        )
        for index, pair in enumerate(branches)
        for kind, branch in pair.items()
    }
    lists = {k: v for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == len(layers)}
    return _FullStack(layers, branches, places, view.lm_head, lists)  # type: ignore[arg-type]


def _place_draft_weights(
    view: PreTrainedModel, full: _FullStack, draft_spec: DraftSpec, draft_weights: DraftWeights | None
) -> None:
    for (kind, layer), places in full.places.items():
        quantise = draft_spec.quantised is not None and draft_spec.choice(kind, layer) == "quantise"
        for place in places:
            copy = None
            if quantise:
                assert draft_weights is not None, "a draft spec that quantises needs copies"
                assert draft_spec.format is not None
                copy = draft_weights.linear(kind, layer, place.name, draft_spec.format)
            setattr(place.parent, place.child, copy or place.own)
    view.lm_head = full.head
    if draft_spec.head_is_own:
        assert draft_weights is not None, "a draft spec with a head of its own needs copies"
        format = draft_spec.format if draft_spec.quantised is not None and draft_spec.quantised.head else None
        head = draft_weights.head(format, draft_spec.vocabulary)
        view.lm_head = full.head if head is draft_weights.model.lm_head else head


def attention_modules(view: PreTrainedModel) -> list[nn.Module]:
    """The attention modules that the view still runs; each one's `layer_idx` is its layer in the full model."""
    modules = [layer.get_submodule("self_attn") for layer in decoder_layers(view)]
    return [module for module in modules if not isinstance(module, SkippedAttention)]
