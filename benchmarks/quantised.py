"""What do quantised drafts gain: their agreement, their cost, and the speedup of decoding?

A draft that only skips sub-layers costs half of the model. A draft in 4 bits costs a quarter of the model where reading
weights bounds a pass, and agrees more often. Three parts, each a command:

    python benchmarks/quantised.py bits       # the embedded model, float32: agreement by bits, by skips, by both
    python benchmarks/quantised.py cpu        # one billion parameters, bfloat16: passes, and decoding at set agreements
    python benchmarks/quantised.py gpu        # 8 and 32 billion, and the model of benchmarks/midsize.py end to end

`bits` is exact: replay computes the draft's guess at every position. `cpu` and `gpu` use random weights: *time real,
agreement set*; the trained model of `gpu` has real agreement as well. Speedups are over the faster plain decoding: with
passes over one token, or with passes padded to the fastest length. Prints tables; the last line is JSON. `--toy` runs
the same code in seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.record import Record, add_out, parser, run_script
from midsize import default_folder
from rich.console import Console
from shapes import bits
from shapes.quantised_run import FORMATS, SUBJECTS, measure_on_cpu, measure_on_gpu

PARTS = {"bits": bits.measure, "cpu": measure_on_cpu, "gpu": measure_on_gpu}
DEFAULT_THREADS = {("cpu", False): 2, ("cpu", True): 1, ("gpu", True): 1}
"""Threads by part and by `--toy`: toy sizes gain nothing from more threads."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    threads = getattr(options, "threads", None) or DEFAULT_THREADS.get((options.part, options.toy))
    record = Record("quantised", options, threads=threads)
    measured = PARTS[options.part](options, Console(width=150))
    return record.end(measured.pop("device", "cpu"), part=options.part, **measured)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of one part. None stands for the default of that part."""
    options = parser(__doc__)
    parts = options.add_subparsers(dest="part", required=True, metavar="bits|cpu|gpu")
    bits = parts.add_parser("bits", help="agreement of rounded and skipping drafts, on the embedded model")
    cpu = parts.add_parser("cpu", help="speedup by quantised drafts of a model of one billion parameters, on a CPU")
    gpu = parts.add_parser(
        "gpu", help="the same on a GPU, for 8 and 32 billion parameters, and a trained model end to end"
    )
    for part in (bits, cpu, gpu):
        part.add_argument("--toy", action="store_true", help="toy sizes, to try the code; the figures mean nothing")
        part.add_argument("--prompts", type=int, help="prompts to decode")
        part.add_argument("--new-tokens", type=int, help="tokens to write after each prompt")
        part.add_argument("--seed", type=int, default=0)
        add_out(part)
    bits.add_argument("--threads", type=int, default=1, help="threads of PyTorch; replay uses all cores anyway")
    cpu.add_argument("--threads", type=int, help="threads of PyTorch; by default 2, and 1 for --toy")
    for part in (cpu, gpu):
        part.add_argument("--repeats", type=int, help="repeats of every timed decoding")
        part.add_argument("--budget", type=float, help="seconds for all stages together")
    gpu.add_argument("--device", help="by default CUDA; the CPU for --toy")
    gpu.add_argument("--only", nargs="+", choices=SUBJECTS, help="measure these models only")
    gpu.add_argument("--formats", nargs="+", choices=FORMATS, help="formats of the drafts; by default all")
    gpu.add_argument("--midsize", type=Path, default=default_folder(), help="folder that benchmarks/midsize.py wrote")
    return options.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
