"""Passes: the time of the runtime's single passes.

On CUDA, each pass is captured in its own graph, and replays of the graph are timed, so that launches do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from common.timing import Call, Times, take_turns
from selfspec_search.profile.pass_lengths import DRAFT_LENGTHS, is_adopted, padding_gain, suggested_lengths
from torch import Tensor

from selfspec import DraftSpec
from selfspec.models.draft_weights import DraftWeights, draft_weight_bytes
from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.runtime import Runtime
from shapes.effort import Effort
from shapes.limits import PassTimes, expected_tokens, ideal_speedup
from shapes.subject import Subject

WARM_UP = 3
"""Calls before a capture, for compilation and set-up."""


@torch.inference_mode()
def round_passes(runtime: Runtime, tokens: Tensor, gamma: int, context: int, effort: Effort) -> PassTimes:
    """Time the passes of a round over the first of `tokens` (`b t`), with `context` cached tokens in every row.

    The cache must have room; its contents are overwritten.
    """
    runtime.cache.lengths.fill_(context)
    device = runtime.cache.lengths.device
    one, more = tokens[:, :1].clone(), tokens[:, : gamma + 1].clone()
    passes = {"plain": ("target", one), "draft": ("draft", one), "verify": ("target", more)}
    calls = {name: captured(partial(runtime.run, *run), device) for name, run in passes.items()}  # type: ignore[arg-type]
    times = take_turns(calls, device, repeats=effort.pass_repeats, in_a_row=effort.in_a_row)
    return PassTimes(**{name: one.median for name, one in times.items()})


def captured(call: Call, device: torch.device) -> Call:
    """A replay of the work that `call` launches; `call` itself on a CPU."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Times of passes, measured in one run."""

    target: dict[int, Times]  # by tokens of the pass
    drafts: dict[str, Times]  # over one token, by the draft's name
    padded: dict[str, int]  # tokens of a draft's pass, where padding makes them more than one
    bytes: dict[str, int]  # memory of each draft in addition to the model

    @cached_property
    def pass_lengths(self) -> PassLengths | None:
        """The pass lengths that are faster than shorter ones; None if padding never helps."""
        longer = adopted_lengths(self.target)
        pass_lengths = PassLengths(rows=1, target=[longer.get(t, t) for t in range(1, max(self.target) + 1)])
        return pass_lengths if pass_lengths.most else None

    def length_of(self, t: int) -> int:
        """Tokens of a padded pass over `t` tokens."""
        return self.pass_lengths.of_target(t) if self.pass_lengths else t

    @property
    def better_plain(self) -> Times:
        """Times of the pass with which plain decoding is fastest."""
        return self.target[self.length_of(1)]

    def verify(self, gamma: int) -> Times:
        """Times of the pass that verifies a draft of `gamma` tokens."""
        return self.target[self.length_of(gamma + 1)]

    def of(self, draft: str, gamma: int) -> PassTimes:
        """Seconds of a round's passes, and of the better plain pass."""
        return PassTimes(
            plain=self.better_plain.median, draft=self.drafts[draft].median, verify=self.verify(gamma).median
        )

    @property
    def gammas(self) -> list[int]:
        """Draft lengths with a measured verify pass."""
        return [t - 1 for t in sorted(self.target) if t > 1]

    def to_dict(self) -> dict[str, Any]:
        one = self.target[1]
        return {
            "target_ms": {t: round(1000 * times.median, 3) for t, times in self.target.items()},
            "target_over_one_token": {t: times.over(one).to_dict() for t, times in self.target.items()},
            "pass_lengths": self.pass_lengths.model_dump() if self.pass_lengths else None,
            "drafts": {name: self._draft(name) for name in self.drafts},
        }

    def _draft(self, name: str) -> dict[str, Any]:
        times = self.drafts[name]
        return {
            "ms": round(1000 * times.median, 3),
            "tokens": self.padded.get(name, 1),
            "share_of_target": times.over(self.target[1]).to_dict(),
            "share_of_better_plain": times.over(self.better_plain).to_dict(),
            "bytes": self.bytes[name],
        }


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best draft length, and its speedup over the better plain decoding if only passes took time."""

    draft: str
    agreement: float
    gamma: int
    speedup: float

    @classmethod
    def of(cls, passes: Passes, draft: str, agreement: float) -> Ceiling:
        """max over gamma of ((1 - a^(gamma+1)) / (1 - a)) / (gamma c + verify), with costs in plain passes."""

        def speedup(gamma: int) -> float:
            return ideal_speedup(expected_tokens(agreement, gamma), gamma, passes.of(draft, gamma))

        best = max(passes.gammas, key=speedup)
        return cls(draft=draft, agreement=agreement, gamma=best, speedup=speedup(best))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": round(self.speedup, 4)}


@torch.inference_mode()
def measure_passes(
    subject: Subject, drafts: Mapping[str, DraftSpec], draft_weights: DraftWeights, effort: Effort
) -> Passes:
    """Time all passes in turn, each in its own runtime with a filled cache."""
    target = Runtime(subject.model)
    runtimes = {
        name: Runtime(subject.model, draft_spec, draft_weights=draft_weights) for name, draft_spec in drafts.items()
    }
    longest = max(*effort.lengths, *DRAFT_LENGTHS)
    for runtime in (target, *runtimes.values()):
        runtime.reserve(1, effort.context + longest)
        runtime.cache.lengths.fill_(effort.context)  # the contents do not change a pass's time
    (tokens,) = subject.prompts(1, 1, longest)
    calls = {("target", t): partial(target.run, "target", tokens[:, :t].clone()) for t in effort.lengths}
    for name, runtime in runtimes.items():
        for t in lengths_of(runtime):
            calls[name, t] = partial(runtime.run, "draft", tokens[:, :t].clone())
    timed = take_turns(
        {key: captured(call, subject.device) for key, call in calls.items()},
        subject.device,
        repeats=effort.pass_repeats,
        in_a_row=effort.in_a_row,
    )
    best = {name: adopted_lengths({t: timed[name, t] for t in lengths_of(runtimes[name])}).get(1, 1) for name in drafts}
    return Passes(
        target={t: timed["target", t] for t in effort.lengths},
        drafts={name: timed[name, t] for name, t in best.items()},
        padded={name: t for name, t in best.items() if t > 1},
        bytes={name: draft_weight_bytes(subject.model, draft_spec) for name, draft_spec in drafts.items()},
    )


def lengths_of(runtime: Runtime) -> tuple[int, ...]:
    """Lengths to which a draft's pass over one token may be padded. Quantised drafts are not padded, as in a search."""
    return (1,) if runtime.static or runtime.draft_spec.quantised else DRAFT_LENGTHS


def adopted_lengths(timed: Mapping[int, Times]) -> dict[int, int]:
    """By length of a pass, the fastest longer pass, if it is faster beyond the noise."""
    suggested = suggested_lengths({t: times.median for t, times in timed.items()})
    gains = {t: padding_gain(timed[t].seconds, timed[longer].seconds) for t, longer in suggested.items()}
    return {t: longer for t, longer in suggested.items() if is_adopted(gains[t])}
