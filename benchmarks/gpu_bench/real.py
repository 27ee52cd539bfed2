"""The real model, end to end: the mid-size one that `benchmarks/midsize.py` trained; then search, and all decoders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from selfspec_search import SearchResult, SearchSettings, search
from transformers import PreTrainedModel

from gpu_bench.effort import Effort
from selfspec import SelfspecError
from selfspec.benchmark.contenders import GENERATE, PLAIN, line_up
from selfspec.benchmark.measure import Score, measure
from selfspec.huggingface.loading import load
from selfspec.huggingface.prompts import load_prompts


@dataclass(frozen=True, kw_only=True)
class RealResult:
    """What is printed and what is kept."""

    found: SearchResult
    scores: list[Score]
    to_dict: dict[str, Any]


def missing(folder: Path) -> str | None:
    """Why there is nothing to measure, and what to do; None where there is."""
    if (folder / "config.json").is_file():
        return None
    return f"no model in {folder}; train one with 'python benchmarks/midsize.py --out {folder}'"


def measure_real(folder: Path, device: torch.device, dtype: str, effort: Effort, *, timeout: float) -> RealResult:
    """Search a plan on calibration prompts, confirm it on some of the held-out ones, and decode the others with all.

    Args:
        timeout: seconds after which no further trial starts.
    """
    loaded = load(str(folder), device=str(device), dtype=dtype)
    calibration, held_out = (
        load_prompts(
            folder / f"{name}.jsonl", loaded.tokenizer, context=loaded.context, new_tokens=effort.search_tokens
        )
        for name in ("calibration", "held_out")
    )
    confirming, timed = held_out[: effort.confirm_prompts], held_out[effort.confirm_prompts :]
    timed = timed[: effort.search_prompts // 2]
    settings = SearchSettings(
        draft="skip",
        trials=effort.search_trials,
        new_tokens=effort.search_tokens,
        gamma_max=effort.gamma_max,
        timeout=timeout,
    )
    found = search(loaded.model, calibration[: effort.search_prompts], confirming, settings)
    lined_up = line_up(loaded.model, found.plan, timed, effort.search_tokens)
    measured = measure(lined_up.contenders, timed, new_tokens=effort.search_tokens, repeats=effort.repeats)
    scores = measured.scores(lined_up.ours.runtime, against=(PLAIN, GENERATE), gamma=found.plan.longest_draft)
    return RealResult(
        found=found,
        scores=scores,
        to_dict={
            "basis": "a trained model, time and agreement real",
            "model": _described(folder, loaded.model),
            "plan": json.loads(found.plan.to_json()),
            "search_phases_s": found.seconds,
            "trials_whole": found.trials_complete,
            "trials_ended_early": found.trials_pruned,
            "replay_equals_decoding_in_every_round": found.rounds_equal,
            "prompts": len(timed),
            "scores": [score.to_dict() for score in scores],
            "absent": lined_up.absent,
            "unsteady": measured.unsteady,
        },
    )


def _described(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """What was trained, and how well."""
    try:
        training = json.loads((folder / "training.json").read_text("utf8"))
    except (OSError, ValueError) as error:
        raise SelfspecError(f"{folder / 'training.json'} cannot be read: {error}; train the model anew") from None
    kept = ("seconds", "tokens_seen", "held_out_loss", "early_exits_agree")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: training.get(name) for name in kept},
    }
