"""Which method chooses the fastest skip set: our search, or a published method?

Every method selects on the same calibration prompts, within the same wall time, on the same core. Then all plans and
plain decoding take turns to decode held-out prompts: one row, greedy, in our runtime. SWIFT, CLaSp and KnapSpec select
again while they decode; here each of them gives one static plan.

The comparison favours the published methods. Our replay chooses the draft length of each of their skip sets, at no cost
to their budget. The two skip sets with the best predictions decode, and the faster one counts. They get texts and
profile for free; our search pays for texts, profile and confirmation. Prompt lookup is off. Prints a table; the last
line is JSON.

    python benchmarks/selection.py --out benchmarks/results/selection_cpu.json
    python benchmarks/selection.py --model demo --budget 40 --prompts 2 --repeats 1 --calibration 8 --new-tokens 48
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.machine import one_core
from common.record import Record, add_out, parser, run_script
from common.tables import figures_table, interval
from methods.judging import OURS, Entry, best_of_each, enter, judge, rows, verdict
from methods.ours import search_ours
from methods.prepared import prepare
from methods.published import METHODS
from rich.console import Console
from rich.table import Table

TITLES = {"demo": "LayerSkip-trained", "plain": "trained plainly"}
PATHS = {"demo": "demo", "plain": str(Path(__file__).parent / "plain_twin")}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record = Record("selection", options, threads=1)  # the embedded models are too small to gain from more
    console = Console(width=190)
    with one_core() as cores:
        models = [run_model(name, options, console) for name in (PATHS if options.model == "both" else [options.model])]
    return record.end("cpu", cores=cores, models=models)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", choices=[*PATHS, "both"], default="both", help="which embedded model")
    options.add_argument("--methods", nargs="+", choices=[*METHODS, OURS], default=[*METHODS, OURS], metavar="METHOD")
    options.add_argument("--budget", type=float, default=90.0, help="seconds of each method")
    options.add_argument("--calibration", type=int, default=32, help="prompts to select on")
    options.add_argument("--prompts", type=int, default=16, help="held-out prompts to measure on; others confirm")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--gamma-max", type=int, default=8, help="the longest draft, in tokens")
    options.add_argument("--dtype", default="float32")
    add_out(options)
    return options.parse_args(argv)


def run_model(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Select with every method, decode with all plans, and print the table."""
    prepared = prepare(PATHS[name], options)
    if OURS in options.methods:
        prepared.bill.left_of(options.budget)  # fails before the other methods run
    entries: list[Entry] = []
    for method in options.methods:
        if method == OURS:
            new = [search_ours(prepared, options.budget)]
        else:
            select = METHODS[method]
            new = enter(method, select, prepared.context, prepared.replay, options.budget, options.seed)
        console.print(f"{TITLES[name]}: {method} took {new[0].seconds:.1f} s of {options.budget:g}: {new[0].plan}")
        entries += new
    model = prepared.loaded.model
    measured = judge(model, entries, prepared.judged, new_tokens=options.new_tokens, repeats=options.repeats)
    found = rows(measured, entries, prepared.context)
    console.print(table(TITLES[name], found))
    return {
        "model": name,
        "title": TITLES[name],
        "bill_s": {item: round(seconds, 3) for item, seconds in asdict(prepared.bill).items()},
        "costs": prepared.context.costs.model_dump(mode="json"),
        "plain_tokens_per_second": round(measured.tokens_per_second("plain"), 2),
        "rows": found,
        "unsteady": measured.unsteady,
        "verdicts": {row["method"]: verdict(row) for row in best_of_each(found) if verdict(row)},
    }


def table(title: str, found: Sequence[dict[str, Any]]) -> Table:
    columns = ("", "skips", "gamma", "draft cost", "accepted", "tokens/round", "predicted", "speedup")
    shown = figures_table(
        f"{title}: greedy decoding of held-out prompts, one row; ratios with 95 % intervals",
        (*columns, "ours over it", "", "tried", "offered", "seconds", "differing"),
        caption="Our replay chose the draft length of every rival's skip sets; of its two best by prediction, the "
        "faster one counts. Our search paid for texts, profile and confirmation.",
    )
    for row in found:
        shown.add_row(*cells(row), style="bold" if row["method"] == OURS else None)
    return shown


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{len(row['skip_set']['attn'])} + {len(row['skip_set']['mlp'])}",
        str(row["gamma"]),
        f"{row['draft_cost']:.2f}" if row["draft_cost"] else "",
        f"{row['acceptance_rate']:.2f}" if row["acceptance_rate"] is not None else "",
        f"{row['tokens_per_round']:.2f}" if row["tokens_per_round"] is not None else "",
        f"{row['predicted_speedup']:.2f}",
        interval(row["speedup"]),
        interval(row["ours_over_it"]),
        verdict(row),
        "" if row["tried"] is None else str(row["tried"]),
        str(row["offered"]),
        f"{row['selection_seconds']:.0f}",
        str(row["differing_tokens"]),
    ]


if __name__ == "__main__":
    run_script(main)
