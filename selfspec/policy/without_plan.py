"""Quick plan: how to decode without a search. Prompt lookup where it pays, by a short measurement of passes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from selfspec.models.support import position_limit, vocabulary_size
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.plan import Plan
from selfspec.plan.round_costs import RoundCosts
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import Task, interleaved, medians, timed_task

SECONDS = 2.0
"""Seconds: the measurement of passes ends after about this time."""
CONTEXT = 128
"""Tokens: cached before each timed pass."""
DRAFTED = (0, 4, 16, 1, 2, 8)
"""Tokens: the draft lengths whose passes are timed, the most telling ones first."""
MOST_CYCLES = 9
"""Cycles: how often each pass is timed at most."""
LOOKUP = PromptLookup(gamma=DRAFTED[2], min_ngram=2)
MATCHES = [[0.20, 0.70], [0.51, 0.76], [0.66, 0.81], [0.78, 0.83], [0.87, 0.93]]
"""Agreement of prompt lookup by length class of the match: where the policy starts, before it follows the text.

Measured by `match_shares` on 2,020 tokens that SmolLM2-135M-Instruct wrote for 24 questions of Spec-Bench.
"""


def quick_plan(runtime: Runtime) -> Plan:
    """A plan of prompt lookup for single rows, with measured round costs; plain decoding where lookup cannot pay.

    A plan without lookup results if the passes are compiled on a CPU, since each draft length would take half a minute
    to compile.
    """
    if runtime.passes.compile and runtime.model.device.type == "cpu":
        return Plan.none()
    seconds = pass_seconds(runtime)
    longest = max(seconds)
    rounds = np.interp(range(longest + 1), sorted(seconds), [seconds[n] for n in sorted(seconds)])
    if all(rounds[n] >= (n + 1) * rounds[0] for n in range(1, longest + 1)):
        return Plan.none()
    costs = RoundCosts(rows=1, draft_step=0.0, rounds=rounds.tolist(), agreement=[0.0], matches=MATCHES)
    lookup = LOOKUP.model_copy(update={"gamma": longest})
    return Plan(skip_set=SkipSet(), gamma=0, prompt_lookup=lookup, round_costs=[costs])


@torch.inference_mode()
def pass_seconds(runtime: Runtime) -> dict[int, float]:
    """Median seconds of the target's pass over n drafted tokens, by n. Slow passes are timed at fewer lengths."""
    device, end = runtime.model.device, perf_counter() + SECONDS
    limit = position_limit(runtime.model.config) or CONTEXT + DRAFTED[2] + 1
    drafted = [n for n in DRAFTED if n + 2 <= limit]
    context = max(0, min(CONTEXT, limit - max(drafted) - 1))
    runtime.reserve(1, context + max(drafted) + 1)
    tasks, cycle = dict[int, Task](), 0.0
    for n in drafted:
        tokens = torch.arange(n + 1, device=device)[None] % vocabulary_size(runtime.model.config)
        tasks[n] = timed_task(_pass(runtime, tokens, context), device)
        tasks[n]()  # builds and warms up; the next run captures
        cycle += tasks[n]()
        if len(tasks) > 1 and perf_counter() + 2 * cycle > end:
            break
    cycles = min(MOST_CYCLES, max(1, int((end - perf_counter()) / cycle)))
    timed = medians(interleaved(tasks, repeats=cycles, warmup=0))
    runtime.zero_cache()
    return timed


def _pass(runtime: Runtime, tokens: Tensor, context: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        runtime.cache.lengths.fill_(context)
        return runtime.run("target", tokens)

    def captured() -> Tensor:
        assert runtime.graphs is not None
        return runtime.graphs.run(("quick", tokens.shape[1]), run)  # type: ignore[no-any-return]

    return run if runtime.graphs is None else captured
