"""How fast is decoding with a searched plan, against the plain model and the peers?

Greedy decoding of held-out prompts, one row, everything interleaved in one process: the plain model in our runtime,
`model.generate`, `assistant_early_exit` at its best exit layer, prompt lookup, and ours. The plan is searched first, on
other prompts, unless one is given. Prints a table; the last line is JSON.

    python benchmarks/decode.py                         # embedded model, float32, one thread
    python benchmarks/decode.py --compile               # the same with compiled passes
    python benchmarks/decode.py --no-lookup             # the draft skips layers and never looks prompts up
    python benchmarks/decode.py --model DIR --calibration FILE --held-out FILE --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from rich.console import Console
from selfspec_search import SearchResult, SearchSettings, search
from selfspec_search.settings import DraftName

from selfspec import InputError, Plan
from selfspec.benchmark.contenders import GENERATE, PLAIN, LineUp, line_up
from selfspec.benchmark.measure import Measurement, Score, measure
from selfspec.cli.bench import print_scores
from selfspec.cli.formatting import report_search
from selfspec.decode_options import DecodeOptions, PolicyName
from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.huggingface.loading import Loaded, load, processor_name, quiet_hugging_face, versions
from selfspec.huggingface.prompts import load_prompts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv), commit()  # of now: the tree may change while this runs
    if options.out:
        warn_if_dirty(code)
    console = Console(width=140)
    quiet_hugging_face()
    torch.set_num_threads(options.threads)
    loaded = load(options.model, device=options.device, dtype=options.dtype)
    model = loaded.model
    held_out = read(options.held_out or held_out_prompts(), loaded, options)
    held_out, confirming = held_out[: options.prompts], held_out[options.prompts :]  # what is measured stays unseen
    found = None
    if not options.plan and not confirming:
        raise InputError(f"all {len(held_out)} held-out prompts would be measured; leave some to confirm (--prompts)")
    if not options.plan:
        calibration = read(options.calibration or calibration_prompts(), loaded, options)
        found = find_plan(model, calibration, confirming, options)
    plan = found.plan if found else Plan.from_pretrained(options.plan)
    lined_up = line_up(
        model, plan, held_out, options.new_tokens, DecodeOptions(compile=options.compile, policy=options.policy)
    )
    measured = measure(lined_up.contenders, held_out, new_tokens=options.new_tokens, repeats=options.repeats)
    scores = measured.scores(lined_up.ours.runtime, against=(PLAIN, GENERATE), gamma=plan.longest_draft)
    print_scores(console, scores)
    if found:
        report_search(console, found)
    console.print(f"plan: {plan}")
    result = {"benchmark": "decode", "commit": code, **to_json(options, plan, lined_up, measured, scores)}
    if found:
        result["replay_equals_decoding_in_every_round"] = found.rounds_equal
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1, default=str) + "\n", "utf8")
    print(json.dumps(result, default=str))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="'demo', a directory or a hub id")
    parser.add_argument("--plan", help="a plan to measure; without one, search")
    parser.add_argument("--calibration", type=Path, help="prompts to search on")
    parser.add_argument("--held-out", type=Path, help="prompts to decode")
    parser.add_argument(
        "--prompts", type=int, default=16, help="how many held-out prompts to measure; the others confirm"
    )
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--gamma-max", type=int, default=8, help="the longest draft that the search considers")
    parser.add_argument(
        "--lookup", action=argparse.BooleanOptionalAction, default=True, help="let prompt lookup take part"
    )
    parser.add_argument("--draft", choices=get_args(DraftName), default="both", help="what drafts may do")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="the embedded model is too small to gain from more")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--policy", choices=get_args(PolicyName), default="adaptive")
    parser.add_argument("--out", help="write the JSON here too")
    return parser.parse_args(argv)


def read(path: Path, loaded: Loaded, options: argparse.Namespace) -> list[torch.Tensor]:
    return load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=options.new_tokens)


def find_plan(
    model: transformers.PreTrainedModel,
    calibration: list[torch.Tensor],
    confirming: list[torch.Tensor],
    options: argparse.Namespace,
) -> SearchResult:
    settings = SearchSettings(
        draft=options.draft,
        trials=options.trials,
        seed=options.seed,
        compile=options.compile,
        new_tokens=options.new_tokens,
        gamma_max=options.gamma_max,
        lookup=options.lookup,
    )
    return search(model, calibration, confirming, settings)


def to_json(
    options: argparse.Namespace, plan: Plan, lined_up: LineUp, measured: Measurement, scores: Sequence[Score]
) -> dict[str, Any]:
    return {
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "backend": lined_up.ours.runtime.backend.backend.name,
        "plan": json.loads(plan.to_json()),
        "scores": [score.to_dict() for score in scores],
        "absent": lined_up.absent,
        "unsteady": measured.unsteady,
    }


def commit() -> str:
    """The commit that was measured, with a mark if the tree differed from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def warn_if_dirty(code: str) -> None:
    """Results that are kept should name the code that they came from."""
    if code.endswith("-dirty"):
        print(f"warning: the tree differs from its commit; the results will name '{code}'", file=sys.stderr)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor_name()


if __name__ == "__main__":
    main()
