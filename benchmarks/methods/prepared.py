"""Prepared: model, prompts, texts and profile of all methods. Our search makes its own texts and profile."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from common.prompts import embedded, texts_of
from selfspec_search import SearchSettings
from selfspec_search.confirm.plan_writer import Phases, measure_for
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.texts import decode_batch
from selfspec_search.study.objective import Prices
from torch import Tensor

from methods.bill import Bill
from methods.context import Context
from selfspec import InputError
from selfspec.decoding.drafter import NoDrafter
from selfspec.huggingface.loading import Loaded, load
from selfspec.runtime.runtime import Runtime

Result = TypeVar("Result")

CONFIRMED, CONFIRM_TEXTS, CONFIRM_REPEATS = 2, 4, 2
"""Plans, prompts and repeats of the confirmation of our search."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """The input of all methods, the settings of our search, and its bill."""

    loaded: Loaded
    calibration: list[Tensor]
    confirming: list[Tensor]
    judged: list[Tensor]
    context: Context
    replay: Replay
    settings: SearchSettings
    bill: Bill


def prepare(path: str, options: argparse.Namespace) -> Prepared:
    """Load the model, write its texts and measure its profile, all as our search does."""
    loaded = load(path, device="cpu", dtype=options.dtype)
    calibration, held_out = embedded(loaded, options.new_tokens)
    calibration = calibration[: options.calibration]
    judged, confirming = held_out[: options.prompts], held_out[options.prompts :][:CONFIRM_TEXTS]
    if not confirming:
        raise InputError(f"--prompts leaves none of {len(held_out)} held-out prompts to confirm on; give fewer")
    settings = settings_of(options, len(confirming))
    runtime, silent = Runtime(loaded.model), Phases(on_progress=lambda progress: None)
    written, texts_took = timed(lambda: texts_of(runtime, [*calibration, *confirming], options.new_tokens))
    profile, profile_took = timed(lambda: measure_for(loaded.model, written, settings, silent))
    texts = written[: len(calibration)]
    replay, recording_took = timed(lambda: Replay(loaded.model, texts, options.gamma_max))
    context = Context(model=loaded.model, texts=texts, costs=Prices.of(profile, texts, lookup=False).costs)
    return Prepared(
        loaded=loaded,
        calibration=calibration,
        confirming=confirming,
        judged=judged,
        context=context,
        replay=replay,
        settings=settings,
        bill=Bill(
            texts=texts_took,
            profile=profile_took,
            recording=recording_took,
            confirmation=seconds_to_confirm(runtime, confirming, options.new_tokens),
        ),
    )


def settings_of(options: argparse.Namespace, confirming: int) -> SearchSettings:
    """The settings of our search, which ends by its timeout only."""
    return SearchSettings(
        draft="skip",  # as the published methods
        trials=10**6,
        seed=options.seed,
        gamma_max=options.gamma_max,
        new_tokens=options.new_tokens,
        confirm=CONFIRMED,
        confirm_texts=confirming,
        repeats=CONFIRM_REPEATS,
        lookup=False,  # the benchmark compares skip sets only
    )


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of `work`, and its seconds."""
    start = perf_counter()
    return work(), perf_counter() - start


def seconds_to_confirm(runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int) -> float:
    """Seconds of plain decoding and as many for each plan; each warms up with the first prompt."""
    _, once = timed(lambda: [decode_batch(runtime, NoDrafter(), [prompt], new_tokens) for prompt in prompts])
    return (CONFIRMED + 1) * (CONFIRM_REPEATS + 1 / len(prompts)) * once
