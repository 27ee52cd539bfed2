"""Profile: what a step of the draft and a round cost on this device, measured with the real runtime and its loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.decoding import prefill, step
from selfspec.drafting import LayerSkipDrafter
from selfspec.request import Request
from selfspec.runtime import Runtime
from selfspec.sampling import Draft
from selfspec.skip_set import SkipSet
from selfspec.stats import Stats
from selfspec_search.texts import greedy_request

CYCLES = 15
"""How often everything is measured, in turn, so that a slow moment of the machine falls on all alike."""
STEPS = 4
"""Draft length at which a step of the draft is timed. Rounds are timed by as many, too: on a busy machine the median of
long stretches and that of short ones are not to be compared."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Seconds. A step of the draft is one token drafted; a round is what comes on top: verify, accept, commit.

    `rounds[n]` is a round over n drafted tokens; `rounds[0]` is all that plain decoding does for a token. `measured`
    holds the steps that the sub-layers' costs were fitted to, for the record.
    """

    num_layers: int
    fixed: float  # embedding, head, launch, and the loop's own work
    layer: float  # norms and additions of a layer that is run at all
    attention: float
    mlp: float
    confidence: float  # per drafted token, where there is an exit threshold
    rounds: tuple[float, ...]
    prefill: float
    compiled: bool
    measured: dict[str, float]

    def draft_step(self, skip_set: SkipSet, *, threshold: bool = False) -> float:
        """Seconds per drafted token of a draft without `skip_set`."""
        counts = _counts(skip_set, self.num_layers)
        return float(counts @ self._costs) + (self.confidence if threshold else 0.0)

    def saved(self, kind: str) -> float:
        """Seconds that skipping one more attention (`attn`) or MLP (`mlp`) saves a step; half a layer with it."""
        return (self.attention if kind == "attn" else self.mlp) + self.layer / 2

    def round(self, drafted: NDArray[np.float64], gamma: int) -> NDArray[np.float64]:
        """Seconds of rounds over so many drafted tokens, of `gamma` at most; they may be expectations."""
        if self.compiled:  # which pads every draft to one length
            return np.full_like(drafted, self.rounds[gamma])
        return np.interp(drafted, np.arange(len(self.rounds)), self.rounds)

    @property
    def _costs(self) -> NDArray[np.float64]:
        return np.array([self.fixed, self.layer, self.attention, self.mlp])

    def to_dict(self) -> dict[str, Any]:
        """In milliseconds, for the plan's provenance."""
        names = ("fixed", "layer", "attention", "mlp", "confidence", "prefill")
        return {
            **{f"{name}_ms": round(getattr(self, name) * 1e3, 4) for name in names},
            "rounds_ms": [round(seconds * 1e3, 4) for seconds in self.rounds],
            "measured_steps_ms": {name: round(seconds * 1e3, 4) for name, seconds in self.measured.items()},
        }


