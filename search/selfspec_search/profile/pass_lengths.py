"""Padding: lengths of passes that are faster than shorter ones.

On some processors a product with one row is slower than one with three. Padding a pass to the length that is the
fastest changes nothing: what stands behind its tokens is seen by none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from selfspec.plan import PassLengths
from selfspec.runtime.runtime import Runtime
from selfspec.utils.statistics import median_seconds
from selfspec_search.profile.timing import Bench, Call

LEAST_GAIN = 0.04
"""A longer pass must be faster by so much, relatively: less is noise."""
DRAFT_LENGTHS = (1, 2, 3)
CYCLES = 5


def target_lengths(rounds: Mapping[int, float], gamma_max: int) -> list[int]:
    """How many tokens passes over 1 to `gamma_max + 1` are made of, by seconds of rounds over so many drafted."""
    lengths = []
    for n in range(gamma_max + 1):
        longer = {m: seconds for m, seconds in rounds.items() if m > n}
        best = min(longer, key=lambda m: longer[m], default=n)
        pays = n in rounds and best > n and rounds[best] < rounds[n] * (1 - LEAST_GAIN)
        lengths.append((best if pays else n) + 1)
    return lengths


def draft_padding(runtime: Runtime, bench: Bench) -> int:
    """How many tokens a draft's pass over one is best made of, where the draft is the whole model.

    Not tried where every length costs a compilation or a capture.
    """
    if runtime.static:
        return 1
    call = bench.draft(runtime)

    def padded_to(length: int) -> Call:
        def padded() -> None:
            with runtime.padded(PassLengths(rows=runtime.cache.rows, target=[], draft=length)):
                call()

        return padded

    calls = {length: padded_to(length) for length in DRAFT_LENGTHS}
    timed = median_seconds(calls, runtime.model.device, repeats=CYCLES)
    best = min(timed, key=lambda length: timed[length])
    return best if timed[best] < timed[1] * (1 - LEAST_GAIN) else 1
