"""DraftWeights: the draft's own layers: quantised linear layers, and heads that are quantised or trimmed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfspec.errors import InputError, PlanError
from selfspec.models.quantised_linear import (
    device_unsupported_reason,
    linear_unsupported_reason,
    quantise,
    quantised_bytes,
)
from selfspec.plan.draft_spec import DraftSpec, Format, SubVocabulary
from selfspec.plan.sublayers import QuantisedSet
from selfspec.utils.sizes import in_words

HEAD = "head"
Key = tuple[Any, ...]


class DraftWeights:
    """Layers that the draft runs in the place of the model's, each made when a draft spec first asks for it.

    They are made of the weights as they are then: a model that is trained on drafts by what it was, until its views
    are built anew.

    Args:
        model: the user's.
        many_tokens: for a replay's passes over very many tokens.
    """

    def __init__(self, model: PreTrainedModel, *, many_tokens: bool = False) -> None:
        self.model, self.many_tokens = model, many_tokens
        self._made: dict[Key, nn.Module] = {}

    @property
    def nbytes(self) -> int:
        """What they take beside the model."""
        return sum(buffer.nbytes for module in self._made.values() for buffer in module.buffers())

    def linear(self, kind: str, layer: int, name: str, format: Format) -> nn.Module | None:
        """The quantised copy of a linear layer of a sub-layer, by its name there; None if it cannot have one."""
        original = branch(self.model, kind, layer).get_submodule(name)
        if unsupported_reason(original, format, self.model.device) is not None:
            return None
        return self._get((kind, layer, name, format), original, format)

    def head(self, format: Format | None, vocabulary: SubVocabulary | None) -> nn.Module:
        """A head for these tokens, all by default, quantised or not; the model's own where that is the same."""
        own: nn.Module = self.model.lm_head  # type: ignore[assignment]
        if vocabulary is None:
            can = format is not None and unsupported_reason(own, format, self.model.device) is None
            return self._get((HEAD, format), own, format) if can and format else own
        key = (HEAD, format, vocabulary)
        if key not in self._made:
            self._made[key] = self._trimmed(own, format, vocabulary)
        return self._made[key]

    def keep_only(self, draft_spec: DraftSpec) -> None:
        """Let go of all that this draft spec has no use for."""
        wanted = set(_keys(self.model, draft_spec))
        self._made = {key: module for key, module in self._made.items() if key in wanted}

    def drop(self, format: Format) -> None:
        """Let go of all copies in a format."""
        self._made = {key: module for key, module in self._made.items() if format not in key}

    def _get(self, key: Key, original: nn.Module, format: Format) -> nn.Module:
        if key not in self._made:
            weight, bias = original.weight, original.bias
            self._made[key] = quantise(weight, bias, format, many_tokens=self.many_tokens)  # type: ignore[arg-type]
        return self._made[key]

    def _trimmed(self, own: nn.Module, format: Format | None, vocabulary: SubVocabulary) -> nn.Module:
        weight, bias = _weight_and_bias(own)
        tokens = torch.tensor(vocabulary.tokens, device=weight.device)
        some = nn.Linear(weight.shape[1], len(tokens), bias=False, device="meta")
        some.weight = nn.Parameter(weight.detach()[tokens], requires_grad=False)
        head: nn.Module = _BareLinear(some.weight.detach())
        if format is not None and unsupported_reason(some, format, weight.device) is None:
            head = quantise(some.weight, None, format, many_tokens=self.many_tokens)
        return TrimmedHead(head, tokens, None if bias is None else bias.detach()[tokens], weight.shape[0])


class TrimmedHead(nn.Module):
    """Logits of some tokens; all others get minus infinity, so that the draft does not propose them (but where a family
    caps its logits, which makes that its least one).

    Lossless all the same: to the target, a token that the draft does not propose is one that it gave no probability.

    Args:
        head: of `tokens` alone, without a bias.
        tokens: in order.
        bias: theirs; None if the head has none.
        vocabulary: how many tokens there are.
    """

    tokens: Tensor
    bias: Tensor | None

    def __init__(self, head: nn.Module, tokens: Tensor, bias: Tensor | None, vocabulary: int) -> None:
        super().__init__()
        self.head, self.vocabulary = head, vocabulary
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        some = self.head(hidden)
        if self.bias is not None:
            some = some + self.bias
        every = some.new_full((*some.shape[:-1], self.vocabulary), -torch.inf)
        return every.index_copy_(-1, self.tokens, some)  # type: ignore[no-any-return]


class _BareLinear(nn.Module):
    """A linear layer whose weight counts as a copy."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight)


def branch(model: PreTrainedModel, kind: str, layer: int) -> nn.Module:
    """A sub-layer of the model."""
    decoder_layer = model.get_decoder().layers[layer]
    return decoder_layer.get_submodule("self_attn" if kind == "attn" else "mlp")  # type: ignore[no-any-return]


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a sub-layer, by name, but those that carry adapters: what carries them (a module that holds
    them by name, as peft's do) reads its layers' weights."""
    for name, part in module.named_children():
        if type(part) is nn.Linear:
            yield name, part
        elif not any(isinstance(child, nn.ModuleDict) for child in part.children()):
            yield from ((f"{name}.{inner}", linear) for inner, linear in linears(part))


