"""How fast is decoding with a searched plan, against the plain model and the peers?

Greedy decoding of held-out prompts, one row. The decoders take turns in one process: the plain model in our runtime,
`model.generate`, `assistant_early_exit` at its best exit layer, prompt lookup, and ours. Without `--plan`, a search on
other prompts finds the plan first. Prints a table; the last line is JSON.

    python benchmarks/decode.py                         # embedded model, float32, one thread
    python benchmarks/decode.py --compile               # the same with compiled passes
    python benchmarks/decode.py --no-lookup             # drafts by layers only
    python benchmarks/decode.py --model DIR --calibration FILE --held-out FILE --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from common.prompts import read
from common.record import Record, add_out, parser, run_script
from common.tables import print_search, scores_table
from rich.console import Console
from selfspec_search import SearchResult, SearchSettings, search
from selfspec_search.settings import DraftName
from torch import Tensor

from selfspec import InputError, Plan
from selfspec.benchmark.contenders import line_up
from selfspec.benchmark.measure import measure
from selfspec.decode_options import DecodeOptions, PolicyName
from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.huggingface.loading import Loaded, load


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record, console = Record("decode", options, threads=options.threads), Console(width=140)
    loaded = load(options.model, device=options.device, dtype=options.dtype)
    held_out = read(options.held_out or held_out_prompts(), loaded, options.new_tokens)
    measured_on, confirming = held_out[: options.prompts], held_out[options.prompts :]
    found = None if options.plan else find_plan(loaded, confirming, options)
    plan = found.plan if found else Plan.from_pretrained(options.plan)
    how = DecodeOptions(compile=options.compile, policy=options.policy)
    lined_up = line_up(loaded.model, plan, measured_on, options.new_tokens, how)
    measured = measure(lined_up.contenders, measured_on, new_tokens=options.new_tokens, repeats=options.repeats)
    scores = measured.scores(lined_up.ours.runtime, gamma=plan.longest_draft)
    console.print(scores_table(scores))
    if found:
        print_search(console, found)
    return record.end(
        options.device,
        backend=lined_up.ours.runtime.backend.backend.name,
        plan=json.loads(plan.to_json()),
        baseline=measured.baseline,
        scores=[score.to_dict() for score in scores],
        absent=lined_up.absent,
        unsteady=measured.unsteady,
        **({"replay_equals_decoding_in_every_round": found.rounds_equal} if found else {}),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", default="demo", help="'demo', a directory or a hub id")
    options.add_argument("--plan", help="a plan to measure; without one, search")
    options.add_argument("--calibration", type=Path, help="file of prompts to search on")
    options.add_argument("--held-out", type=Path, help="file of prompts to measure and to confirm on")
    options.add_argument(
        "--prompts", type=int, default=16, help="held-out prompts to measure; the search confirms on the others"
    )
    options.add_argument("--trials", type=int, default=150)
    options.add_argument("--gamma-max", type=int, default=8, help="the longest draft that the search considers")
    options.add_argument(
        "--lookup", action=argparse.BooleanOptionalAction, default=True, help="let prompt lookup take part"
    )
    options.add_argument("--draft", choices=get_args(DraftName), default="both", help="what drafts may do")
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    options.add_argument(
        "--threads", type=int, default=1, help="threads of PyTorch; the embedded model is too small to gain from more"
    )
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options.add_argument("--policy", choices=get_args(PolicyName), default="adaptive")
    add_out(options)
    return options.parse_args(argv)


def find_plan(loaded: Loaded, confirming: list[Tensor], options: argparse.Namespace) -> SearchResult:
    """Search on calibration prompts, and confirm on held-out prompts that are not measured."""
    if not confirming:
        raise InputError(f"--prompts is {options.prompts}, which leaves no held-out prompt to confirm on; give fewer")
    settings = SearchSettings(
        draft=options.draft,
        trials=options.trials,
        seed=options.seed,
        compile=options.compile,
        new_tokens=options.new_tokens,
        gamma_max=options.gamma_max,
        lookup=options.lookup,
    )
    calibration = read(options.calibration or calibration_prompts(), loaded, options.new_tokens)
    return search(loaded.model, calibration, confirming, settings)


if __name__ == "__main__":
    run_script(main)
