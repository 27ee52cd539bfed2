"""How long does a search take, and how much cheaper is a trial than decoding?

A search of the embedded model with trials of full size: 32 prompts x 128 tokens, drafts of up to 8, all depths; it may
end trials early, as searches do. Then the same prompts are decoded for real, one row at a time by the same runtime,
with the best, the middle and the last set of the ranking: what one trial would cost by decoding. Prints a table; the
last line is JSON.

    python benchmarks/search.py --out benchmarks/results/search_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from decode import commit, device_name
from rich.console import Console
from rich.table import Table
from selfspec_search import SearchSettings, load_study, search
from selfspec_search.confirm import plan_of
from selfspec_search.objective import Prediction
from selfspec_search.study import prediction_of
from selfspec_search.texts import decode_batch
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.drafting import drafter_of
from selfspec.loading import load, quiet_hugging_face, versions
from selfspec.prompts import load_prompts
from selfspec.runtime import Runtime


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv), commit()
    quiet_hugging_face()
    torch.set_num_threads(options.threads)
    loaded = load(options.model, device="cpu", dtype="float32")
    calibration, held_out = (
        load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=options.new_tokens)
        for path in (calibration_prompts(), held_out_prompts())
    )
    calibration = calibration[: options.prompts]
    with TemporaryDirectory() as folder:
        storage = str(Path(folder) / "trials.db")
        settings = SearchSettings(
            trials=options.trials, new_tokens=options.new_tokens, gamma_max=8, seed=options.seed, storage=storage
        )
        found = search(loaded.model, calibration, held_out, settings)
        trials = load_study(storage).trials
    ranking = sorted(filter(None, map(prediction_of, trials)), key=lambda prediction: -prediction.speedup)
    decoded = [seconds(loaded.model, ranking[place], calibration, options) for place in (0, len(ranking) // 2, -1)]
    whole = [float(trial.record["seconds"]) for trial in trials if trial.value is not None]
    result = {
        "benchmark": "search",
        "commit": code,
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "phases_s": found.seconds,
        "trials_whole": len(whole),
        "trials_ended_early": len(trials) - len(whole),
        "trial_s": mean([float(trial.record["seconds"]) for trial in trials]),
        "trial_whole_median_s": median(whole),
        "decoding_s": {"best": decoded[0], "middle": decoded[1], "last": decoded[2]},
        "decoding_over_trial": mean(decoded) / (found.seconds["trials"] / len(trials)),
        "decoding_over_whole_trial": mean(decoded) / mean(whole),
        "replay_equals_decoding_in_every_round": found.rounds_equal,
    }
    show(result)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", "utf8")
    print(json.dumps(result))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="'demo', a directory or a hub id")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; replay shares the cores by itself")
    parser.add_argument("--out", help="write the JSON here too")
    return parser.parse_args(argv)


def seconds(
    model: PreTrainedModel, prediction: Prediction, prompts: Sequence[Tensor], options: argparse.Namespace
) -> float:
    """Decoding all prompts with this plan, one at a time."""
    runtime = Runtime(model, prediction.skip_set)
    drafter = drafter_of(plan_of(prediction), runtime)
    decode_batch(runtime, drafter, prompts[:1], options.new_tokens)  # warm up
    start = perf_counter()
    for prompt in prompts:
        decode_batch(runtime, drafter, [prompt], options.new_tokens)
    return perf_counter() - start


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"search: {result['device']}", show_header=False)
    rows = {
        **{f"{name}, seconds": value for name, value in result["phases_s"].items()},
        "trials run whole, ended early": (result["trials_whole"], result["trials_ended_early"]),
        "one trial, seconds": result["trial_s"],
        "one whole trial, median seconds": result["trial_whole_median_s"],
        "decoding the same prompts, seconds": tuple(round(value, 1) for value in result["decoding_s"].values()),
        "decoding over a trial (everything in the phase counted)": result["decoding_over_trial"],
        "decoding over a whole trial": result["decoding_over_whole_trial"],
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
