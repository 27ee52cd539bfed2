"""Contenders: the ways to decode greedily that a benchmark holds against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decode_options import DecodeOptions
from selfspec.decoding.stats import Stats
from selfspec.errors import SelfspecError
from selfspec.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec.speculator import SelfSpeculator

GENERATE, PLAIN, EARLY_EXIT, PROMPT_LOOKUP, DRAFT_MODEL, OURS = (
    "model.generate",
    "plain",
    "assistant_early_exit",
    "prompt_lookup",
    "draft model",
    "selfspec",
)
TRIAL_PROMPTS, TRIAL_TOKENS = 2, 64
"""What a contender with settings is tried on, to find its best ones."""


class PeerError(SelfspecError):
    """A peer that cannot decode with the model at hand."""


_PEER_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What transformers raises where one of its own methods does not serve a model."""


class Contender(Protocol):
    """A way to decode greedily."""

    name: str
    stats: Stats | None
    """Summed over what was counted since `stats` was last set; None where the contender keeps none."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it decodes with, for the report."""

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        """The new tokens `t` behind `prompt` (`t`, on any device), on the CPU."""


@dataclass
class HuggingFace:
    """`model.generate` with options of its own."""

    name: str
    model: PreTrainedModel
    settings: dict[str, Any] = field(default_factory=dict)
    stats: Stats | None = None

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        row = prompt.to(self.model.device)[None]
        result = self.model.generate(  # type: ignore[operator]
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=new_tokens,
            do_sample=False,
            **self.settings,
        )
        return _new_tokens(result, prompt)


@dataclass
class EarlyExit:
    """Hugging Face's own self-speculation. It reads all but the exit layer from `model.generation_config`."""

    model: PreTrainedModel
    exit_layer: int
    draft_tokens: int
    name: str = EARLY_EXIT
    stats: Stats | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"exit_layer": self.exit_layer, "num_assistant_tokens": self.draft_tokens}

    def decode(self, prompt: Tensor, new_tokens: int) -> Tensor:
        with self._options_where_they_are_read():
            return HuggingFace(self.name, self.model, {"assistant_early_exit": self.exit_layer}).decode(
                prompt, new_tokens
            )

    @contextmanager
    def _options_where_they_are_read(self) -> Iterator[None]:
        options = {"num_assistant_tokens": self.draft_tokens, "num_assistant_tokens_schedule": "constant"}
        config = self.model.generation_config
        assert config is not None, "a model that can generate has a generation config"
        before = {name: getattr(config, name, None) for name in (*options, "assistant_confidence_threshold")}
        layers = self.model.config.num_hidden_layers
        try:
            for name, value in options.items():
                setattr(config, name, value)
            yield
        finally:
            self.model.config.num_hidden_layers = layers  # left truncated after an exception
            for name, value in before.items():
                setattr(config, name, value)


@dataclass
class Ours:
    """A `SelfSpeculator`: our runtime, with a plan or plainly, and further options of `generate`."""

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
        result = self.spec.generate(row, max_new_tokens=new_tokens, do_sample=False, **self.options)
        if self.stats is not None:
            self.stats.add(self.spec.stats)
        return _new_tokens(result, prompt)


def early_exits(model: PreTrainedModel, *, draft_tokens: Sequence[int] = (3, 6)) -> list[EarlyExit]:
    """The built-in self-speculation at every eighth of the model's depth up to three quarters."""
    layers = model.config.num_hidden_layers
    exits = sorted({max(1, layers * eighths // 8) for eighths in (1, 2, 3, 4, 6)} - {layers})
    return [EarlyExit(model, layer, n) for layer in exits for n in draft_tokens]


def prompt_lookups(model: PreTrainedModel, *, draft_tokens: Sequence[int] = (3, 10)) -> list[HuggingFace]:
    """Prompt lookup with each of these draft lengths."""
    return [HuggingFace(PROMPT_LOOKUP, model, {"prompt_lookup_num_tokens": n}) for n in draft_tokens]


def fastest(contenders: Sequence[Contender], prompts: Sequence[Tensor], new_tokens: int) -> Contender:
    """The contender that decodes the first prompts in the least time; each goes once untimed before.

    Raises:
        PeerError: none of them can decode with this model.
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
    """Who takes part, and who had to stay away and why."""

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
    """`model.generate`, the plain model in our runtime, and ours; with `peers`, the built-in ways to speculate too,
    each with the settings that are the fastest on the first prompts; with a `draft_model`, classic speculative decoding
    in our runtime, `draft_gamma` tokens a round."""
    ours = SelfSpeculator(model, plan, options)
    passes = DecodeOptions(backend=options.backend, compile=options.compile, graphs=options.graphs)
    plain = SelfSpeculator(model, Plan.none(pass_lengths=ours.runtime.pass_lengths), passes)
    contenders: list[Contender] = [HuggingFace(GENERATE, model), Ours(PLAIN, plain)]
    absent: list[str] = []
    families: list[list[Contender]] = [[*early_exits(model)], [*prompt_lookups(model)]] if peers else []
    for candidates in families:
        try:
            contenders.append(fastest(candidates, prompts, new_tokens))
        except PeerError as error:
            absent.append(" ".join(str(error).split()))
    if draft_model is not None:
        classic = Plan(skip_set=SkipSet(), gamma=draft_gamma, pass_lengths=ours.runtime.pass_lengths)
        spec = SelfSpeculator(model, classic, passes, draft_model)
        contenders.append(Ours(DRAFT_MODEL, spec))
    return LineUp(contenders=[*contenders, Ours(OURS, ours)], ours=ours, absent=absent)


def timed(contender: Contender, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """What the contender wrote, and the seconds until it lay on the CPU, where nothing is left to wait for."""
    start = perf_counter()
    new = contender.decode(prompt, new_tokens)
    return new, perf_counter() - start


def _new_tokens(result: Any, prompt: Tensor) -> Tensor:
    tokens = result if isinstance(result, Tensor) else result.sequences
    return tokens[0, len(prompt) :].cpu()
