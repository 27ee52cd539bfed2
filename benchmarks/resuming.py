"""Does verification get faster by resuming from the draft's own states?

A resumed verification spares n + 1 tokens the layers below the first one that the draft leaves out, and takes the last
drafted token through them alone. So it gains b (V(n + 1) - V(1)) milliseconds, where b is the share of the model below
that layer and V(t) a pass over t tokens: something where a pass over many tokens takes longer than one over one, and
nothing where reading the weights is what takes time. (To spare the last drafted token that pass, and do without the
bonus token, is no way out: drafting one token fewer brings as many tokens, by the same upper pass, and takes a lower
pass where the other takes a whole step of the draft.)

Measured for exact prefixes of a quarter and a half of the model, for early exits and scattered skip sets: the verify
part alone, full and resumed in turn; and whole greedy decodings by the same plan with and without it, paired. Subjects
are the embedded model, and a larger Llama of random weights, in float32 and bfloat16, whose upper layers are damped so
that drafts are often right (its text means nothing). On a CPU all times are of the one thread that works, so that what
else the machine does counts for little. Prints tables; the last line is JSON.

    python benchmarks/resuming.py --out benchmarks/results/resuming_cpu.json        # some ten minutes of a free core
    python benchmarks/resuming.py --toy                                             # a minute, to try the code
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from decode import commit, device_name, warn_if_dirty
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfspec import Plan, SkipSet, wrap
from selfspec.benchmark import Measurement
from selfspec.contenders import Contender, Ours
from selfspec.demo import held_out_prompts
from selfspec.loading import load, quiet_hugging_face, versions
from selfspec.prompts import load_prompts
from selfspec.runtime import Runtime, wait_for
from selfspec.sampling import Draft

FULL, RESUMED = "full", "resumed"
CONTEXT = 256
"""Tokens cached when the verify part is timed."""
DAMPING = 0.1
"""Of what the larger model's upper layers add."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, what it decodes, and the draft lengths at which whole decodings are measured."""

    name: str
    model: PreTrainedModel
    prompts: list[Tensor]
    gammas: Sequence[int]

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def skip_sets(self) -> dict[str, SkipSet]:
        """Early exits and scattered sets that leave a quarter and a half of the model exact."""
        sets = {}
        for boundary in (self.layers // 4, self.layers // 2):
            upper = range(boundary, self.layers)
            sets[f"exit at {boundary}"] = SkipSet(attn=upper, mlp=upper)
            sets[f"scattered from {boundary}"] = SkipSet(attn=upper[::2], mlp=upper[1::2])
        return sets


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options, code = parse(argv), commit()
    if options.out:
        warn_if_dirty(code)
    quiet_hugging_face()
    torch.set_num_threads(options.threads)
    verified: list[dict[str, Any]] = []
    decoded: list[dict[str, Any]] = []
    for subject in subjects(options):
        verified += show(verify_parts(subject, options), VERIFY_COLUMNS)
        decoded += show(decodings(subject, options), DECODE_COLUMNS)
    result = {
        "benchmark": "resuming",
        "commit": code,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "verify": verified,
        "decoding": decoded,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    print(json.dumps(result))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gammas", type=int, nargs="+", default=[2, 4, 6], help="draft lengths")
    parser.add_argument("--repeats", type=int, default=31, help="of the verify part, full and resumed in turn")
    parser.add_argument("--prompts", type=int, default=4, help="how many are decoded")
    parser.add_argument("--decodings", type=int, default=2, help="repeats of each whole decoding")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where passes run eagerly, as no others resume")
    parser.add_argument("--toy", action="store_true", help="a tiny model in the larger one's place, and few repeats")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args(argv)
    if options.toy:
        options.repeats, options.prompts, options.decodings, options.new_tokens = 3, 2, 1, 12
    return options


# --- Subjects ---


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    loaded = load("demo", device=options.device, dtype="float32")
    held_out = load_prompts(held_out_prompts(), loaded.tokenizer, context=loaded.context, new_tokens=options.new_tokens)
    yield Subject(name="demo", model=loaded.model, prompts=held_out[: options.prompts], gammas=options.gammas)
    for dtype in (torch.float32, torch.bfloat16):
        model = larger_model(toy=options.toy).to(options.device, dtype)
        random = torch.Generator().manual_seed(0)
        prompts = list(torch.randint(model.config.vocab_size, (options.prompts, 64), generator=random))
        middle = options.gammas[len(options.gammas) // 2]
        yield Subject(name="random Llama", model=model, prompts=prompts, gammas=[middle])


def larger_model(*, toy: bool) -> PreTrainedModel:
    """A Llama of 24 layers x 512 with random weights; what its layers from a quarter on add is damped."""
    torch.manual_seed(0)
    width = 64 if toy else 512
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers[config.num_hidden_layers // 4 :]:
            layer.self_attn.o_proj.weight.mul_(DAMPING)
            layer.mlp.down_proj.weight.mul_(DAMPING)
    return model


# --- The verify part alone ---


@torch.inference_mode()
def verify_parts(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of the verify part in full and resumed, and of what both are made of."""
    for name, skip_set in subject.skip_sets().items():
        runtime = Runtime(subject.model, skip_set, resume=True, compile=False, graphs=False)
        runtime.reserve(1, CONTEXT + max(options.gammas) + 1)
        for gamma in options.gammas:
            times = timed_in_turn(runtime, gamma, options.repeats)
            yield {
                "model": subject.name,
                "dtype": subject.dtype,
                "skips": name,
                "gamma": gamma,
                **{f"{part}_ms": round(1000 * median(seconds), 3) for part, seconds in times.items()},
                "ratio": round(median(a / b for a, b in zip(times[FULL], times[RESUMED], strict=True)), 3),
                "ratio_of_quickest": round(min(times[FULL]) / min(times[RESUMED]), 3),
            }


def timed_in_turn(runtime: Runtime, n: int, repeats: int) -> dict[str, list[float]]:
    """Seconds by part; before each resumed verification its draft is made anew, untimed, as it leaves the states."""
    vocabulary, random = runtime.model.config.vocab_size, torch.Generator().manual_seed(n)
    text = torch.randint(vocabulary, (1, CONTEXT + n + 1), generator=random).to(runtime.model.device)
    runtime.prefill(text[:, :CONTEXT], torch.tensor([CONTEXT]))
    tokens = text[:, CONTEXT:]  # b n+1
    clock = clock_of(tokens.device)
    times: dict[str, list[float]] = {part: [] for part in (FULL, RESUMED, "one_token", "lower", "upper")}
    for repeat in range(repeats + 1):
        draft = draft_of(runtime, tokens)
        work: list[tuple[str, Callable[[], Any]]] = [
            (FULL, lambda: runtime.run("target", tokens)),
            (RESUMED, lambda draft=draft: runtime.verify(tokens, draft)),
        ]
        # The last two are parts of a resumed verification, which leaves them their states.
        after: list[tuple[str, Callable[[], Any]]] = [
            ("upper", lambda: runtime.run("upper", tokens)),
            ("lower", lambda: runtime.run("lower", tokens[:, -1:])),
            ("one_token", lambda: runtime.run("target", tokens[:, :1])),
        ]
        for part, run in (*work[:: 1 if repeat % 2 else -1], *after):
            start = clock()
            run()
            wait_for(tokens.device)
            if repeat:  # the first one warms up
                times[part].append(clock() - start)
    return times


def draft_of(runtime: Runtime, tokens: Tensor) -> Draft:
    """A draft of these very tokens: the passes that a drafter makes, over `b n+1` tokens but the last."""
    assert runtime.resuming is not None
    n = tokens.shape[1] - 1
    runtime.resuming.begin()
    for column in range(n):
        runtime.run("draft", tokens[:, column : column + 1])
        runtime.cache.lengths += 1
    runtime.cache.lengths -= n
    draft = Draft(tokens[:, 1:], torch.tensor([n], device=tokens.device), None)
    runtime.resuming.keep_for(draft)
    return draft


def clock_of(device: torch.device) -> Callable[[], float]:
    return perf_counter if device.type == "cuda" or torch.get_num_threads() > 1 else thread_time


# --- Whole decodings ---


def decodings(subject: Subject, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second of the same plan with and without resuming, and their ratio with its 95 % interval."""
    for name, skip_set in subject.skip_sets().items():
        for gamma in subject.gammas:
            specs = {
                way: wrap(
                    subject.model,
                    Plan(skip_set=skip_set, gamma=gamma, resume=way == RESUMED),
                    compile=False,
                    graphs=False,
                )
                for way in (FULL, RESUMED)
            }
            measured = decoded_in_turn([Ours(way, spec) for way, spec in specs.items()], subject, options)
            full, resumed = measured.scores(specs[FULL].runtime, against=(FULL,), gamma=gamma)
            assert resumed.stats is not None
            yield {
                "model": subject.name,
                "dtype": subject.dtype,
                "skips": name,
                "gamma": gamma,
                "full_tokens_per_second": round(full.tokens_per_second, 2),
                "resumed_tokens_per_second": round(resumed.tokens_per_second, 2),
                "ratio": resumed.ratios[FULL].to_dict(),
                "acceptance_rate": round(resumed.stats.acceptance_rate, 4),
                "tokens_per_round": round(resumed.stats.tokens_per_round, 4),
                "passes_resumed": round(resumed.stats.resumed / resumed.stats.passes, 4),
                "differing_tokens": resumed.differing.differing_tokens,
                "near_ties": resumed.differing.near_ties,
                "errors": resumed.differing.errors,
            }


def decoded_in_turn(contenders: list[Contender], subject: Subject, options: argparse.Namespace) -> Measurement:
    """As `selfspec.benchmark.measure` does it, by our clock."""
    clock = clock_of(subject.model.device)
    for contender in contenders:
        contender.decode(max(subject.prompts, key=len), options.new_tokens)
    seconds = np.zeros((len(contenders), options.decodings, len(subject.prompts)))
    outputs: list[list[Tensor]] = [list(subject.prompts) for _ in contenders]
    for repeat, (column, prompt) in product(range(options.decodings), enumerate(subject.prompts)):
        turns = list(enumerate(contenders))
        for index, contender in turns[:: 1 if (repeat + column) % 2 else -1]:
            start = clock()
            outputs[index][column] = contender.decode(prompt, options.new_tokens)
            seconds[index, repeat, column] = clock() - start
    return Measurement(contenders=contenders, prompts=subject.prompts, seconds=seconds, outputs=outputs, unsteady=[])


# --- Tables ---

_WHAT = ("model", "dtype", "skips", "gamma")
VERIFY_COLUMNS = (*_WHAT, "full_ms", "resumed_ms", "ratio", "ratio_of_quickest", "one_token_ms", "lower_ms", "upper_ms")
DECODE_COLUMNS = (*_WHAT, "full_tokens_per_second", "resumed_tokens_per_second", "ratio", "acceptance_rate")
DECODE_COLUMNS += ("differing_tokens", "errors")


def show(rows: Iterator[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Print rows as they come, and return them all."""
    print("", *(column.replace("tokens_per_second", "tok/s") for column in columns), sep=" | ", flush=True)
    kept = []
    for row in rows:
        print("", *(_cell(row[column]) for column in columns), sep=" | ", flush=True)
        kept.append(row)
    return kept


def _cell(value: Any) -> str:
    return "{value:.3f} ({low:.3f}-{high:.3f})".format(**value) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
