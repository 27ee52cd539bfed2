"""Contenders: the ways to decode greedily that a benchmark compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decode_options import DecodeOptions
from selfspec.decoding.stats import Stats
from selfspec.errors import SelfspecError
from selfspec.huggingface.options import set_aside
from selfspec.plan.plan import Plan
from selfspec.plan.round_costs import PassLengths
from selfspec.plan.sublayers import SkipSet
from selfspec.speculator import SelfSpeculator

GENERATE, PLAIN, PADDED, EARLY_EXIT, PROMPT_LOOKUP, DRAFT_MODEL, OURS = (
    "model.generate",
    "plain",
    "plain, padded",
    "assistant_early_exit",
    "prompt_lookup",
    "draft model",
    "selfspec",
)
TRIAL_PROMPTS, TRIAL_TOKENS = 2, 64
"""Prompts, and new tokens per prompt: the trial that finds the best settings of a contender."""
WITHOUT_STOP_STRINGS: dict[str, Any] = {"stop_strings": None}
"""Options of `generate`: stop strings of the model's generation config would need a tokenizer."""


class PeerError(SelfspecError):
    """Another way to decode does not support the model."""


_PEER_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What transformers raises if one of its own methods does not support a model."""


class Contender(Protocol):
    """A way to decode greedily."""

    name: str
    stats: Stats | None
    """The sum since `stats` was last set; None if the contender counts nothing."""

    @property
    def settings(self) -> dict[str, Any]:
        """The contender's settings, for the report."""

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """The new tokens `t` after `prompt` (`t`, on any device), on the CPU."""


@dataclass
class HuggingFace:
    """`model.generate` with further options."""

    name: str
    model: PreTrainedModel
    settings: dict[str, Any] = field(default_factory=dict)
    stats: Stats | None = None

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        row, options = prompt.to(self.model.device)[None], {**WITHOUT_STOP_STRINGS, **self.settings}
        set_aside(self.model, None, options, streams=True)  # else `model.generate` would decode otherwise, with beams
        result = self.model.generate(  # type: ignore[operator]
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
        return _new_tokens(result, prompt)


@dataclass
class EarlyExit:
    """Hugging Face's own self-speculation. All options but the exit layer come from `model.generation_config`."""

    model: PreTrainedModel
    exit_layer: int
    draft_tokens: int
    name: str = EARLY_EXIT
    stats: Stats | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"exit_layer": self.exit_layer, "num_assistant_tokens": self.draft_tokens}

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        options = {"num_assistant_tokens": self.draft_tokens, "num_assistant_tokens_schedule": "constant"}
        config = self.model.generation_config
        assert config is not None, "a model that can generate has a generation config"
        before = {name: getattr(config, name, None) for name in (*options, "assistant_confidence_threshold")}
        layers = self.model.config.num_hidden_layers
        try:
            for name, value in options.items():
                setattr(config, name, value)
            early_exit = HuggingFace(self.name, self.model, {"assistant_early_exit": self.exit_layer})
            return early_exit.decode(prompt, new_tokens)
        finally:
            self.model.config.num_hidden_layers = layers  # transformers leaves fewer layers after an exception
            for name, value in before.items():
                setattr(config, name, value)


@dataclass
class Ours:
    """A `SelfSpeculator` with a plan or plain, and further options of `generate`."""

    name: str
    spec: SelfSpeculator
    stats: Stats | None = field(default_factory=Stats)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        if self.spec.draft_runtime is not None:
            model = self.spec.draft_runtime.model
            return {"draft_model": model.name_or_path or model.config.model_type, "gamma": self.spec.plan.gamma}
        return {"plan": str(self.spec.plan)}

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        row = prompt.to(self.spec.model.device)[None]
        result = self.spec.generate(
            row, max_new_tokens=new_tokens, do_sample=False, **WITHOUT_STOP_STRINGS, **self.options
        )
        if self.stats is not None:
            self.stats.add(self.spec.stats)
        return _new_tokens(result, prompt)