def unsupported_reason(linear: nn.Module, format: Format, device: torch.device) -> str | None:
    """Why a module cannot have a copy in this format on this device, or None if it can."""
    return linear_unsupported_reason(linear, format) or device_unsupported_reason(format, device)


def quantisable(model: PreTrainedModel, format: Format) -> QuantisedSet:
    """The sub-layers that gain a copy of something in this format."""
    layers = range(model.config.num_hidden_layers)
    found = {
        kind: [
            layer
            for layer in layers
            if any(
                unsupported_reason(part, format, model.device) is None
                for _, part in linears(branch(model, kind, layer))
            )
        ]
        for kind in ("attn", "mlp")
    }
    return QuantisedSet(**found)


def unsupported_reasons(model: PreTrainedModel, draft_spec: DraftSpec) -> list[str]:
    """What of a draft spec stays in full precision, and why: one line for each reason."""
    if draft_spec.quantised is None:
        return []
    format, left = draft_spec.quantised.format, dict[str, list[str]]()
    for kind, layer in draft_spec.quantised.sublayers:
        parts = list(linears(branch(model, kind, layer)))
        if not parts:
            left.setdefault("it has no linear layers", []).append(f"{kind} {layer}")
        for name, part in parts:
            if (reason := unsupported_reason(part, format, model.device)) is not None:
                left.setdefault(reason, []).append(f"{kind} {layer}'s {name}")
    if (
        draft_spec.quantised.head
        and (reason := unsupported_reason(_like_head(model, draft_spec), format, model.device)) is not None
    ):
        left.setdefault(reason, []).append("the head")
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} not in {format.name}: {reason}"
        for reason, names in left.items()
    ]


def draft_weight_bytes(model: PreTrainedModel, draft_spec: DraftSpec) -> int:
    """What a draft by this draft spec takes beside the model, before it is taken."""
    total = 0
    for kind, layer, name, format in _linear_keys(model, draft_spec):
        outputs, inputs = _weight_and_bias(branch(model, kind, layer).get_submodule(name))[0].shape
        total += quantised_bytes(outputs, inputs, format)
    if not draft_spec.head_is_own:
        return total
    weight, bias = _weight_and_bias(model.lm_head)  # type: ignore[arg-type]
    outputs = weight.shape[0] if draft_spec.vocabulary is None else len(draft_spec.vocabulary)
    total += 0 if draft_spec.vocabulary is None else outputs * (8 + (0 if bias is None else bias.itemsize))
    own_format = draft_spec.format if draft_spec.quantised and draft_spec.quantised.head else None
    like = _like_head(model, draft_spec)
    if own_format is not None and unsupported_reason(like, own_format, model.device) is None:
        return total + quantised_bytes(outputs, weight.shape[1], own_format)
    return total + (0 if draft_spec.vocabulary is None else outputs * weight.shape[1] * weight.itemsize)


def _like_head(model: PreTrainedModel, draft_spec: DraftSpec) -> nn.Module:
    """The layer that the draft's head would be a copy of: one without weights for a trimmed one, else the model's."""
    head: nn.Module = model.lm_head  # type: ignore[assignment]
    if draft_spec.vocabulary is None or type(head) is not nn.Linear:
        return head
    return nn.Linear(head.in_features, len(draft_spec.vocabulary), device="meta", dtype=head.weight.dtype)


def check_memory(model: PreTrainedModel, draft_spec: DraftSpec, limit: int | None) -> None:
    """Raise `InputError` if the draft would take more than `limit` bytes beside the model, before any is taken."""
    if limit is not None and (needed := draft_weight_bytes(model, draft_spec)) > limit:
        raise InputError(
            f"the draft's own layers take {in_words(needed)} beside the model, but draft_memory allows "
            f"{in_words(limit)}; allow more, or search for a smaller draft with that limit"
        )


def check_vocabulary(model: PreTrainedModel, draft_spec: DraftSpec) -> None:
    """Raise `PlanError` if the draft spec's head proposes what the model's does not."""
    if draft_spec.vocabulary is None:
        return
    most, tokens = _weight_and_bias(model.lm_head)[0].shape[0], draft_spec.vocabulary.tokens  # type: ignore[arg-type]
    if not tokens or tokens[-1] >= most:
        has = f"token {tokens[-1]}" if tokens else "no token"
        raise PlanError(
            f"draft_vocabulary has {has}, but this model has 0..{most - 1}; run 'selfspec search' on this model"
        )


def _keys(model: PreTrainedModel, draft_spec: DraftSpec) -> Iterator[Key]:
    yield from _linear_keys(model, draft_spec)
    head = draft_spec.format if draft_spec.quantised and draft_spec.quantised.head else None
    yield (HEAD, head) if draft_spec.vocabulary is None else (HEAD, head, draft_spec.vocabulary)


def _linear_keys(model: PreTrainedModel, draft_spec: DraftSpec) -> Iterator[tuple[str, int, str, Format]]:
    if draft_spec.quantised is None:
        return
    for kind, layer in draft_spec.quantised.sublayers:
        for name, part in linears(branch(model, kind, layer)):
            if unsupported_reason(part, draft_spec.quantised.format, model.device) is None:
                yield kind, layer, name, draft_spec.quantised.format


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    return linear.weight, getattr(linear, "bias", None)  # type: ignore[return-value]
