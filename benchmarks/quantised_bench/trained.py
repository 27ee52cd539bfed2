"""Trained: the mid-size model of `benchmarks/midsize.py`, everything real: the best plan of a search that may only skip
against the best of one with all choices, decoding other prompts in turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from selfspec_search import SearchResult, SearchSettings, search
from torch import Tensor
from transformers import PreTrainedModel

import selfspec
from selfspec.benchmark.contenders import GENERATE, PLAIN, Contender, HuggingFace, Ours
from selfspec.benchmark.measure import Score, measure
from selfspec.huggingface.loading import Loaded, load
from selfspec.huggingface.prompts import load_prompts
from selfspec.plan import Plan

SKIPPING, ANY = "selfspec, skips alone", "selfspec, all choices"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the searches, and of the decoding that follows; `timed` held-out prompts are timed, `confirming` others
    confirm."""

    trials: int
    new_tokens: int
    gamma_max: int
    calibration: int
    confirming: int
    timed: int
    repeats: int


REAL = Sizes(trials=200, new_tokens=128, gamma_max=8, calibration=32, confirming=8, timed=16, repeats=3)
TOY = Sizes(trials=6, new_tokens=17, gamma_max=2, calibration=3, confirming=2, timed=1, repeats=2)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is printed and what is kept."""

    found: dict[str, SearchResult]
    scores: list[Score]
    to_dict: dict[str, Any]


def measure_trained(folder: Path, device: torch.device, dtype: str, sizes: Sizes, *, timeout: float) -> Trained:
    """Both searches, one after the other, and all decoders in turn.

    Args:
        timeout: seconds after which no further trial of a search starts.
    """
    loaded = load(str(folder), device=str(device), dtype=dtype)
    calibration, held_out = (_prompts(loaded, folder / f"{name}.jsonl", sizes) for name in ("calibration", "held_out"))
    confirming, timed = held_out[: sizes.confirming], held_out[sizes.confirming :][: sizes.timed]
    found = {}
    for name, draft in ((SKIPPING, "skip"), (ANY, "both")):
        settings = SearchSettings(
            trials=sizes.trials,
            new_tokens=sizes.new_tokens,
            gamma_max=sizes.gamma_max,
            timeout=timeout,
            draft=draft,  # type: ignore[arg-type]
        )
        found[name] = search(loaded.model, calibration[: sizes.calibration], confirming, settings)
    contenders = _contenders(loaded.model, {name: result.plan for name, result in found.items()})
    measured = measure(contenders, timed, new_tokens=sizes.new_tokens, repeats=sizes.repeats)
    last = contenders[-1]
    assert isinstance(last, Ours)
    longest = max(result.plan.longest_draft for result in found.values())
    scores = measured.scores(last.spec.runtime, against=(PLAIN, GENERATE), gamma=longest)
    return Trained(
        found=found,
        scores=scores,
        to_dict={
            "basis": "a trained model, time and agreement real",
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
            "dtype": dtype,
            "plans": {name: json.loads(result.plan.to_json()) for name, result in found.items()},
            "search_phases_s": {name: result.seconds for name, result in found.items()},
            "prompts": len(timed),
            "scores": [score.to_dict() for score in scores],
            "all_choices_over_skips": measured.ratio(ANY, SKIPPING).to_dict(),
            "unsteady": measured.unsteady,
        },
    )


def _prompts(loaded: Loaded, path: Path, sizes: Sizes) -> list[Tensor]:
    return load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=sizes.new_tokens)


def _contenders(model: PreTrainedModel, plans: dict[str, Plan]) -> Sequence[Contender]:
    """`model.generate`; plain decoding, padded as the searches found it to be the fastest; and each plan."""
    ours = [Ours(name, selfspec.wrap(model, plan)) for name, plan in plans.items()]
    pass_lengths = ours[-1].spec.pass_lengths_for(1)
    plain = Ours(PLAIN, selfspec.wrap(model, Plan.none(pass_lengths=pass_lengths)))
    return [HuggingFace(GENERATE, model), plain, *ours]
