"""Who should draft? Prompt lookup, layer skipping, a cascade of both, or whoever the policy chooses.

Four workloads for the embedded model (`drafters_bench/workloads.py`), each decoded greedily by every drafter in turn,
in one process: fixed ones at the best settings that a search on other prompts finds for them, and the adaptive one,
which starts from the plan that this search writes. What counts is judged twice: priced (what was decoded, by counts, at
prices measured once: no noise) and measured (medians, with 95 % intervals by bootstrap). Batches of many rows are
against plain decoding of the same batch. Prints tables; the last line is JSON.

    python benchmarks/drafters.py                              # half an hour, one thread
    python benchmarks/drafters.py --prompts 3 --trials 5 --repeats 1 --rows 1 4      # the same code, in a minute or two
    python benchmarks/drafters.py --device cuda                                      # captured and compiled
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from cache import no_cached_texts
from decode import commit, device_name, warn_if_dirty
from drafters_bench.plans import Plans, find_plans
from drafters_bench.run import ADAPTIVE, enter, many_rows, one_row, overhead, plan_lines
from drafters_bench.workloads import CODE, EDITING, WORKLOADS
from selfspec_search import SearchSettings

from selfspec.benchmark.contenders import GENERATE, PROMPT_LOOKUP
from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.huggingface.loading import Loaded, load, quiet_hugging_face, versions
from selfspec.huggingface.prompts import load_prompts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv), commit()
    if options.out:
        warn_if_dirty(code)
    console = Console(width=140)
    quiet_hugging_face()
    torch.set_num_threads(options.threads)
    loaded = load("demo", device=options.device, dtype=options.dtype)
    plans = search_plans(loaded, options)
    entrants = enter(loaded, plans, options.rows)
    for name, words in plan_lines(entrants.specs).items():
        console.print(f"{name}: {words}", soft_wrap=True, highlight=False)
    results = []
    for workload in WORKLOADS:
        result = one_row(
            loaded, entrants, workload, options.prompts, options.new_tokens, options.repeats, peers=workload is EDITING
        )
        results.append(result)
        show(console, result)
    for rows in options.rows[1:]:
        for workload in WORKLOADS:
            results.append(many_rows(loaded, entrants, workload, rows, options.new_tokens, options.batch_repeats))
            show(console, results[-1])
    thinking = overhead(
        loaded, entrants.specs[ADAPTIVE], CODE.prompts(loaded, min(4, options.prompts)), options.new_tokens
    )
    console.print(f"the policy's own thinking takes {thinking:.1%} of the time of its rounds")
    found = {
        "benchmark": "drafters",
        "commit": code,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "plans": plan_lines(entrants.specs),
        "round_costs": {
            rows: round_costs.model_dump(mode="json") for rows, round_costs in entrants.round_costs.items()
        },
        "results": results,
        "policy_overhead": round(thinking, 4),
    }
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n", "utf8")
    print(json.dumps(found))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=12, help="of each workload")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="of every decoding of one row")
    parser.add_argument("--batch-repeats", type=int, default=3, help="of every batch")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="1, then the batches to measure")
    parser.add_argument("--trials", type=int, default=100, help="of the search")
    parser.add_argument("--calibration", type=int, default=64, help="prompts that the search compares plans on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="write the JSON here too")
    options = parser.parse_args(argv)
    if options.rows[0] != 1 or options.rows != sorted(set(options.rows)):
        parser.error(f"--rows is {options.rows}, but it must begin with 1 and rise")
    return options


def search_plans(loaded: Loaded, options: argparse.Namespace) -> Plans:
    """Plans for the embedded model, found on its own prompts."""
    calibration, held_out = (
        load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=options.new_tokens)
        for path in (calibration_prompts(), held_out_prompts())
    )
    settings = SearchSettings(draft="skip", trials=options.trials, seed=options.seed, new_tokens=options.new_tokens)
    with no_cached_texts():
        return find_plans(loaded.model, calibration[: options.calibration], held_out[1::2], settings)


def show(console: Console, result: dict[str, Any]) -> None:
    """One workload's table, and what it says of the adaptive one."""
    title = f"{result['workload']}, {result['rows']} row{'s' if result['rows'] > 1 else ''}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("drafter")
    for heading in ("tokens/round", "acceptance", "x plain, priced", "x plain, measured (95 %)", "differing"):
        table.add_column(heading, justify="right")
    for name, line in result["drafters"].items():
        ratio = line["measured"]
        table.add_row(
            name,
            f"{line['tokens_per_round']:.2f}",
            f"{line['acceptance_rate']:.0%}" if line["acceptance_rate"] else "",
            f"{line['priced']:.2f}",
            f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            str(line["differing"]),
        )
    console.print(table)
    over = result["adaptive_over_best_fixed_priced"]
    console.print(f"adaptive over the best fixed one ({result['best_fixed']}), priced: {over:.3f}")
    for peer in (GENERATE, PROMPT_LOOKUP):
        if peer in result:
            console.print(f"{peer} {result[peer]['settings']}: {result[peer]['against_plain']}")
            console.print(f"adaptive over {peer}: {result[f'adaptive_over_{peer}']}")


if __name__ == "__main__":
    main()
