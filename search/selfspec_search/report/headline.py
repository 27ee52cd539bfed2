"""Headline: the result in a title, a sentence and a few figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Figures
from selfspec_search.report.data import ReportData, Trial
from selfspec_search.report.words import counted, drafting, interval, lookup_in_words, percent, plain_number, times


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure. `source` is 'measured' or 'predicted', `sure` its interval, `on` the texts."""

    value: str
    label: str
    source: str
    sure: str = ""
    on: str = ""


def title(data: ReportData) -> str:
    """The name of the file, or for a database the name of the study; and the model."""
    study, plan = data.study, data.plan
    name = study.name if study and "://" in data.source else PurePath(data.source).name
    model = study.identity.get("model") if study else None
    if not (isinstance(model, str) and model):
        model = plan.model.model_type if plan and plan.model else None
    return f"{name}: {model}, {data.num_layers} layers" if model else name


def verdict(data: ReportData) -> str:
    """The result in a sentence."""
    if data.plan is not None:
        if data.plan.speculates:
            return f"Speculate: {_drafting_of(data.plan, data.num_layers)}."
        return "Do not speculate: nothing that was tried decodes faster than the plain model."
    best, study = data.best_trial, data.study
    if study is None or best is None or best.speedup is None:
        return "No trial is complete, so there is nothing to choose from yet."
    if best.speedup <= 1:
        return "No trial is predicted to decode faster than the plain model."
    words = drafting(best.draft_spec, study.num_layers, gamma=best.gamma, lookup=best.lookup)
    return f"Best of {len(study.trials)} trials: {words}."


def _drafting_of(plan: Plan, num_layers: int) -> str:
    lookup = lookup_in_words(plan.prompt_lookup) if plan.prompt_lookup else None
    return drafting(plan.draft_spec, num_layers, gamma=plan.gamma, threshold=plan.exit_threshold, lookup=lookup)


def tiles(data: ReportData) -> list[Tile]:
    """The figures of the plan, measured before predicted; for a study alone, of the best trial.

    For a plan that does not speculate: the plain model's speed, and the highest predicted speedup of a trial.
    """
    given, best = data.figures, data.best_trial
    measured = given.get("measured")
    on = counted(measured.texts, "held-out prompt") if measured and measured.texts else ""
    shown: list[Tile] = []
    if data.plan is not None and not data.plan.speculates:
        if measured is not None:
            speed = plain_number(measured.tokens_per_second)
            shown.append(Tile(value=speed, label="tokens per second", source="measured", on=on))
        if best is not None:
            shown.append(_speedup(best, "speedup, the best trial's"))
        return shown
    expected = given.get("predicted, held-out") or given.get("predicted, calibration") or (None if data.plan else best)
    if measured is not None:
        sure = f"95 % interval {interval(measured.interval)}" if measured.interval else ""
        shown.append(Tile(value=times(measured.speedup), label="speedup", source="measured", sure=sure, on=on))
    if expected is not None:
        shown.append(_speedup(expected))
    found = measured or expected
    return shown + _others(found, "measured" if measured else "predicted") if found else shown


def _speedup(figures: Figures | Trial, label: str = "speedup") -> Tile:
    return Tile(value=times(figures.speedup), label=label, source="predicted")


def _others(figures: Figures | Trial, source: str) -> list[Tile]:
    shown = {
        "tokens per round": plain_number(figures.tokens_per_round),
        "of drafted tokens accepted": percent(figures.acceptance_rate),
        "tokens per second": plain_number(figures.tokens_per_second),
    }
    return [Tile(value=value, label=label, source=source) for label, value in shown.items()]
