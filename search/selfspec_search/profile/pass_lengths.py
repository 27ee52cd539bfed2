"""Pass lengths: which passes are faster when padded.

On some processors a product with one row is slower than a product with three rows. Padding does not change the result:
no token attends to the padding after it.
"""

from __future__ import annotations

from collections.abc import Mapping

from selfspec.plan.round_costs import PassLengths
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.timing import Call, TimedCalls

LEAST_PADDING_GAIN = 0.04
"""Share of a pass: a padded pass must be faster by this much; smaller differences are noise."""
DRAFT_LENGTHS = (1, 2, 3)
"""Tokens: the lengths that are tried for passes of the draft."""
CYCLES = 5
"""Cycles: how often every length is timed, in turn."""


def target_lengths(rounds: Mapping[int, float], gamma_max: int) -> list[int]:
    """Padded lengths of passes over 1 to `gamma_max + 1` tokens, from seconds of rounds by drafted tokens."""
    lengths = []
    for n in range(gamma_max + 1):
        longer = {m: seconds for m, seconds in rounds.items() if m > n}
        best = min(longer, key=lambda m: longer[m], default=n)
        pays = n in rounds and best > n and rounds[best] < rounds[n] * (1 - LEAST_PADDING_GAIN)
        lengths.append((best if pays else n) + 1)
    return lengths


def draft_pass_length(runtime: Runtime, timed_calls: TimedCalls) -> int:
    """The padded length of a draft pass over one token, measured with the whole model as draft.

    1 for compiled or captured passes, since every length would be compiled or captured first.
    """
    if runtime.static:
        return 1
    call = timed_calls.draft(runtime)

    def padded_to(length: int) -> Call:
        def padded() -> None:
            with runtime.padded(PassLengths(rows=runtime.cache.rows, target=[], draft=length)):
                call()

        return padded

    calls = {length: padded_to(length) for length in DRAFT_LENGTHS}
    timed = median_seconds(calls, runtime.model.device, repeats=CYCLES)
    best = min(timed, key=lambda length: timed[length])
    return best if timed[best] < timed[1] * (1 - LEAST_PADDING_GAIN) else 1
