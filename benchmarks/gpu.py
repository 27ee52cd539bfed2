"""How near to the device's limits does decoding come, plainly and with drafts, on a real model and at real sizes?

Ceilings first: copy bandwidth and a large matrix product. Then models of big shapes with random weights, where how
often a draft is right is set (*time real, agreement set*): plain decoding as a share of the bandwidth limit, ours
against plain and against the ideal, Hugging Face's ways in one cell, and a full search; and a trained mid-size model
end to end, if `benchmarks/midsize.py` made one. Stages come in the order of their importance; one for which the time
left is not enough is left out, and named. Prints tables; the last line is JSON.

    python benchmarks/midsize.py && python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --toy                      # the same code at toy sizes, on a CPU
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decode import commit, device_name, warn_if_dirty
from devices import device_of
from gpu_bench.run import REAL_RUN, TOY_RUN, Run
from midsize import default_folder
from rich.console import Console

from selfspec import SelfspecError
from selfspec.huggingface.loading import quiet_hugging_face, versions


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv), commit()  # of now: the tree may change while this runs
    if options.out:
        warn_if_dirty(code)
    quiet_hugging_face()
    device = device_of(options.device, toy=options.toy)
    run = Run(
        extent=TOY_RUN if options.toy else REAL_RUN,
        device=device,
        midsize=options.midsize,
        seed=options.seed,
        seconds=options.budget,
        console=Console(width=190),
    )
    measured = run.measure()
    result = {
        "benchmark": "gpu",
        "commit": code,
        "device": device_name(str(device)),
        "driver": driver() if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        **measured,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1, default=str) + "\n", "utf8")
    print(json.dumps(result, default=str))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--toy", action="store_true", help="toy sizes, to try the code; its figures mean nothing")
    parser.add_argument("--device", help="by default CUDA; the CPU for --toy")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all stages together")
    parser.add_argument("--midsize", type=Path, default=default_folder(), help="what benchmarks/midsize.py wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the JSON here too")
    return parser.parse_args(argv)


def driver() -> str:
    """The NVIDIA driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else "unknown"


if __name__ == "__main__":
    try:
        stages = main()["stages"]
    except SelfspecError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any(stage["status"] == "failed" for stage in stages) else 0)
