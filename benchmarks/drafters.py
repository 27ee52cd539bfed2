"""Which drafter is fastest: prompt lookup, layer skipping, a cascade of both, or the policy's choice per round?

Four workloads for the embedded model (`workloads/workload.py`). Every drafter decodes them greedily, in turn, in one
process. A search on other prompts gives each fixed drafter its best settings, and gives the adaptive policy its plan.
Each speedup over plain decoding of the same batch is reported twice. *Priced*: counted passes times costs measured
once, so without noise. *Measured*: the median time, with a 95 % bootstrap interval. Prints tables; the last line is
JSON.

    python benchmarks/drafters.py                              # half an hour, one thread
    python benchmarks/drafters.py --prompts 3 --trials 5 --repeats 1 --rows 1 4      # the same code in two minutes
    python benchmarks/drafters.py --device cuda                                      # rounds captured and compiled
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common.machine import no_cached_texts
from common.prompts import embedded
from common.record import Record, add_out, parser, run_script
from common.tables import figures_table, interval
from rich.console import Console
from selfspec_search import SearchSettings
from workloads.drafting import enter, many_rows, one_row, plan_lines
from workloads.plans import Plans, find_plans
from workloads.workload import EDITING, WORKLOADS

from selfspec.benchmark.contenders import GENERATE, PROMPT_LOOKUP
from selfspec.huggingface.loading import Loaded, load


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record, console = Record("drafters", options, threads=options.threads), Console(width=140)
    loaded = load("demo", device=options.device, dtype=options.dtype)
    entrants = enter(loaded, search_plans(loaded, options), options.rows)
    for name, words in plan_lines(entrants.specs).items():
        console.print(f"{name}: {words}", soft_wrap=True, highlight=False)
    results = []
    for rows in options.rows:
        for workload in WORKLOADS:
            if rows == 1:
                sizes = options.prompts, options.new_tokens, options.repeats
                results.append(one_row(loaded, entrants, workload, *sizes, peers=workload is EDITING))
            else:
                sizes = rows, options.new_tokens, options.batch_repeats
                results.append(many_rows(loaded, entrants, workload, *sizes))
            show(console, results[-1])
    return record.end(
        options.device,
        plans=plan_lines(entrants.specs),
        round_costs={rows: round_costs.model_dump(mode="json") for rows, round_costs in entrants.round_costs.items()},
        results=results,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=12, help="prompts of each workload")
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--repeats", type=int, default=3, help="timed decodings of each prompt alone")
    options.add_argument("--batch-repeats", type=int, default=3, help="timed decodings of each batch")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="batch sizes to measure, 1 first")
    options.add_argument("--trials", type=int, default=100, help="trials of the search")
    options.add_argument("--calibration", type=int, default=64, help="prompts that the search runs on")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    add_out(options)
    given = options.parse_args(argv)
    if given.rows[0] != 1 or given.rows != sorted(set(given.rows)):
        options.error(f"--rows is {given.rows}, but batch sizes must begin with 1 and rise")
    return given


def search_plans(loaded: Loaded, options: argparse.Namespace) -> Plans:
    """Plans for the embedded model, found on its own prompts."""
    calibration, held_out = embedded(loaded, options.new_tokens)
    settings = SearchSettings(draft="skip", trials=options.trials, seed=options.seed, new_tokens=options.new_tokens)
    with no_cached_texts():
        return find_plans(loaded.model, calibration[: options.calibration], held_out[1::2], settings)


def show(console: Console, result: dict[str, Any]) -> None:
    """Print one workload's table, and the policy against the best fixed drafter."""
    table = figures_table(
        f"{result['workload']}, {result['rows']} row{'s' if result['rows'] > 1 else ''}",
        ("drafter", "tokens/round", "acceptance", "x plain, priced", "x plain, measured (95 %)", "differing"),
    )
    for name, line in result["drafters"].items():
        table.add_row(
            name,
            f"{line['tokens_per_round']:.2f}",
            f"{line['acceptance_rate']:.0%}" if line["acceptance_rate"] else "",
            f"{line['priced']:.2f}",
            interval(line["measured"]),
            str(line["differing"]),
        )
    console.print(table)
    over = result["adaptive_over_best_fixed_priced"]
    console.print(f"adaptive over the best fixed drafter ({result['best_fixed']}), priced: {over:.3f}")
    for peer in (GENERATE, PROMPT_LOOKUP):
        if peer in result:
            console.print(f"{peer} {result[peer]['settings']}: {result[peer]['against_plain']}")
            console.print(f"adaptive over {peer}: {result[f'adaptive_over_{peer}']}")


if __name__ == "__main__":
    run_script(main)
