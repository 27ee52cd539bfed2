"""Pass lengths: which passes are faster when padded.

On some processors a product with one row is slower than a product with three rows. Padding does not change the result:
no token attends to the padding after it.

A padding must be faster beyond the noise. The profile's medians only suggest paddings: of many noisy medians, the least
is too low. Each suggested padding is then timed again, in turn with the unpadded pass. The padding is adopted if the
gain is at least `LEAST_PADDING_GAIN` and its 95 % interval, a bootstrap over the paired cycles, is above 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import Ratio, interleaved, median_seconds, speed_ratio, timed_task
from selfspec_search.profile.timing import Call, TimedCalls

Key = TypeVar("Key", bound=Hashable)

LEAST_PADDING_GAIN = 0.04
"""Share of a pass: a padded pass must be faster by this much."""
DRAFT_LENGTHS = (1, 2, 3)
"""Tokens: the lengths that are tried for passes of the draft."""
CYCLES = 5
"""Cycles: how often every length of `DRAFT_LENGTHS` is timed, in turn."""
PAIRED_CYCLES = 11
"""Cycles: how often a suggested padding is timed, in turn with the unpadded pass."""


def suggested_lengths(seconds: Mapping[int, float]) -> dict[int, int]:
    """By length of a pass, the fastest longer pass, if it is faster by `LEAST_PADDING_GAIN`."""
    found = {}
    for t, unpadded in seconds.items():
        best = min(seconds, key=lambda longer: (longer < t, seconds[longer]))
        if seconds[best] < unpadded * (1 - LEAST_PADDING_GAIN):
            found[t] = best
    return found


def padding_gain(unpadded: Sequence[float], padded: Sequence[float]) -> Ratio:
    """The speed of the padded pass over the unpadded pass, from paired seconds."""
    return speed_ratio(np.array([padded, unpadded])[:, :, None], np.ones((2, 1)))


def is_adopted(gain: Ratio) -> bool:
    """Whether a padding is faster beyond the noise."""
    return gain.low > 1 and gain.value >= 1 + LEAST_PADDING_GAIN


def adopted(pairs: Mapping[Key, tuple[Call, Call]], device: torch.device) -> dict[Key, list[float]]:
    """Time pairs of an unpadded and a padded pass in turn; return the gains of adopted paddings for `PassLengths`."""
    tasks = {(key, at): timed_task(call, device) for key, pair in pairs.items() for at, call in enumerate(pair)}
    seconds = interleaved(tasks, repeats=PAIRED_CYCLES, group=2)
    gains = {key: padding_gain(seconds[key, 0], seconds[key, 1]) for key in pairs}
    return {key: [*gain.to_dict().values()] for key, gain in gains.items() if is_adopted(gain)}


def draft_padding(runtime: Runtime, timed_calls: TimedCalls) -> PassLengths:
    """The padded length of a draft pass over one token, measured with the whole model as draft.

    1 for compiled or captured passes, since every length would be compiled or captured first.
    """
    rows, device = runtime.cache.rows, runtime.model.device
    if runtime.static:
        return PassLengths(rows=rows, target=[])
    call = timed_calls.draft(runtime)

    def padded_to(length: int) -> Call:
        def padded() -> Any:
            with runtime.padded(PassLengths(rows=rows, target=[], draft=length)):
                return call()

        return padded

    calls = {length: padded_to(length) for length in DRAFT_LENGTHS}
    suggested = suggested_lengths(median_seconds(calls, device, repeats=CYCLES)).get(1, 1)
    gains = adopted({"draft": (calls[1], calls[suggested])} if suggested > 1 else {}, device)
    return PassLengths(rows=rows, target=[], draft=suggested if gains else 1, gains=gains or None)


def target_padding(
    draft: PassLengths, rounds: Mapping[int, Call], seconds: Mapping[int, float], device: torch.device
) -> PassLengths:
    """`draft` with the padded lengths of the target's passes.

    Args:
        rounds: rounds to time, by drafted tokens. A round over more tokens stands for a padded pass.
        seconds: median seconds of these rounds.
    """
    suggested = suggested_lengths({n + 1: each for n, each in seconds.items()})
    gains = adopted({t: (rounds[t - 1], rounds[longer - 1]) for t, longer in suggested.items()}, device)
    target = [suggested[t] if t in gains else t for t in range(1, max(seconds) + 2)]
    named = {**(draft.gains or {}), **{f"target {t}": gain for t, gain in gains.items()}}
    return draft.model_copy(update={"target": target, "gains": named or None})
