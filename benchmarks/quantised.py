"""What do quantised drafts bring: how often are they right, what do they cost, and how much faster is decoding?

Self-speculation is as good as its draft is right and cheap. Skipping sub-layers alone leaves a draft at half the cost
of the model; running them in 4 bits costs a quarter, on processors whose passes are bound by reading weights, and is
right more often. Three parts, each a command of its own:

    python benchmarks/quantised.py bits       # the embedded model, float32: agreement by bits, by skips, by both
    python benchmarks/quantised.py cpu        # one billion parameters, bfloat16: passes, and decoding at set agreements
    python benchmarks/quantised.py gpu        # 8 and 32 billion, and the model of benchmarks/midsize.py end to end

`bits` is exact: replay gives for every position what a draft would have guessed. In `cpu` and in `gpu` weights are
random, so *time is real and agreement is set*; the trained model of `gpu` has everything real. Speedups are over the
faster of two ways to decode plainly: passes of one token, and passes padded to the length that is the fastest here.
Prints tables; the last line is JSON. `--toy` runs the same code in seconds.
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
"""By part, and whether it is a toy, which is too small to gain from more."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    threads = getattr(options, "threads", None) or DEFAULT_THREADS.get((options.part, options.toy))
    record = Record("quantised", options, threads=threads)
    measured = PARTS[options.part](options, Console(width=150))
    return record.end(measured.pop("device", "cpu"), part=options.part, **measured)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of one part; those left out are None, and the part has its own."""
    options = parser(__doc__)
    parts = options.add_subparsers(dest="part", required=True, metavar="bits|cpu|gpu")
    bits = parts.add_parser("bits", help="what rounding and skipping cost in agreement, on the embedded model")
    cpu = parts.add_parser("cpu", help="what quantised drafts bring a model of one billion parameters on a CPU")
    gpu = parts.add_parser("gpu", help="the same on a GPU, for 8 and 32 billion, and a trained model end to end")
    for part in (bits, cpu, gpu):
        part.add_argument("--toy", action="store_true", help="toy sizes, to try the code; its figures mean nothing")
        part.add_argument("--prompts", type=int, help="how many are decoded")
        part.add_argument("--new-tokens", type=int, help="tokens written after each")
        part.add_argument("--seed", type=int, default=0)
        add_out(part)
    bits.add_argument("--threads", type=int, default=1, help="of PyTorch; replay shares the cores by itself")
    cpu.add_argument("--threads", type=int, help="by default 2; 1 for --toy")
    for part in (cpu, gpu):
        part.add_argument("--repeats", type=int, help="of every timed decoding")
        part.add_argument("--budget", type=float, help="seconds for all stages together")
    gpu.add_argument("--device", help="by default CUDA; the CPU for --toy")
    gpu.add_argument(
        "--only", nargs="+", choices=SUBJECTS, help="some of its subjects, where there is not time for all"
    )
    gpu.add_argument("--formats", nargs="+", choices=FORMATS, help="of the drafts of random weights; by default all")
    gpu.add_argument("--midsize", type=Path, default=default_folder(), help="what benchmarks/midsize.py wrote")
    return options.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
