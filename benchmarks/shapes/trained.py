"""Trained: the model of `benchmarks/midsize.py`: search plans, then compare all decoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.budget import Budget
from common.prompts import read
from common.tables import print_search, scores_table
from rich.console import Console
from selfspec_search import SearchResult, SearchSettings, search
from selfspec_search.settings import DraftName
from transformers import PreTrainedModel

from selfspec import SelfspecError, wrap
from selfspec.benchmark.contenders import Ours, line_up
from selfspec.benchmark.measure import Score, measure
from selfspec.huggingface.loading import load
from selfspec.utils.devices import dtype_name
from shapes.effort import SearchEffort

STAGE = "mid-size model"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The results of the trained model."""

    found: dict[str, SearchResult]
    scores: list[Score]
    to_dict: dict[str, Any]

    def show(self, console: Console) -> None:
        """Print the searches and the decoders' scores."""
        for name, result in self.found.items():
            console.print(f"{name}:", style="bold")
            print_search(console, result)
        console.print(scores_table(self.scores))


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The settings of the stage that measures a trained model."""

    folder: Path
    device: torch.device
    dtype: str
    effort: SearchEffort
    drafts: Mapping[str, DraftName]  # what drafts may do in the search, by the plan's name in the tables
    seconds: float  # of the whole stage

    def measure(self, budget: Budget) -> Trained | None:
        """Run the stage; None if it was skipped."""
        if (reason := missing(self.folder)) is not None:
            return budget.skip(STAGE, reason)
        return budget.run(STAGE, self.seconds, self._measure)

    def _measure(self) -> Trained:
        """Search on calibration prompts, confirm on some held-out prompts, and decode the others."""
        loaded, effort = load(str(self.folder), device=str(self.device), dtype=self.dtype), self.effort
        model = loaded.model
        calibration, held_out = (
            read(self.folder / f"{name}.jsonl", loaded, effort.new_tokens) for name in ("calibration", "held_out")
        )
        confirming, timed = held_out[: effort.confirming], held_out[effort.confirming :][: effort.timed]
        found = {
            name: search(model, calibration[: effort.calibration], confirming, self._settings(draft))
            for name, draft in self.drafts.items()
        }
        *others, last = found
        lined_up = line_up(model, found[last].plan, timed, effort.new_tokens)
        peers = lined_up.contenders[:-1]
        ours = [*(Ours(name, wrap(model, found[name].plan)) for name in others), Ours(last, lined_up.ours)]
        measured = measure([*peers, *ours], timed, new_tokens=effort.new_tokens, repeats=effort.repeats)
        longest = max(result.plan.longest_draft for result in found.values())
        scores = measured.scores(lined_up.ours.runtime, gamma=longest)
        return Trained(
            found=found,
            scores=scores,
            to_dict={
                "basis": "a trained model: time and agreement real",
                "model": _described(self.folder, model),
                "plans": {name: json.loads(result.plan.to_json()) for name, result in found.items()},
                "search_phases_s": {name: result.seconds for name, result in found.items()},
                "trials_whole": {name: result.trials_complete for name, result in found.items()},
                "trials_ended_early": {name: result.trials_pruned for name, result in found.items()},
                "replay_equals_decoding_in_every_round": all(result.rounds_equal for result in found.values()),
                "prompts": len(timed),
                "baseline": measured.baseline,
                "scores": [score.to_dict() for score in scores],
                "ratios": {f"{last} over {name}": measured.ratio(last, name).to_dict() for name in others},
                "absent": lined_up.absent,
                "unsteady": measured.unsteady,
            },
        )

    def _settings(self, draft: DraftName) -> SearchSettings:
        effort, searches = self.effort, len(self.drafts)
        return SearchSettings(
            draft=draft,
            trials=effort.trials,
            new_tokens=effort.new_tokens,
            gamma_max=effort.gamma_max,
            timeout=self.seconds / 2 / searches,
        )


def missing(folder: Path) -> str | None:
    """Why there is no trained model, and how to make one; None if there is a model."""
    if (folder / "config.json").is_file():
        return None
    return f"no model in {folder}; train one with 'python benchmarks/midsize.py --out {folder}'"


def _described(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The model's size and the figures of its training."""
    try:
        training = json.loads((folder / "training.json").read_text("utf8"))
    except (OSError, ValueError) as error:
        raise SelfspecError(f"{folder / 'training.json'} cannot be read: {error}; train the model again") from None
    kept = ("seconds", "tokens_seen", "held_out_loss", "early_exits_agree")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": model.config.num_hidden_layers,
        "dtype": dtype_name(model.dtype),
        **{name: training.get(name) for name in kept},
    }
