"""Profile: what draft steps and rounds cost on this device at several context lengths, measured with the runtime."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.huggingface.loading import processor_name, versions
from selfspec.plan.round_costs import PassLengths
from selfspec.utils.devices import device_name
from selfspec.utils.statistics import median_seconds
from selfspec_search.budget import Budget
from selfspec_search.profile.costs import Costs, Record
from selfspec_search.profile.draft_costs import fit_draft_weights
from selfspec_search.profile.subject import Name, ProfileSettings, Subject, costs_at
from selfspec_search.profile.timing import Call

CYCLES = 15
"""Cycles: how often every call is timed, in turn."""
TIMING_SHARE = 0.75
"""Share of the profile's time until the cycles end; suggested paddings are timed afterwards."""
LEAST_CYCLES = 5
"""Cycles: the fewest, however little time there is."""
CONTEXTS = (128, 512, 2048)
"""Tokens: the default contexts without prompts, as far as the model's positions reach."""


class Profile(Record):
    """Costs at each of `contexts` (the tokens in the cache when a pass begins), and where the costs were measured."""

    device: str
    processor: str = ""  # the CPU's name
    threads: int  # of the CPU, which does part of the work for every device
    dtype: str
    rows: Annotated[int, Field(ge=1)]
    compiled: bool
    backend: str
    sampling: dict[str, Any] = Field(default_factory=dict)  # options of `generate`; empty for greedy decoding
    num_layers: int
    gamma_max: int
    versions: dict[str, str]
    contexts: Annotated[tuple[int, ...], Field(min_length=1)]
    costs: tuple[Costs, ...]
    pass_lengths: PassLengths | None = None  # of the measured passes; None without padding
    slower_formats: dict[str, str] = Field(default_factory=dict)  # by code, the reason why `costs` lack the format

    @model_validator(mode="after")
    def _check_costs_match(self) -> Self:
        if len(self.costs) != len(self.contexts) or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError("contexts must rise, and each must have its costs")
        expected = (self.num_layers, self.compiled, self.gamma_max + 1)
        if any((costs.num_layers, costs.compiled, len(costs.rounds)) != expected for costs in self.costs):
            raise ValueError("num_layers, compiled and gamma_max of the costs must equal the profile's")
        return self

    def at(self, context: float) -> Costs:
        """Costs at a context: linear between measured contexts, as attention is, and constant beyond the ends.

        Beyond the ends, a slope between two timings would be mostly noise: measure contexts that span the decoding.
        """
        last = len(self.contexts) - 1
        upper = bisect_right(self.contexts, context)
        if upper == 0 or upper > last:
            return self.costs[min(upper, last)]
        low, high = self.contexts[upper - 1 : upper + 1]
        if context == low:
            return self.costs[upper - 1]
        return self.costs[upper - 1].mixed(self.costs[upper], (context - low) / (high - low))

    def is_of(self, device: torch.device) -> bool:
        """Whether the profile was measured on a device and CPU like this process's."""
        here = (device_name(device), processor_name(), torch.get_num_threads())
        return here == (self.device, self.processor, self.threads)

    @property
    def conditions(self) -> str:
        """Where and how the profile was measured, in words."""
        threads = f", threads {self.threads}" if self.device == "cpu" else ""
        passes = ("compiled" if self.compiled else "eager") + (", captured" if self.costs[0].captured else "")
        chosen = ", sampling" if self.sampling.get("do_sample") else ""
        return f"{self.device}{threads}, {self.dtype}, rows {self.rows}, {passes}, {self.backend}{chosen}"

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON can hold it; times in seconds."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`. Raises `InputError` if `to_dict` of this release did not write `data`."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "profile"
            raise InputError(f"not a profile of this release: {where}: {problem['msg']}; measure again") from None


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions reach; None if the config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def default_contexts(limit: int | None, gamma_max: int) -> list[int]:
    """`CONTEXTS`, cut where a round would pass the limit on positions."""
    longest = max(1, limit - gamma_max - 1) if limit is not None else CONTEXTS[-1]
    return sorted({min(context, longest) for context in CONTEXTS})


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    prompts: Sequence[Tensor] | None = None,
    settings: ProfileSettings | None = None,
    *,
    gamma_max: int,
    contexts: Sequence[int] | None = None,
    budget: Budget | None = None,
    on_cycle: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure a profile: medians of interleaved cycles.

    All draft specs are measured at the middle context. Since only attention depends on the context, the other contexts
    need only the full model's step and rounds of a few lengths.

    Args:
        prompts: token ids that fill the cache, joined; random tokens fill the rest. Costs hardly depend on the tokens.
        settings: see `ProfileSettings`.
        gamma_max: the longest draft whose round is measured.
        contexts: tokens in the cache when a pass begins; by default the median prompt's length, or `CONTEXTS`.
        budget: limits the number of cycles and, where passes are slow, of contexts and draft lengths.
        on_cycle: called with (cycles done, number of cycles).

    Raises:
        InputError: a context is below 1 or beyond the model's positions, or `rows` is below 1.
    """
    settings, budget = settings or ProfileSettings(), budget or Budget()
    end = perf_counter() + TIMING_SHARE * budget.share("profile")
    if settings.rows < 1:
        raise InputError(f"rows is {settings.rows}, but it must be at least 1")
    contexts = _contexts(model, contexts, prompts, gamma_max)
    subject = Subject.of(model, prompts or (), contexts, gamma_max, settings)
    calls, cycles = _affordable(subject, end, budget)
    timed = median_seconds(
        calls, model.device, repeats=cycles, warmup=0, rare=lambda name: name[1] == "prefill", on_repeat=on_cycle
    )
    contexts = sorted({context for context, _ in calls})
    full, num_layers, pass_lengths = subject.full, model.config.num_hidden_layers, subject.pass_lengths(calls, timed)
    compiled, captured = full.passes.compile, subject.timed_calls[subject.base].captures(full)
    costs = costs_at(contexts, subject.base, timed, num_layers, compiled=compiled, pass_lengths=pass_lengths)
    base = costs[contexts.index(subject.base)]
    changes = {"captured": captured, **fit_draft_weights(model, subject.formats, subject.steps(timed), base)}
    return Profile(
        device=device_name(model.device),
        processor=processor_name(),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=settings.rows,
        compiled=compiled,
        backend=full.backend.backend.name,
        sampling=settings.sampling.to_dict() if settings.sampling else {},
        num_layers=num_layers,
        gamma_max=gamma_max,
        versions=versions(),
        contexts=tuple(contexts),
        costs=tuple(here.model_copy(update=changes) for here in costs),
        pass_lengths=pass_lengths if pass_lengths.most else None,
        slower_formats=subject.slower_formats,
    )


def _affordable(subject: Subject, end: float, budget: Budget) -> tuple[dict[Name, Call], int]:
    """The calls to time, each run once to warm up, and the number of cycles until `end`.

    Where passes are so slow that few cycles fit, only the middle context and few draft lengths are timed.
    """
    calls = subject.calls()
    fewer, start = subject.fewest(calls), perf_counter()
    for name in fewer:
        calls[name]()
    cycle = (perf_counter() - start) * len(calls) / len(fewer)
    if perf_counter() + (1 + LEAST_CYCLES) * cycle > end:
        budget.cut("costs were measured at one context, and at few draft lengths")
        calls, cycle = {name: calls[name] for name in fewer}, cycle * len(fewer) / len(calls)
    for name in calls.keys() - set(fewer):
        calls[name]()
    cycles = min(CYCLES, max(LEAST_CYCLES, int((end - perf_counter()) / cycle))) if budget.is_limited else CYCLES
    if cycles < CYCLES:
        budget.cut(f"costs were measured {cycles} times instead of {CYCLES}")
    return calls, cycles


def _contexts(
    model: PreTrainedModel, given: Sequence[int] | None, prompts: Sequence[Tensor] | None, gamma_max: int
) -> list[int]:
    """The contexts to measure, in rising order."""
    limit = position_limit(model)
    if not given and prompts:
        given = [max(1, sorted(map(len, prompts))[len(prompts) // 2] - 1)]
    contexts = sorted(set(given or default_contexts(limit, gamma_max)))
    if contexts[0] < 1:
        raise InputError(f"a context of {contexts[0]} tokens was given, but it must be at least 1")
    if limit is not None and contexts[-1] >= limit:
        raise InputError(
            f"a context of {contexts[-1]} tokens was given, but this model's positions end at {limit}; "
            f"give at most {limit - 1}, since a pass adds a token"
        )
    return contexts
