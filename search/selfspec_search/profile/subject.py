"""Subject: the calls that a profile times, and the costs that follow from their seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.models.draft_weights import DraftWeights
from selfspec.plan.draft_spec import DraftSpec, Format
from selfspec.plan.round_costs import PassLengths
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime
from selfspec_search.profile.costs import Costs, at_another_context, fit_step, variants
from selfspec_search.profile.draft_costs import faster_formats, quantised_variants
from selfspec_search.profile.pass_lengths import draft_padding, target_padding
from selfspec_search.profile.timing import STEPS, Call, TimedCalls, share_cache
from selfspec_search.replay.sampling_settings import Sampling

FULL = "nothing"
"""Name of the variant that skips nothing."""

Name = tuple[int, str | int]
"""Name of a timed call: the context; and a variant, 'lookup', 'prefill', or the drafted tokens of a round."""


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """How passes are measured."""

    rows: int = 1  # rows that decode together; each row has the whole context
    slots: int = 0  # least capacity of the cache; with static shapes, the capacity decides the cost of attention
    sampling: Sampling | None = None  # greedy by default; sampling is costly with a large vocabulary
    backend: str | None = None  # name of an attention backend; None for the first available
    compile: bool | None = None  # whether passes are compiled; None for the runtime's default
    formats: Sequence[Format] = ()  # quantised formats to measure; formats that are not faster here are only named


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a profile measures: drafts by name, whose runtimes share one cache, at every context."""

    gamma_max: int
    runtimes: dict[str, Runtime]  # by variant name
    timed_calls: dict[int, TimedCalls]  # by context
    base: int  # the context at which all variants are measured
    draft_padding: PassLengths  # of full-precision drafts
    formats: list[Format]  # that are faster here
    slower_formats: dict[str, str]  # by code, the reason why other formats are not measured

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        contexts: Sequence[int],
        gamma_max: int,
        settings: ProfileSettings,
    ) -> Subject:
        """Build all runtimes; `contexts` must rise."""
        rows, base, draft_weights = settings.rows, contexts[len(contexts) // 2], DraftWeights(model)
        # All runtimes share one cache, which must not be replaced by a larger cache later.
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
        timed_calls = {
            context: TimedCalls(_cache_tokens(model, prompts, rows, context + 1), settings.sampling)
            for context in contexts
        }
        lengths = draft_padding(unpadded, timed_calls[base])
        # A format must be faster than padded full-precision passes.
        runtimes = {name: runtime_of(skip, lengths) for name, skip in variants(model.config.num_hidden_layers).items()}
        share_cache([unpadded, *runtimes.values()], rows, slots)
        formats, slower = faster_formats(runtimes[FULL], timed_calls[base], settings.formats, runtime_of)
        runtimes |= {name: runtime_of(draft_spec) for name, draft_spec in quantised_variants(model, formats).items()}
        share_cache(runtimes.values(), rows, slots)
        return cls(
            gamma_max=gamma_max,
            runtimes=runtimes,
            timed_calls=timed_calls,
            base=base,
            draft_padding=lengths,
            formats=formats,
            slower_formats=slower,
        )

    @property
    def full(self) -> Runtime:
        return self.runtimes[FULL]

    def calls(self) -> dict[Name, Call]:
        """All calls to time: draft steps of each runtime, rounds, prompt lookup and prefill."""
        calls: dict[Name, Call] = {}
        for context, timed in self.timed_calls.items():
            lengths = round_lengths(self.gamma_max, sparse=self.full.passes.compile or context != self.base)
            runtimes = self.runtimes if context == self.base else {FULL: self.full}
            calls |= {(context, name): timed.draft(runtime) for name, runtime in runtimes.items()}
            calls |= {(context, n): timed.round(self.full, n) for n in lengths}
            calls[context, "lookup"] = timed.lookup(self.full, max(1, lengths[-1]))
            calls[context, "prefill"] = timed.prefill(self.full)
        return calls

    def fewest(self, names: Iterable[Name]) -> list[Name]:
        """The calls without which nothing can be priced: one context, and few draft lengths."""
        kept = round_lengths(self.gamma_max, sparse=True)
        return [(at, what) for at, what in names if at == self.base and (isinstance(what, str) or what in kept)]

    def steps(self, timed: Mapping[Name, float]) -> dict[str, float]:
        """Seconds of one draft step of each runtime, at the base context."""
        return {name: timed[self.base, name] / STEPS for name in self.runtimes}

    def pass_lengths(self, calls: Mapping[Name, Call], timed: Mapping[Name, float]) -> PassLengths:
        """The lengths to which passes are padded, from all calls and their seconds."""
        seconds = _rounds(self.base, timed)
        rounds = {n: calls[self.base, n] for n in seconds}
        return target_padding(self.draft_padding, rounds, seconds, self.full.model.device)


def round_lengths(gamma_max: int, *, sparse: bool) -> list[int]:
    """Drafted tokens of the rounds to measure: every length up to 8, and every fourth length beyond.

    `sparse` measures fewer lengths: each length may have to be compiled, which takes seconds.
    """
    short, stride = ((0, 1, 2, 4), 8) if sparse else (range(9), 4)
    return [n for n in range(gamma_max + 1) if n in short or n == gamma_max or n % stride == 0]


def _cache_tokens(model: PreTrainedModel, prompts: Sequence[Tensor], rows: int, length: int) -> Tensor:
    """Tokens `b length` that fill the cache: the prompts one after the other, then random tokens."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randint(vocabulary, (rows * length,), generator=generator, device="cpu")
    joined = torch.cat([*(prompt.cpu() for prompt in prompts), random])
    return joined[: rows * length].view(rows, length)


def costs_at(
    contexts: Sequence[int],
    base: int,
    timed: Mapping[Name, float],
    num_layers: int,
    *,
    compiled: bool,
    pass_lengths: PassLengths | None = None,
) -> tuple[Costs, ...]:
    """Costs at every context, from all calls timed at `base` and the few calls timed at the other contexts."""
    steps = {name: timed[base, name] / STEPS for name in variants(num_layers)}
    fitted, rounds = fit_step(num_layers, steps), _rounds(base, timed)
    base_rounds = np.interp(range(max(rounds) + 1), list(rounds), list(rounds.values()))
    lengths = [t if pass_lengths is None else pass_lengths.of_target(t) for t in range(1, len(base_rounds) + 1)]
    found = []
    for context in contexts:
        step, here = timed[context, FULL] / STEPS, _rounds(context, timed)
        ratios = [seconds / base_rounds[n] for n, seconds in here.items()]
        unpadded = (base_rounds * np.interp(range(len(base_rounds)), list(here), ratios)).tolist()
        fixed, layer, attention, mlp = at_another_context(fitted, step, num_layers).tolist()
        found.append(
            Costs(
                num_layers=num_layers,
                fixed=fixed,
                layer=layer,
                attention=attention,
                mlp=mlp,
                rounds=tuple(unpadded[t - 1] for t in lengths),
                prefill=timed[context, "prefill"],
                lookup=timed[context, "lookup"] / STEPS,
                compiled=compiled,
                measured=steps if context == base else {FULL: step},
            )
        )
    return tuple(found)


def _rounds(context: int, timed: Mapping[Name, float]) -> dict[int, float]:
    """Seconds of the rounds timed at a context, by drafted tokens."""
    return {n: seconds / STEPS for (at, n), seconds in timed.items() if at == context and isinstance(n, int)}
