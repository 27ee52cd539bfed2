"""What looks prompts up best: a scan of the context, an index of runs of tokens, or a suffix automaton?

Where reading the device would stall it, the runtime compares every row's last tokens with all of its context at once,
in a dozen operations (`selfspec.drafting.latest_match`); elsewhere it keeps an index of all runs of up to 8 committed
tokens (`NgramIndex`). A suffix automaton knows the longest match of any length. What does each take a round, and do
matches of more than 8 tokens bring anything? Prints tables; the last line is JSON.

    python benchmarks/suffix.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from decode import commit, device_name, warn_if_dirty
from drafters_bench.suffix_automaton import SuffixAutomaton
from drafters_bench.workloads import WORKLOADS, endless

from selfspec import Plan, SelfSpeculator
from selfspec.drafting import latest_match
from selfspec.drafting.lookup import NgramIndex
from selfspec.loading import load, quiet_hugging_face

SCANNED = 8
"""Tokens of a match that the runtime tells from a shorter one."""
LENGTHS = (8, 16, 32, 1000)
"""The longest matches that are tried."""
DRAFT, LEAST = 16, 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", help="write the JSON here too")
    options, code = parser.parse_args(argv), commit()
    if options.out:
        warn_if_dirty(code)
    quiet_hugging_face()
    torch.set_num_threads(1)
    texts = written()
    times = [time_at(texts["mixed"], rows, context, options.repeats) for rows in (1, 16, 64) for context in (400, 4000)]
    longer = {name: tokens_per_round(some) for name, some in texts.items()}
    show(Console(width=120), times, longer)
    found = {
        "benchmark": "suffix",
        "commit": code,
        "device": device_name("cpu"),
        "threads": 1,
        "microseconds_a_round": times,
        "tokens_per_round_by_longest_match": longer,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n", "utf8")
    print(json.dumps(found))
    return found


def written() -> dict[str, list[tuple[list[int], int]]]:
    """By workload, what the embedded model writes behind each prompt: all tokens, and how many are the prompt's."""
    loaded = load("demo", device="cpu", dtype="float32")
    spec = SelfSpeculator(loaded.model, Plan.none())
    texts: dict[str, list[tuple[list[int], int]]] = {}
    for workload in WORKLOADS:
        texts[workload.name] = [
            (spec.generate(p[None], max_new_tokens=128, do_sample=False, **endless(loaded))[0].tolist(), len(p))
            for p in workload.prompts(loaded)
        ]
    return texts


def time_at(texts: Sequence[tuple[list[int], int]], rows: int, context: int, repeats: int) -> dict[str, Any]:
    """Median microseconds of a round's look-up in every row, three tokens being committed a round."""
    joined = [token for tokens, _ in texts for token in tokens]
    every = [[*joined[17 * row :], *joined, *joined][:context] for row in range(rows)]
    sequences, nothing = torch.tensor(every), torch.zeros(rows, dtype=torch.long)
    ends = torch.full((rows,), context)
    automata, indices = [SuffixAutomaton(tokens) for tokens in every], [NgramIndex(SCANNED) for _ in every]
    coming = iter(joined * 1000)
    for index, tokens in zip(indices, every, strict=True):
        index.extend(tokens)

    def append() -> None:
        for automaton in automata:
            for _ in range(3):
                automaton.append(next(coming))

    def extend() -> None:
        for index in indices:
            index.extend([next(coming) for _ in range(3)])

    return {
        "rows": rows,
        "context": context,
        "scan": microseconds(lambda: latest_match(sequences, nothing, ends, SCANNED), repeats),
        "index": microseconds(extend, min(repeats, 50)),
        "automaton": microseconds(append, min(repeats, 50)),
    }


def microseconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return round(1e6 * median(seconds), 1)


def tokens_per_round(texts: Sequence[tuple[list[int], int]]) -> dict[int, float]:
    """Of drafts by lookup alone, by the longest match that is told from a shorter one."""
    tokens = sum(len(text) - prompt for text, prompt in texts)
    return {most: round(tokens / sum(rounds(*text, most) for text in texts), 3) for most in LENGTHS}


def rounds(tokens: list[int], prompt: int, most: int) -> int:
    """How many rounds it takes to write a text."""
    count, written = 0, prompt
    while written < len(tokens):
        place, matched = longest_match(tokens[:written], most)
        accepted = 0
        while matched >= LEAST and accepted < DRAFT and written + accepted < len(tokens) - 1:
            period = written - place
            if tokens[place + accepted % period] != tokens[written + accepted]:
                break
            accepted += 1
        written, count = written + accepted + 1, count + 1
    return count


def longest_match(tokens: list[int], most: int) -> tuple[int, int]:
    """As the scan finds it, for matches of up to `most` tokens; by the automaton where any length counts."""
    if most > len(tokens):
        matched, place = SuffixAutomaton(tokens).match
        return place, matched
    row = torch.tensor([tokens])
    place, matched = latest_match(row, torch.zeros(1, dtype=torch.long), torch.tensor([len(tokens)]), most)
    return int(place), int(matched)


def show(console: Console, times: Sequence[dict[str, Any]], longer: dict[str, dict[int, float]]) -> None:
    table = Table(title="microseconds a round, three tokens committed in each row", box=None, title_justify="left")
    for heading in ("rows", "context", "scan", "index", "suffix automaton"):
        table.add_column(heading, justify="right")
    for line in times:
        table.add_row(*(f"{line[name]:g}" for name in ("rows", "context", "scan", "index", "automaton")))
    console.print(table)
    table = Table(title="tokens per round by the longest match looked for", box=None, title_justify="left")
    table.add_column("workload")
    for most in LENGTHS:
        table.add_column(str(most) if most < 1000 else "any", justify="right")
    for name, by_length in longer.items():
        table.add_row(name, *(f"{value:.2f}" for value in by_length.values()))
    console.print(table)


if __name__ == "__main__":
    main()
