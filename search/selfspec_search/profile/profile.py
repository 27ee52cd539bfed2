"""Profile: what steps and rounds cost on this device at several context lengths, measured with the real runtime."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import InputError
from selfspec.huggingface.loading import processor_name, versions
from selfspec.models.draft_weights import DraftWeights
from selfspec.plan import PassLengths
from selfspec.plan.draft_spec import DraftSpec, Format
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime
from selfspec.utils.devices import device_name
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.costs import Costs, Record, at_another_context, fit_step, variants
from selfspec_search.profile.draft_costs import copied_variants, draft_weights_that_gain, fit_draft_weights
from selfspec_search.profile.pass_lengths import draft_padding, target_lengths
from selfspec_search.profile.timing import STEPS, Bench, Call, share_cache
from selfspec_search.replay.sampling_settings import Sampling

CYCLES = 15
"""How often everything is measured, in turn."""
CONTEXTS = (128, 512, 2048)
"""Measured where neither contexts nor prompts are given, as far as the model's positions reach."""
FULL = "nothing"
"""The variant that skips nothing, by name."""

Name = tuple[int, str | int]
"""Of what is timed: a context; a variant, 'lookup', 'prefill', or the drafted tokens of a round."""


class Profile(Record):
    """Costs at each of `contexts`, the tokens in the cache when a pass begins, and where they were measured."""

    device: str
    processor: str = ""  # the CPU's name
    threads: int  # of the CPU, which does part of the work on any device
    dtype: str
    rows: Annotated[int, Field(ge=1)]
    compiled: bool
    backend: str
    sampling: dict[str, Any] = Field(
        default_factory=dict
    )  # how tokens were chosen, as arguments of `generate`; greedily if empty
    num_layers: int
    gamma_max: int
    versions: dict[str, str]
    contexts: Annotated[tuple[int, ...], Field(min_length=1)]
    costs: tuple[Costs, ...]
    pass_lengths: PassLengths | None = None  # which `costs` are of; None where passes are what they are
    slower_formats: dict[str, str] = Field(default_factory=dict)  # by code, why `costs` say nothing of them

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if len(self.costs) != len(self.contexts) or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError("contexts must rise, and each must have its costs")
        expected = (self.num_layers, self.compiled, self.gamma_max + 1)
        if any((costs.num_layers, costs.compiled, len(costs.rounds)) != expected for costs in self.costs):
            raise ValueError("costs must be of this profile's layers and draft lengths, compiled or not like itself")
        return self

    def at(self, context: float) -> Costs:
        """Costs at a context: linear in between, as the work of attention is, and constant beyond the ends.

        Beyond them, what is measured is all that is said: a slope between two timings is mostly their noise.
        Measure at contexts that span what will be decoded.
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
        """Whether it was measured on such a device as this process has."""
        here = (device_name(device), processor_name(), torch.get_num_threads())
        return here == (self.device, self.processor, self.threads)

    @property
    def conditions(self) -> str:
        """Where it was measured, in words."""
        threads = f", threads {self.threads}" if self.device == "cpu" else ""
        passes = ("compiled" if self.compiled else "eager") + (", captured" if self.costs[0].captured else "")
        chosen = ", sampling" if self.sampling.get("do_sample") else ""
        return f"{self.device}{threads}, {self.dtype}, rows {self.rows}, {passes}, {self.backend}{chosen}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; seconds."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`. Raises `InputError` for what it did not write."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "profile"
            raise InputError(f"not a profile of this release: {where}: {problem['msg']}; measure it anew") from None


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that the model's positions reach, None where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def default_contexts(limit: int | None, gamma_max: int) -> list[int]:
    """`CONTEXTS`, as far as a round still fits behind them."""
    longest = max(1, limit - gamma_max - 1) if limit is not None else CONTEXTS[-1]
    return sorted({min(context, longest) for context in CONTEXTS})


def round_lengths(gamma_max: int, *, sparse: bool) -> list[int]:
    """How many drafted tokens rounds are measured with: all up to 8, or few where each must be compiled (seconds each);
    beyond, where lookup alone goes, every fourth or eighth."""
    few = (0, 1, 2, 4) if sparse else range(9)
    return [n for n in range(gamma_max + 1) if n in few or n == gamma_max or n % (8 if sparse else 4) == 0]


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What passes are measured for.

    Args:
        rows: how many are decoded together; each has the whole context.
        slots: the least capacity of the cache; the cost of a pass depends on it where attention has static shapes.
        sampling: how tokens are chosen, greedily by default; with a large vocabulary it counts.
        backend: an attention backend by name; None for the first that serves.
        compile: whether passes are compiled; by default where the runtime compiles by default.
        formats: of quantised copies to measure; those that are no faster here are only named.
    """

    rows: int = 1
    slots: int = 0
    sampling: Sampling | None = None
    backend: str | None = None
    compile: bool | None = None
    formats: Sequence[Format] = ()


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    prompts: Sequence[Tensor] | None = None,
    settings: ProfileSettings | None = None,
    *,
    gamma_max: int,
    contexts: Sequence[int] | None = None,
    on_cycle: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure a profile: medians of interleaved cycles.

    All that is skipped is measured at one context, the middle one; at the others the full model's step, and rounds over
    few lengths, since nothing else depends on the context.

    Args:
        prompts: what stands in the cache, joined; random tokens where they are too few. Costs hardly depend on it.
        settings: see `ProfileSettings`.
        gamma_max: the longest draft whose round is measured.
        contexts: tokens in the cache when a pass begins; by default those of the median prompt, or `CONTEXTS`.
        on_cycle: called with (cycles done, of how many).

    Raises:
        InputError: a context of no tokens or beyond the model's positions, or no row.
    """
    settings = settings or ProfileSettings()
    contexts = _checked(model, contexts or _contexts_of(model, prompts, gamma_max), settings.rows)
    subject = _Subject.of(model, prompts or (), contexts, gamma_max, settings)
    timed = median_seconds(subject.calls(gamma_max), model.device, repeats=CYCLES, rare=_is_prefill, on_repeat=on_cycle)
    base, full, pass_lengths = subject.base, subject.full, subject.pass_lengths(timed, gamma_max)
    found = costs_at(
        contexts, base, timed, model.config.num_hidden_layers, compiled=full.passes.compile, pass_lengths=pass_lengths
    )
    steps = {name: timed[base, name] / STEPS for name in (FULL, *copied_variants(model, subject.gaining))}
    changes = {"captured": subject.benches[base].captures(full), **fit_draft_weights(model, subject.gaining, steps)}
    return Profile(
        device=device_name(model.device),
        processor=processor_name(),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=settings.rows,
        compiled=full.passes.compile,
        backend=full.backend.backend.name,
        sampling=settings.sampling.to_dict() if settings.sampling else {},
        num_layers=model.config.num_hidden_layers,
        gamma_max=gamma_max,
        versions=versions(),
        contexts=tuple(contexts),
        costs=tuple(costs.model_copy(update=changes) for costs in found),
        pass_lengths=pass_lengths if pass_lengths.most else None,
        slower_formats=subject.slower,
    )


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is measured: drafts by name, in runtimes that share one cache, at every context."""

    runtimes: dict[str, Runtime]
    benches: dict[int, Bench]  # by context
    base: int  # the context at which everything is measured
    draft_length: int  # that passes of a draft in full precision are padded to
    gaining: list[Format]
    slower: dict[str, str]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        contexts: Sequence[int],
        gamma_max: int,
        settings: ProfileSettings,
    ) -> _Subject:
        rows, base, draft_weights = settings.rows, contexts[len(contexts) // 2], DraftWeights(model)
        # One cache for all: growing would replace it.
        slots = max(settings.slots, contexts[-1] + 3 * max(gamma_max, STEPS) + 5)

        def runtime_of(draft_spec: DraftSpec | SkipSet, lengths: PassLengths | None = None) -> Runtime:
            return Runtime(
                model,
                draft_spec,
                backend=settings.backend,
                compile=settings.compile,
                draft_weights=draft_weights,
                pass_lengths=lengths,
            )

        unpadded = runtime_of(SkipSet())
        share_cache([unpadded], rows, slots)
        benches = {length: Bench(_cached(model, prompts, rows, length + 1), settings.sampling) for length in contexts}
        draft_length = draft_padding(unpadded, benches[base])
        lengths = PassLengths(rows=rows, target=[], draft=draft_length)
        # A format must be faster than the padded passes that it replaces.
        runtimes = {name: runtime_of(skip, lengths) for name, skip in variants(model.config.num_hidden_layers).items()}
        share_cache([unpadded, *runtimes.values()], rows, slots)
        gaining, slower = draft_weights_that_gain(runtimes[FULL], benches[base], settings.formats, runtime_of)
        runtimes |= {name: runtime_of(draft_spec) for name, draft_spec in copied_variants(model, gaining).items()}
        share_cache(runtimes.values(), rows, slots)
        return cls(
            runtimes=runtimes, benches=benches, base=base, draft_length=draft_length, gaining=gaining, slower=slower
        )

    @property
    def full(self) -> Runtime:
        return self.runtimes[FULL]

    def calls(self, gamma_max: int) -> dict[Name, Call]:
        """All that is timed."""
        calls: dict[Name, Call] = {}
        for context, bench in self.benches.items():
            lengths = round_lengths(gamma_max, sparse=self.full.passes.compile or context != self.base)
            some = self.runtimes if context == self.base else {FULL: self.full}
            calls |= {(context, name): call for name, call in _calls(bench, some, lengths).items()}
        return calls

    def pass_lengths(self, timed: Mapping[Name, float], gamma_max: int) -> PassLengths:
        target = target_lengths(_rounds(self.base, timed), gamma_max)
        return PassLengths(rows=self.full.cache.rows, target=target, draft=self.draft_length)


def _is_prefill(name: Name) -> bool:
    return name[1] == "prefill"


def _checked(model: PreTrainedModel, contexts: Sequence[int], rows: int) -> list[int]:
    """The contexts in order, if the model can have them."""
    if rows < 1:
        raise InputError(f"rows is {rows}, but it must be at least 1")
    if (least := min(contexts)) < 1:
        raise InputError(f"a context of {least} tokens was given, but it must be at least 1")
    limit = position_limit(model)
    if limit is not None and (most := max(contexts)) >= limit:
        raise InputError(
            f"a context of {most} tokens was given, but this model's positions end at {limit}; "
            f"give at most {limit - 1}, for a pass adds one"
        )
    return sorted(set(contexts))


def _contexts_of(model: PreTrainedModel, prompts: Sequence[Tensor] | None, gamma_max: int) -> list[int]:
    """The median prompt's, or the default."""
    if prompts:
        return [max(1, sorted(map(len, prompts))[len(prompts) // 2] - 1)]
    return default_contexts(position_limit(model), gamma_max)


def _cached(model: PreTrainedModel, prompts: Sequence[Tensor], rows: int, length: int) -> Tensor:
    """Tokens `b length` to fill the cache with: the prompts, one behind the other, then random ones."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    random = torch.randint(vocabulary, (rows * length,), generator=torch.Generator().manual_seed(0))
    joined = torch.cat([*(prompt.cpu() for prompt in prompts), random])
    return joined[: rows * length].view(rows, length)


def _calls(bench: Bench, runtimes: Mapping[str, Runtime], lengths: Sequence[int]) -> dict[str | int, Call]:
    """What is timed at one context: steps of each runtime's draft, rounds over `lengths` tokens, and the rest."""
    full = runtimes[FULL]
    calls: dict[str | int, Call] = {name: bench.draft(runtime) for name, runtime in runtimes.items()}
    calls |= {n: bench.round(full, n) for n in lengths}
    return calls | {"lookup": bench.lookup(full, max(1, lengths[-1])), "prefill": bench.prefill(full)}


def costs_at(
    contexts: Sequence[int],
    base: int,
    timed: Mapping[Name, float],
    num_layers: int,
    *,
    compiled: bool,
    pass_lengths: PassLengths | None = None,
) -> tuple[Costs, ...]:
    """Costs at every context, from all that was timed at `base` and what was timed at the others."""
    steps = {name: timed[base, name] / STEPS for name in variants(num_layers)}
    fitted = fit_step(num_layers, steps)
    rounds = _rounds(base, timed)
    base_rounds = np.interp(range(max(rounds) + 1), list(rounds), list(rounds.values()))
    found = []
    for context in contexts:
        step, here = timed[context, FULL] / STEPS, _rounds(context, timed)
        ratios = [seconds / base_rounds[n] for n, seconds in here.items()]
        bare = (base_rounds * np.interp(range(len(base_rounds)), list(here), ratios)).tolist()
        fixed, layer, attention, mlp = at_another_context(fitted, step, num_layers).tolist()
        found.append(
            Costs(
                num_layers=num_layers,
                fixed=fixed,
                layer=layer,
                attention=attention,
                mlp=mlp,
                rounds=_padded(bare, pass_lengths),
                prefill=timed[context, "prefill"],
                lookup=timed[context, "lookup"] / STEPS,
                compiled=compiled,
                measured=steps if context == base else {FULL: step},
            )
        )
    return tuple(found)


def _padded(rounds: list[float], pass_lengths: PassLengths | None) -> tuple[float, ...]:
    """What rounds cost where their passes are padded: each what that of its pass's length does."""
    lengths = [t if pass_lengths is None else pass_lengths.of_target(t) for t in range(1, len(rounds) + 1)]
    return tuple(rounds[t - 1] for t in lengths)


def _rounds(context: int, timed: Mapping[Name, float]) -> dict[int, float]:
    """Seconds of the rounds that were timed at a context, by how many tokens they had drafted."""
    return {n: seconds / STEPS for (at, n), seconds in timed.items() if at == context and isinstance(n, int)}
