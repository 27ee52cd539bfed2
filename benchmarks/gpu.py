"""How close does decoding come to the device's limits, with and without drafts, at real model sizes?

The script first measures copy bandwidth and a large matrix product. Then it decodes models of real sizes with random
weights: times are real, and the draft's agreement is set (*time real, agreement set*). It reports plain decoding as a
share of the bandwidth limit, our speedup over plain decoding and over the ideal, Hugging Face's decoders in one cell,
and a full search. The most important stages run first; a stage that does not fit into the time left is skipped and
named. Prints tables; the last line is JSON.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --toy                      # the same code at toy sizes, on a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common.machine import device_of
from common.record import Record, add_out, parser, run_script
from rich.console import Console
from shapes.gpu_run import REAL_RUN, TOY_RUN, Run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    record, device = Record("gpu", options), device_of(options.device, toy=options.toy)
    run = Run(
        extent=TOY_RUN if options.toy else REAL_RUN,
        device=device,
        seed=options.seed,
        seconds=options.budget,
        console=Console(width=190),
    )
    return record.end(device, **run.measure())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--toy", action="store_true", help="toy sizes, to try the code; the figures mean nothing")
    options.add_argument("--device", help="by default CUDA; the CPU for --toy")
    options.add_argument("--budget", type=float, default=570.0, help="seconds for all stages together")
    add_out(options)
    return options.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
