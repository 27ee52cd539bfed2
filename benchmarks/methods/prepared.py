"""Prepared: what all methods share. Our search makes texts and profile once more, out of its own budget."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from common.prompts import embedded
from selfspec_search import SearchSettings
from selfspec_search.confirm.plan_writer import Phases, measure_for
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.texts import Text, decode_batch, write_texts
from selfspec_search.study.objective import Prices
from selfspec_search.study.proposals import SENSITIVITY_TEXTS
from torch import Tensor

from methods.bill import Bill
from methods.context import Context
from methods.judging import price
from selfspec import InputError
from selfspec.decoding.drafter import NoDrafter
from selfspec.huggingface.loading import Loaded, load
from selfspec.plan.sublayers import SkipSet
from selfspec.runtime.runtime import Runtime

Result = TypeVar("Result")

CONFIRMED, CONFIRM_TEXTS, CONFIRM_REPEATS = 2, 4, 2
"""What ours confirms within its budget: plans, prompts and repeats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What all methods share, how ours is set but for the time of its trials, and what it will spend."""

    loaded: Loaded
    calibration: list[Tensor]
    confirming: list[Tensor]
    judged: list[Tensor]
    context: Context
    replay: Replay
    settings: SearchSettings
    bill: Bill


def prepare(path: str, options: argparse.Namespace) -> Prepared:
    """Load the model, let it write its texts, and measure what its sub-layers cost, all as our search does."""
    loaded = load(path, device="cpu", dtype=options.dtype)
    calibration, held_out = embedded(loaded, options.new_tokens)
    calibration = calibration[: options.calibration]
    judged, confirming = held_out[: options.prompts], held_out[options.prompts :][:CONFIRM_TEXTS]
    if not confirming:
        raise InputError(f"all {len(held_out)} held-out prompts would be judged on; leave some to confirm (--prompts)")
    settings = settings_of(options, len(confirming))
    runtime, silent = Runtime(loaded.model), Phases(on_progress=lambda progress: None)
    written, texts_took = timed(lambda: write(runtime, [*calibration, *confirming], options.new_tokens))
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
            sensitivity=seconds_of_sensitivity(replay, context),
            trial=seconds_of_trial(replay, context),
        ),
    )


def settings_of(options: argparse.Namespace, confirming: int) -> SearchSettings:
    """Of our search, which ends by the clock alone."""
    return SearchSettings(
        draft="skip",  # as the rivals
        trials=10**6,
        seed=options.seed,
        gamma_max=options.gamma_max,
        new_tokens=options.new_tokens,
        confirm=CONFIRMED,
        confirm_texts=confirming,
        repeats=CONFIRM_REPEATS,
        lookup=False,  # what is judged is the selection of sub-layers
    )


def write(runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int) -> list[Text]:
    written = dict(write_texts(runtime, prompts, new_tokens))
    return [written[index] for index in range(len(prompts))]


def timed(do: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the seconds that it took."""
    start = perf_counter()
    return do(), perf_counter() - start


def seconds_to_confirm(runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int) -> float:
    """By plain decoding and by each plan, which is hardly slower; each warms up with the first prompt."""
    _, once = timed(lambda: [decode_batch(runtime, NoDrafter(), [prompt], new_tokens) for prompt in prompts])
    return (CONFIRMED + 1) * (CONFIRM_REPEATS + 1 / len(prompts)) * once


def seconds_of_sensitivity(replay: Replay, context: Context) -> float:
    """Every sub-layer is left out alone, on a few of the texts, to the first depth."""
    share = min(1.0, SENSITIVITY_TEXTS / len(context.texts))
    _, seconds = timed(lambda: replay.first_depth(SkipSet(attn=[0])))
    return 2 * context.num_layers * share * seconds


def seconds_of_trial(replay: Replay, context: Context) -> float:
    """One that runs whole."""
    every_other = range(1, context.num_layers, 2)
    return timed(lambda: price(replay, context, SkipSet(attn=every_other, mlp=every_other)))[1]
