"""Headline: the result in a title, a sentence and a few figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from selfspec.plan import Figures
from selfspec_search.report.data import ReportData, Trial
from selfspec_search.report.panels import provenance_figures
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
    """The name of the plan or study, and the model."""
    return ": ".join(filter(None, (_name(data), _model(data))))


def _name(data: ReportData) -> str:
    """The name of the file; for a database the name of the study."""
    return data.study.name if data.study and "://" in data.source else PurePath(data.source).name


def _model(data: ReportData) -> str:
    named = data.study.identity.get("model") if data.study else None
    if not (isinstance(named, str) and named):
        named = data.plan.model.model_type if data.plan and data.plan.model else None
    return f"{named}, {data.num_layers} layers" if named else ""


def verdict(data: ReportData) -> str:
    """The result in a sentence."""
    if data.plan is not None:
        if data.plan.speculates:
            return f"Speculate: {_drafting_of_plan(data)}."
        return "Do not speculate: nothing that was tried decodes faster than the plain model."
    best, study = data.best_trial, data.study
    if study is None or best is None or best.speedup is None:
        return "No trial was whole, so there is nothing to choose from yet."
    if best.speedup <= 1:
        return "No trial is predicted to decode faster than the plain model."
    words = drafting(best.draft_spec, study.num_layers, gamma=best.gamma, lookup=best.lookup)
    return f"Best of {len(study.trials)} trials: {words}."


def _drafting_of_plan(data: ReportData) -> str:
    plan = data.plan
    assert plan is not None
    lookup = lookup_in_words(plan.prompt_lookup) if plan.prompt_lookup else None
    return drafting(plan.draft_spec, data.num_layers, gamma=plan.gamma, threshold=plan.exit_threshold, lookup=lookup)


def tiles(data: ReportData) -> list[Tile]:
    """The figures of the plan, measured before predicted; for a study alone, of the best trial."""
    given = provenance_figures(data)
    measured = given.get("measured")
    if data.plan is not None and not data.plan.speculates:
        return _tiles_of_none(data, measured)
    predicted = given.get("predicted, held-out") or given.get("predicted, calibration")
    if measured is not None:
        expected = [_speedup(predicted)] if predicted else []
        return [_measured_speedup(measured), *expected, *_others(measured, "measured")]
    promised = predicted or (None if data.plan else data.best_trial)
    return [_speedup(promised), *_others(promised, "predicted")] if promised else []


def _measured_speedup(measured: Figures) -> Tile:
    return Tile(
        value=times(measured.speedup),
        label="speedup",
        source="measured",
        sure=f"95 % interval {interval(measured.interval)}" if measured.interval else "",
        on=_on(measured),
    )


def _on(measured: Figures) -> str:
    return counted(measured.texts, "held-out prompt") if measured.texts else ""


def _speedup(figures: Figures | Trial, label: str = "speedup") -> Tile:
    return Tile(value=times(figures.speedup), label=label, source="predicted")


def _others(figures: Figures | Trial, source: str) -> list[Tile]:
    shown = {
        "tokens per round": plain_number(figures.tokens_per_round),
        "of drafted tokens accepted": percent(figures.acceptance_rate),
        "tokens per second": plain_number(figures.tokens_per_second),
    }
    return [Tile(value=value, label=label, source=source) for label, value in shown.items()]


def _tiles_of_none(data: ReportData, plain: Figures | None) -> list[Tile]:
    """For a plan that does not speculate: plain decoding, and the highest predicted speedup of a trial."""
    best, made = data.best_trial, []
    if plain is not None:
        speed = plain_number(plain.tokens_per_second)
        made.append(Tile(value=speed, label="tokens per second", source="measured", on=_on(plain)))
    if best is not None:
        made.append(_speedup(best, "speedup, the best trial's"))
    return made