def early_exits(model: PreTrainedModel, *, draft_tokens: Sequence[int] = (3, 6)) -> list[EarlyExit]:
    """Hugging Face's self-speculation with exit layers from an eighth to three quarters of the model's depth."""
    layers = model.config.num_hidden_layers
    exits = sorted({max(1, layers * eighths // 8) for eighths in (1, 2, 3, 4, 6)} - {layers})
    return [EarlyExit(model, layer, n) for layer in exits for n in draft_tokens]


def prompt_lookups(model: PreTrainedModel, *, draft_tokens: Sequence[int] = (3, 10)) -> list[HuggingFace]:
    """Prompt lookup with each of these draft lengths."""
    return [HuggingFace(PROMPT_LOOKUP, model, {"prompt_lookup_num_tokens": n}) for n in draft_tokens]


def fastest(contenders: Sequence[Contender], prompts: Sequence[Tensor], new_tokens: int) -> Contender:
    """The contender that decodes the first prompts in the least time, after one untimed decoding.

    Raises:
        PeerError: no contender supports the model.
    """
    prompts, new_tokens = prompts[:TRIAL_PROMPTS], min(new_tokens, TRIAL_TOKENS)
    tried: list[tuple[float, Contender]] = []
    failure: Exception | None = None
    for contender in contenders:
        try:
            contender.decode(prompts[0], new_tokens)
            tried.append((sum(timed(contender, prompt, new_tokens)[1] for prompt in prompts), contender))
        except _PEER_ERRORS as error:
            failure = error
    if not tried:
        raise PeerError(f"{contenders[0].name} cannot decode with this model: {failure}")
    return min(tried, key=lambda pair: pair[0])[1]


@dataclass(frozen=True, kw_only=True)
class LineUp:
    """The contenders, and for each absent contender the reason."""

    contenders: list[Contender]
    ours: SelfSpeculator
    absent: list[str]


def line_up(
    model: PreTrainedModel,
    plan: Plan,
    prompts: Sequence[Tensor],
    new_tokens: int,
    options: DecodeOptions = DecodeOptions(),
    *,
    peers: bool = True,
    draft_model: PreTrainedModel | None = None,
    draft_gamma: int = 4,
) -> LineUp:
    """The contenders of a benchmark: `model.generate`, plain decoding in our runtime, and the plan in our runtime.

    Args:
        peers: include Hugging Face's ways to speculate, each with the fastest settings on the first prompts.
        draft_model: include classic speculative decoding in our runtime with this model.
        draft_gamma: tokens that the draft model drafts in a round.
    """
    ours = SelfSpeculator(model, plan, options)
    passes = replace(options, policy="adaptive", draft_memory=None)
    plain = plain_contenders(model, ours.runtime.pass_lengths, passes)
    contenders: list[Contender] = [HuggingFace(GENERATE, model), *plain]
    absent: list[str] = []
    for candidates in (early_exits(model), prompt_lookups(model)) if peers else ():
        try:
            contenders.append(fastest(candidates, prompts, new_tokens))
        except PeerError as error:
            absent.append(" ".join(str(error).split()))
    if draft_model is not None:
        classic = Plan(skip_set=SkipSet(), gamma=draft_gamma, pass_lengths=ours.runtime.pass_lengths)
        contenders.append(Ours(DRAFT_MODEL, SelfSpeculator(model, classic, passes, draft_model)))
    return LineUp(contenders=[*contenders, Ours(OURS, ours)], ours=ours, absent=absent)


def plain_contenders(
    model: PreTrainedModel, pass_lengths: PassLengths | None, options: DecodeOptions = DecodeOptions()
) -> list[Ours]:
    """Plain decoding in our runtime, unpadded; and padded, if `pass_lengths` pads passes over one token.

    The baseline of a benchmark is the faster of the two (`Measurement.baseline`).
    """
    found = [Ours(PLAIN, SelfSpeculator(model, Plan.none(), options))]
    if pass_lengths is not None and pass_lengths.pads_plain:
        found.append(Ours(PADDED, SelfSpeculator(model, Plan.none(pass_lengths=pass_lengths), options)))
    return found


def timed(contender: Contender, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """The new tokens of a contender, and the seconds until these tokens are on the CPU."""
    start = perf_counter()
    new = contender.decode(prompt, new_tokens)
    return new, perf_counter() - start


def _new_tokens(result: Any, prompt: Tensor) -> Tensor:
    tokens = result if isinstance(result, Tensor) else result.sequences
    return tokens[0, len(prompt) :].cpu()
