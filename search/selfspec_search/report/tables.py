"""Tables: the plan's figures side by side, and their provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selfspec.plan.plan import Plan
from selfspec.plan.provenance import Figures
from selfspec_search.report.data import ReportData, StudyData
from selfspec_search.report.words import MISSING, in_words, interval, percent, plain_number, times

INTERVAL = "speedup, 95 % interval"
SPREAD = "tokens per round by prompt: lowest, median, highest"
PROMPTS = "prompts"
_ROWS: dict[str, Callable[[Figures], str]] = {
    "speedup": lambda figures: times(figures.speedup),
    INTERVAL: lambda figures: interval(figures.interval),
    "tokens per second": lambda figures: plain_number(figures.tokens_per_second),
    "tokens per round": lambda figures: plain_number(figures.tokens_per_round),
    SPREAD: lambda figures: ", ".join(map(plain_number, figures.spread)) or MISSING,
    "acceptance rate": lambda figures: percent(figures.acceptance_rate),
    PROMPTS: lambda figures: str(figures.texts or MISSING),
}


def comparison_rows(data: ReportData) -> dict[str, list[str]]:
    """A table of the plan's figures: a column for each source, then the errors: measured over predicted, less 1."""
    given = data.figures
    if not given or data.plan is None or data.plan.provenance is None:
        return {}
    measured = given.get("measured")
    predicted = {label: figures for label, figures in given.items() if label != "measured"} if measured else {}
    errors = data.plan.provenance.errors if measured and data.plan.speculates else {}
    rows = {"": [*given, *(label.replace("predicted", "error") for label in predicted)]}
    for name, cell in _ROWS.items():
        cells = [cell(figures) for figures in given.values()]
        if any(shown != MISSING for shown in cells):
            rows[name] = cells + [_error(name, figures, measured) for figures in predicted.values() if measured]
    if errors:
        same_prompts = {"": "error, same prompts"} | {n.replace("_", " "): f"{e:+.1%}" for n, e in errors.items()}
        for name, cells in rows.items():
            cells.append(same_prompts.get(name, ""))
    return rows


def _error(name: str, predicted: Figures, measured: Figures) -> str:
    if name in (INTERVAL, SPREAD, PROMPTS):
        return ""
    expected, found = (getattr(figures, name.replace(" ", "_")) for figures in (predicted, measured))
    return f"{found / expected - 1:+.1%}" if expected else MISSING


def settings(data: ReportData) -> dict[str, dict[str, str]]:
    """The provenance of the figures, by group."""
    model = data.plan.model.model_dump() if data.plan and data.plan.model else {}
    groups = {"model": model, "search": _provenance(data.plan), "study": _study(data.study)}
    return {title: _named(group) for title, group in groups.items() if group}


def _named(group: dict[str, Any]) -> dict[str, str]:
    """Names and values as text, without unknown values."""
    known = {name: value for name, value in group.items() if value not in (None, {}, "")}
    return {str(name).replace("_", " "): in_words(value) for name, value in known.items()}


def _provenance(plan: Plan | None) -> dict[str, Any]:
    if plan is None or plan.provenance is None:
        return {}
    conditions = plan.provenance.conditions.model_dump()
    versions = conditions.pop("versions", {})
    counts = {"seed": plan.provenance.seed, "trials": plan.provenance.trials}
    return {**conditions, **counts, **plan.provenance.settings, **versions}


def _study(study: StudyData | None) -> dict[str, Any]:
    if study is None:
        return {}
    seconds = [trial.seconds for trial in study.trials if trial.seconds is not None]
    return {
        "name": study.name,
        "trials": f"{len(study.complete)} complete, {len(study.trials) - len(study.complete)} ended early",
        "workers": ", ".join(study.workers),
        "time in trials": f"{sum(seconds):.0f} s, {sum(seconds) / len(seconds):.2f} s each" if seconds else "",
        **{name: in_words(value) for name, value in study.identity.items()},
    }
