"""Options: what each part of the benchmark may be told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from midsize import default_folder

from quantised_bench.gpu import FORMATS, SUBJECTS


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Options of one part; those left out are None, and the part has its own."""
    parser = argparse.ArgumentParser(description=description)
    parts = parser.add_subparsers(dest="part", required=True, metavar="bits|cpu|gpu")
    bits = parts.add_parser("bits", help="what rounding and skipping cost in agreement, on the embedded model")
    cpu = parts.add_parser("cpu", help="what quantised drafts bring a model of one billion parameters on a CPU")
    gpu = parts.add_parser("gpu", help="the same on a GPU, for 8 and 32 billion, and a trained model end to end")
    for part in (bits, cpu, gpu):
        _add_common(part)
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
    return parser.parse_args(argv)


def _add_common(part: argparse.ArgumentParser) -> None:
    part.add_argument("--toy", action="store_true", help="toy sizes, to try the code; its figures mean nothing")
    part.add_argument("--prompts", type=int, help="how many are decoded")
    part.add_argument("--new-tokens", type=int, help="tokens written after each")
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--out", type=Path, help="write the JSON here too")