def variants(num_layers: int) -> dict[str, SkipSet]:
    """Drafts that differ in what they skip, so that their costs tell the sub-layers' apart."""
    layers = range(num_layers)
    return {
        "nothing": SkipSet(),
        "all but one layer in eight": SkipSet.early_exit(-(-num_layers // 8), num_layers),
        "one layer in two": SkipSet.early_exit(-(-num_layers // 2), num_layers),
        "all attention": SkipSet(attn=layers),
        "all MLPs": SkipSet(mlp=layers),
        "attention, one layer in two": SkipSet(attn=layers[::2]),
        "MLPs, one layer in two": SkipSet(mlp=layers[::2]),
    }


def round_lengths(gamma_max: int, *, sparse: bool) -> list[int]:
    """How many drafted tokens rounds are measured with: all, or few where each must be compiled (seconds each)."""
    return [n for n in range(gamma_max + 1) if not sparse or n in (0, 1, 2, 4, gamma_max) or n % 8 == 0]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    gamma_max: int,
    slots: int,
    backend: str | None = None,
    compile: bool = False,
    on_cycle: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """Measure a profile: medians of interleaved cycles.

    Args:
        prompts: the one of median length is decoded.
        slots: the cache's capacity; the cost of a pass depends on it where attention has static shapes.
        on_cycle: called with (cycles done, of how many).
    """
    prompt = sorted(prompts, key=len)[len(prompts) // 2]
    slots = max(slots, len(prompt) + 3 * max(gamma_max, STEPS) + 4)  # one cache for all: growing would replace it
    runtimes = {
        name: Runtime(model, skip_set, backend=backend, compile=compile)
        for name, skip_set in variants(model.config.num_hidden_layers).items()
    }
    timed: dict[Any, list[float]] = {}
    bench: dict[str | int, Callable[[], Any]] = {
        **{name: _draft_bench(runtime, prompt, slots, None) for name, runtime in runtimes.items()},
        "confidence": _draft_bench(runtimes["one layer in two"], prompt, slots, 1e-30),
        **{n: _round_bench(runtimes["nothing"], prompt, slots, n) for n in round_lengths(gamma_max, sparse=compile)},
        "prefill": _prefill_bench(runtimes["nothing"], prompt, slots),
    }
    on_cycle(0, CYCLES)
    for call in bench.values():
        call()
    for cycle in range(CYCLES):
        for name, call in bench.items():
            timed.setdefault(name, []).append(_seconds(call, model.device))
        on_cycle(cycle + 1, CYCLES)
    medians = {name: median(seconds) for name, seconds in timed.items()}
    return _fit(model.config.num_hidden_layers, medians, gamma_max, compiled=runtimes["nothing"].compile)


def _fit(num_layers: int, medians: dict[Any, float], gamma_max: int, *, compiled: bool) -> Profile:
    """Costs from the variants' steps, scaled so that the full model's sum equals its measured step."""
    skip_sets = variants(num_layers)
    steps = {name: medians[name] / STEPS for name in skip_sets}
    counts = np.stack([_counts(skip_set, num_layers) for skip_set in skip_sets.values()])
    costs = fit_costs(counts, np.array(list(steps.values())))
    costs *= steps["nothing"] / float(counts[0] @ costs)
    fixed, layer, attention, mlp = costs.tolist()
    lengths = sorted(n for n in medians if isinstance(n, int))
    return Profile(
        num_layers=num_layers,
        fixed=fixed,
        layer=layer,
        attention=attention,
        mlp=mlp,
        confidence=max(0.0, (medians["confidence"] - medians["one layer in two"]) / STEPS),
        rounds=tuple(np.interp(range(gamma_max + 1), lengths, [medians[n] / STEPS for n in lengths]).tolist()),
        prefill=medians["prefill"],
        compiled=compiled,
        measured=steps,
    )


def fit_costs(counts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs that are not negative, of the least squared relative error: a short draft's step must be right, too."""
    weighted = counts / seconds[:, None]
    kept = np.ones(counts.shape[1], dtype=bool)
    costs = np.zeros(counts.shape[1])
    while kept.any():
        costs[:] = 0.0
        costs[kept] = np.linalg.lstsq(weighted[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if (costs >= 0).all():
            break
        kept[costs.argmin()] = False
    return costs


def _counts(skip_set: SkipSet, num_layers: int) -> NDArray[np.float64]:
    """How often each cost falls due in a step: fixed, layers, attentions, MLPs."""
    run = num_layers - len(skip_set.dropped_layers())
    return np.array([1, run, num_layers - len(skip_set.attn), num_layers - len(skip_set.mlp)], dtype=float)


class _Guesses:
    """A drafter that costs nothing: the same token over and over. What is left of a round is all but drafting."""

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma

    def draft(self, request: Request) -> Draft:
        tokens = request.prompts.new_zeros(request.rows, self.gamma)
        return Draft(tokens, torch.full_like(request.ends, self.gamma), None)


def _begin(runtime: Runtime, prompt: Tensor, slots: int, gamma: int) -> Request:
    """A request whose prompt is cached, with room for one round: every call is that same round again."""
    request = greedy_request(runtime.model, [prompt], 2 * gamma + 2, gamma, stops=False)
    runtime.reserve(1, slots)
    prefill(runtime, request)
    return request


def _draft_bench(runtime: Runtime, prompt: Tensor, slots: int, threshold: float | None) -> Callable[[], Any]:
    request = _begin(runtime, prompt, slots, STEPS)
    lengths = runtime.cache.lengths.clone()
    drafter = LayerSkipDrafter(runtime, STEPS, threshold)

    def call() -> None:
        runtime.cache.lengths.copy_(lengths)
        drafter.draft(request)

    return call


def _round_bench(runtime: Runtime, prompt: Tensor, slots: int, n: int) -> Callable[[], Any]:
    drafter, stats = _Guesses(n), Stats()
    request = _begin(runtime, prompt, slots, n)
    end = int(request.ends[0])

    def call() -> None:
        for _ in range(STEPS):
            request.ends.fill_(end)  # always from the same state: other things run in between, on the same cache
            runtime.cache.lengths.copy_(request.ends - 1)
            step(runtime, drafter, request, stats)

    return call


def _prefill_bench(runtime: Runtime, prompt: Tensor, slots: int) -> Callable[[], Any]:
    request = _begin(runtime, prompt, slots, 0)
    return lambda: prefill(runtime, request)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    start = perf_counter()
    call()
    _wait_for(device)
    return perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
