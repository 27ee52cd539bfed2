"""Which way of choosing what to skip decodes fastest: ours, or any that was published?

Every method selects on the same calibration prompts, within the same wall time, and is judged by real decoding of
held-out prompts that none of them saw: one row, greedy, our runtime, all plans and plain decoding interleaved in one
process. To judge the selection alone, and generously, each rival's sets, over all the ratios that it sweeps, get the
draft length and the exit threshold that our replay predicts to suit them best; the two best by prediction are decoded,
and the faster of the two, as measured, counts. Ours pays for its texts, profile and confirmation out of its budget;
the rivals are given texts and profile. Prompt lookup takes no part. Prints a table; the last line is JSON.

    python benchmarks/selection.py --out benchmarks/results/selection_cpu.json --figure benchmarks/results/selection_cpu.png
    python benchmarks/selection.py --model demo --budget 5 --prompts 2 --repeats 1 --calibration 8 --new-tokens 48
    python benchmarks/selection.py --redraw benchmarks/results/selection_cpu.json --figure selection.png
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from decode import commit, device_name
from rich.console import Console
from rich.table import Table
from rivals.context import Context
from rivals.figure import draw
from rivals.judging import OURS, Entry, best_of_each, enter, judge, predicted_speedup, rows, verdict
from rivals.methods import METHODS
from selfspec_search import SearchSettings, search
from selfspec_search.profile import measure
from selfspec_search.replay import Replay
from selfspec_search.text_cache import CACHE_VARIABLE
from selfspec_search.texts import Text, write_texts
from torch import Tensor

from selfspec import InputError
from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.loading import Loaded, load, quiet_hugging_face, versions
from selfspec.prompts import load_prompts
from selfspec.runtime import Runtime

TITLES = {"demo": "LayerSkip-trained", "plain": "trained plainly"}
PATHS = {"demo": "demo", "plain": str(Path(__file__).parent / "plain_twin")}
CONFIRMED, CONFIRM_TEXTS, CONFIRM_REPEATS = 2, 4, 2
"""What ours confirms within its budget: plans, prompts and repeats."""
LEAST_SECONDS = 20.0
"""Of trials: with fewer, a search on a busy machine has hardly begun."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What all methods share, and the seconds that it took."""

    loaded: Loaded
    calibration: list[Tensor]
    confirming: list[Tensor]
    judged: list[Tensor]
    context: Context
    replay: Replay
    seconds: float


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    if options.redraw:
        result: dict[str, Any] = json.loads(options.redraw.read_text("utf8"))
    else:
        result = run(options)
        print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    if options.figure:
        draw(result["models"], options.figure)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=[*PATHS, "both"], default="both", help="which embedded model")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, OURS], default=[*METHODS, OURS], metavar="METHOD")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that each method may search")
    parser.add_argument("--calibration", type=int, default=32, help="how many prompts to select on")
    parser.add_argument("--prompts", type=int, default=16, help="how many held-out prompts to judge on; others confirm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--gamma-max", type=int, default=8, help="the longest draft considered")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--figure", type=Path, help="draw the measured speedups here")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing; draw what was written before")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> dict[str, Any]:
    code = commit()  # of now: the tree may change while this runs
    quiet_hugging_face()
    torch.set_num_threads(1)  # the embedded models are too small to gain from more
    console = Console(width=170)
    models = [run_model(name, options, console) for name in ([*PATHS] if options.model == "both" else [options.model])]
    return {
        "benchmark": "selection",
        "commit": code,
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "figure", "redraw")},
        "models": models,
    }


