"""How long does a search take, and how much cheaper is a trial than decoding?

A search of the embedded model with full-size trials: 32 prompts x 128 tokens, drafts of up to 8 tokens. Then the
runtime decodes the same prompts, one row at a time, with the best, the middle and the last skip set of the ranking: the
cost of one trial by decoding.

Wall time first: replay uses all cores, decoding gains nothing from a second core. Then cost per core: the process is
pinned to one core, replays the three skip sets to all depths and as far as the search does, and decodes with them at
the best draft length and at the longest. Prints a table; the last line is JSON.

    python benchmarks/search.py --out benchmarks/results/search_cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from common.machine import no_cached_texts, one_core, usable
from common.prompts import embedded, texts_of
from common.record import Record, add_out, parser, run_script
from common.tables import pairs_table
from rich.console import Console
from selfspec_search import SearchResult, SearchSettings, load_study, search
from selfspec_search.replay.replay import Replay
from selfspec_search.replay.rounds import Drafting
from selfspec_search.replay.table import Table as DepthTable
from selfspec_search.replay.texts import decode_batch
from selfspec_search.storage.study_store import StoredTrial
from selfspec_search.study.objective import Prediction, Prices, best, depths_worth_replaying, evaluate
from selfspec_search.study.study import prediction_of
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.drafters.build import drafter_of
from selfspec.huggingface.loading import load
from selfspec.runtime.runtime import Runtime

GAMMA_MAX = 8
REPLAYS = 3
"""Replays of each skip set on one core; the median counts."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record = Record("search", options, threads=options.threads)
    loaded = load(options.model, device="cpu", dtype="float32")
    calibration, held_out = embedded(loaded, options.new_tokens)
    calibration = calibration[: options.prompts]
    found, trials = run_search(loaded.model, calibration, held_out, options)
    chosen = best_middle_last(trials)
    measured = {
        "cores": usable(),
        **on_all_cores(loaded.model, found, trials, chosen, calibration, options),
        **on_one_core(loaded.model, found, chosen, calibration, options),
        "replay_equals_decoding_in_every_round": found.rounds_equal,
    }
    show(measured)
    return record.end("cpu", **measured)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", default="demo", help="'demo', a directory or a hub id")
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--trials", type=int, default=200)
    options.add_argument("--threads", type=int, default=1, help="threads of PyTorch; replay uses all cores anyway")
    add_out(options)
    return options.parse_args(argv)


def run_search(
    model: PreTrainedModel, calibration: Sequence[Tensor], held_out: Sequence[Tensor], options: argparse.Namespace
) -> tuple[SearchResult, Sequence[StoredTrial]]:
    """A search, and its trials."""
    with TemporaryDirectory() as folder, no_cached_texts():
        storage = str(Path(folder) / "trials.db")
        settings = SearchSettings(
            draft="skip",
            trials=options.trials,
            new_tokens=options.new_tokens,
            gamma_max=GAMMA_MAX,
            seed=options.seed,
            storage=storage,
        )
        return search(model, calibration, held_out, settings), load_study(storage).trials


def best_middle_last(trials: Sequence[StoredTrial]) -> dict[str, Prediction]:
    """Predictions of three complete trials, by place in the ranking."""
    ranking = sorted(filter(None, map(prediction_of, trials)), key=lambda prediction: -prediction.speedup)
    return {"best": ranking[0], "middle": ranking[len(ranking) // 2], "last": ranking[-1]}


def on_all_cores(
    model: PreTrainedModel,
    found: SearchResult,
    trials: Sequence[StoredTrial],
    chosen: Mapping[str, Prediction],
    prompts: Sequence[Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Wall time of the search's trials, and of decoding instead."""
    decoded = {place: seconds(model, prediction, prompts, options) for place, prediction in chosen.items()}
    whole = [float(trial.record["seconds"]) for trial in trials if trial.value is not None]
    return {
        "phases_s": found.seconds,
        "trials_whole": len(whole),
        "trials_ended_early": len(trials) - len(whole),
        "trial_s": mean([float(trial.record["seconds"]) for trial in trials]),
        "trial_whole_median_s": median(whole),
        "decoding_s": decoded,
        "decoding_over_trial": mean(decoded.values()) / (found.seconds["trials"] / len(trials)),
        "decoding_over_whole_trial": mean(decoded.values()) / mean(whole),
    }


def on_one_core(
    model: PreTrainedModel,
    found: SearchResult,
    chosen: Mapping[str, Prediction],
    prompts: Sequence[Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Seconds of trials and of decoding with the same skip sets, all on one core."""
    with one_core() as cores:
        texts = texts_of(Runtime(model), prompts, options.new_tokens)
        replay = Replay(model, texts, GAMMA_MAX)
        prices = Prices.of(found.profile, texts).with_lookups(texts)
        whole, searched = (
            {place: trial_seconds(replay, prices, chosen[place], all_depths=every) for place in chosen}
            for every in (True, False)
        )
        decoded = {place: seconds(model, prediction, prompts, options) for place, prediction in chosen.items()}
        longest = {place: replace(prediction, drafting=Drafting(GAMMA_MAX)) for place, prediction in chosen.items()}
        at_longest = {place: seconds(model, prediction, prompts, options) for place, prediction in longest.items()}
    return {
        "one_core": {
            "cores": cores,
            "trial_whole_s": whole,
            "trial_as_searched_s": searched,
            "decoding_s": decoded,
            "decoding_longest_s": at_longest,
        },
        "decoding_over_whole_trial_one_core": mean(decoded.values()) / mean(whole.values()),
        "decoding_longest_over_whole_trial_one_core": mean(at_longest.values()) / mean(whole.values()),
        "decoding_over_trial_as_searched_one_core": mean(decoded.values()) / mean(searched.values()),
    }


def trial_seconds(replay: Replay, prices: Prices, prediction: Prediction, *, all_depths: bool) -> float:
    """Seconds to replay and price a skip set: to all depths, or to the depths that the search would replay."""
    skip_set, taken = prediction.skip_set, []

    def worth_it(first: DepthTable) -> int:
        return depths_worth_replaying(evaluate(first, prices, skip_set))

    for _ in range(REPLAYS):
        start = perf_counter()
        table = replay.run(skip_set, None if all_depths else worth_it)
        best(table, prices, skip_set)
        taken.append(perf_counter() - start)
    return median(taken)


def seconds(
    model: PreTrainedModel, prediction: Prediction, prompts: Sequence[Tensor], options: argparse.Namespace
) -> float:
    """Seconds to decode all prompts with this plan, one at a time."""
    runtime = Runtime(model, prediction.skip_set)
    drafter = drafter_of(prediction.plan, runtime)
    decode_batch(runtime, drafter, prompts[:1], options.new_tokens)  # warm up
    start = perf_counter()
    for prompt in prompts:
        decode_batch(runtime, drafter, [prompt], options.new_tokens)
    return perf_counter() - start


def show(result: Mapping[str, Any]) -> None:
    """Print the figures under their names in the JSON; `_s` marks seconds."""
    one_core = {f"one core: {name}": value for name, value in result["one_core"].items()}
    rows = {name: value for name, value in result.items() if name != "one_core"} | one_core
    shown = {name.replace("_", " "): in_words(value) for name, value in rows.items()}
    Console(width=120).print(pairs_table("search", shown))


def in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {seconds:.2f}" for name, seconds in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)
