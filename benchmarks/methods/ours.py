"""Ours: our search as a method. Its budget pays for texts, profile and confirmation."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from common.machine import no_cached_texts
from selfspec_search import search

from methods.judging import OURS, Entry, predicted_speedup
from methods.prepared import Prepared


def search_ours(prepared: Prepared, budget: float) -> Entry:
    """Search within the budget; `InputError` if the budget is too small."""
    settings = replace(prepared.settings, timeout=prepared.bill.left_of(budget))
    start = perf_counter()
    with no_cached_texts():
        result = search(prepared.loaded.model, prepared.calibration, prepared.confirming, settings)
    seconds = perf_counter() - start
    return Entry(
        method=OURS,
        name=OURS,
        plan=result.plan,
        ratio=None,
        predicted=predicted_speedup(prepared.replay, prepared.context, result.plan),
        tried=result.trials_complete + result.trials_pruned,
        offered=1,
        seconds=seconds,
    )