def run_model(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Select with every method, judge them together, and print the table."""
    prepared = prepare(name, options)
    entries: list[Entry] = []
    for method in options.methods:
        if method == OURS:
            new = [search_ours(prepared, options)]
        else:
            select = METHODS[method]
            new = enter(method, select, prepared.context, prepared.replay, options.budget, options.seed)
        console.print(f"{TITLES[name]}: {method} selected in {new[0].seconds:.1f} s: {new[0].plan}")
        entries += new
    model = prepared.loaded.model
    measured = judge(model, entries, prepared.judged, new_tokens=options.new_tokens, repeats=options.repeats)
    found = rows(measured, entries, prepared.context)
    console.print(table(TITLES[name], found))
    return {
        "model": name,
        "title": TITLES[name],
        "shared_seconds": round(prepared.seconds, 2),
        "costs": prepared.context.costs.model_dump(mode="json"),
        "plain_tokens_per_second": round(measured.tokens_per_second("plain"), 2),
        "rows": found,
        "unsteady": measured.unsteady,
        "verdicts": {row["method"]: verdict(row) for row in best_of_each(found) if verdict(row)},
    }


def prepare(name: str, options: argparse.Namespace) -> Prepared:
    """Load the model, let it write its texts, and measure what its sub-layers cost."""
    loaded = load(PATHS[name], device="cpu", dtype=options.dtype)
    calibration = read(calibration_prompts(), loaded, options)[: options.calibration]
    held_out = read(held_out_prompts(), loaded, options)
    judged, confirming = held_out[: options.prompts], held_out[options.prompts :][:CONFIRM_TEXTS]
    if not confirming:
        raise InputError(f"all {len(held_out)} held-out prompts would be judged on; leave some to confirm (--prompts)")
    start = perf_counter()
    texts = write(loaded, calibration, options.new_tokens)
    longest = max(map(len, texts)) + options.gamma_max + 1
    middle = round(sum(text.prompt + text.written / 2 for text in texts) / len(texts))
    profile = measure(loaded.model, calibration, gamma_max=options.gamma_max, contexts=[middle], slots=longest)
    context = Context(model=loaded.model, texts=texts, costs=profile.at(middle))
    return Prepared(
        loaded=loaded,
        calibration=calibration,
        confirming=confirming,
        judged=judged,
        context=context,
        replay=Replay(loaded.model, texts, options.gamma_max),
        seconds=perf_counter() - start,
    )


def read(path: Path, loaded: Loaded, options: argparse.Namespace) -> list[Tensor]:
    return load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=options.new_tokens)


def write(loaded: Loaded, prompts: Sequence[Tensor], new_tokens: int) -> list[Text]:
    written = dict(write_texts(Runtime(loaded.model), prompts, new_tokens))
    return [written[index] for index in range(len(prompts))]


def search_ours(prepared: Prepared, options: argparse.Namespace) -> Entry:
    """Our search, whose texts, profile and confirmation come out of the same budget."""
    plain_text = options.new_tokens * prepared.context.costs.rounds[0]
    confirming = (CONFIRMED + 1) * (CONFIRM_TEXTS * CONFIRM_REPEATS + 1) * plain_text
    settings = SearchSettings(
        trials=10**6,
        timeout=max(LEAST_SECONDS, options.budget / 2, options.budget - prepared.seconds - confirming),
        seed=options.seed,
        gamma_max=options.gamma_max,
        new_tokens=options.new_tokens,
        confirm=CONFIRMED,
        confirm_texts=len(prepared.confirming),
        repeats=CONFIRM_REPEATS,
        lookup=False,  # what is judged is the selection of sub-layers
    )
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
        sets=result.trials_complete + result.trials_pruned,
        seconds=seconds,
    )


@contextmanager
def no_cached_texts() -> Iterator[None]:
    """A search that writes its texts itself, whatever an earlier one left on the disk."""
    before = os.environ.get(CACHE_VARIABLE)
    with TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = empty
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before


def table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    shown = Table(
        title=f"{title}: greedy decoding of held-out prompts, one row; ratios with 95 % intervals",
        caption="Every rival's sets got the draft length and exit threshold that our replay finds best for them; "
        "of its two best by prediction, the faster one counts. Ours paid for texts, profile and confirmation.",
    )
    columns = ("", "skips", "gamma", "exit", "draft cost", "accepted", "tokens/round", "predicted", "speedup")
    for column in (*columns, "ours over it", "", "sets", "seconds", "differing"):
        shown.add_column(column, justify="left" if not column else "right")
    for row in found:
        shown.add_row(*cells(row), style="bold" if row["method"] == OURS else None)
    return shown


def cells(row: dict[str, Any]) -> list[str]:
    def interval(ratio: dict[str, float] | None) -> str:
        return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""

    return [
        row["name"],
        f"{len(row['skip_set']['attn'])} + {len(row['skip_set']['mlp'])}",
        str(row["gamma"]),
        f"{row['exit_threshold']:.2f}" if row["exit_threshold"] else "",
        f"{row['draft_cost']:.2f}" if row["draft_cost"] else "",
        f"{row['acceptance_rate']:.2f}" if row["acceptance_rate"] is not None else "",
        f"{row['tokens_per_round']:.2f}" if row["tokens_per_round"] is not None else "",
        f"{row['predicted_speedup']:.2f}",
        interval(row["speedup"]),
        interval(row["ours_over_it"]),
        verdict(row),
        str(row["sets"]),
        f"{row['selection_seconds']:.0f}",
        str(row["differing_tokens"]),
    ]


if __name__ == "__main__":
    main()
