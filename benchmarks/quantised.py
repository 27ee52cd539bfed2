"""What do quantised drafts bring: how often are they right, what do they cost, and how much faster is decoding?

Self-speculation is as good as its draft is right and cheap. Skipping sub-layers alone leaves a draft at half the cost
of the model; running them in 4 bits costs a quarter, on processors whose passes are bound by reading weights, and is
right more often. Three parts, each a command of its own:

    python benchmarks/quantised.py bits       # the embedded model, float32: agreement by bits, by skips, by both
    python benchmarks/quantised.py cpu        # one billion parameters, bfloat16: passes, and decoding at set agreements
    python benchmarks/quantised.py gpu        # 8 and 32 billion, and the model of benchmarks/midsize.py end to end

`bits` is exact: replay tells for every position what a draft would have guessed. In `cpu` and in `gpu` weights are
random, so *time is real and agreement is set*; the trained model of `gpu` has everything real. Speedups are over the
faster of two ways to decode plainly: passes of one token, and passes padded to the length that is the fastest here.
Prints tables; the last line is JSON. `--toy` runs the same code in seconds.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
from decode import commit, device_name, warn_if_dirty
from quantised_bench import bits, cpu, gpu
from quantised_bench.options import parse
from rich.console import Console

from selfspec import SelfspecError
from selfspec.huggingface.loading import quiet_hugging_face, versions

PARTS = {"bits": bits.measure, "cpu": cpu.measure, "gpu": gpu.measure}
DEFAULT_THREADS = {("cpu", False): 2, ("cpu", True): 1, ("gpu", True): 1}
"""By part, and whether it is a toy, which is too small to gain from more."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv, (__doc__ or "").splitlines()[0]), commit()  # of now: the tree may change meanwhile
    if options.out:
        warn_if_dirty(code)
    quiet_hugging_face()
    if threads := getattr(options, "threads", None) or DEFAULT_THREADS.get((options.part, options.toy)):
        torch.set_num_threads(threads)
    measured = PARTS[options.part](options, Console(width=150))
    result = {
        "benchmark": "quantised",
        "part": options.part,
        "commit": code,
        "device": device_name(str(measured.pop("device", "cpu"))),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        **measured,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf8")
    print(json.dumps(result, default=str))
    return result


if __name__ == "__main__":
    try:
        stages = main().get("stages", [])
    except SelfspecError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any(stage["status"] == "failed" for stage in stages) else 0)
