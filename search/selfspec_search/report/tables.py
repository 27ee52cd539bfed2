"""Tables: the plan's figures side by side, and their provenance."""

from __future__ import annotations

from collections.abc import Callable

from selfspec.plan import Figures, Plan
from selfspec_search.report.data import ReportData, StudyData
from selfspec_search.report.panels import provenance_figures
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
_WITHOUT_ERRORS = (INTERVAL, SPREAD, PROMPTS)


def comparison_rows(data: ReportData) -> dict[str, list[str]]:
    """A table of the plan's figures: a column for each source, then measured over predicted, less 1."""
    given = provenance_figures(data)
    if not given:
        return {}
    measured = given.get("measured")
    predicted = {label: figures for label, figures in given.items() if label != "measured"}
    same_prompts = _errors_on_same_prompts(data.plan) if measured else {}
    columns = [*given, *(label.replace("predicted", "error") for label in predicted if measured)]
    rows = {"": columns + ["error, same prompts"] * bool(same_prompts)}
    for name, cell in _ROWS.items():
        cells = [cell(figures) for figures in given.values()]
        errors = [_error(name, figures, measured) for figures in predicted.values() if measured]
        if same_prompts:
            errors.append(same_prompts.get(name, ""))
        if any(shown != MISSING for shown in cells):
            rows[name] = cells + errors
    return rows


def _errors_on_same_prompts(plan: Plan | None) -> dict[str, str]:
    """Prediction errors on the decoded prompts."""
    if plan is None or plan.provenance is None or not plan.speculates:
        return {}
    return {name.replace("_", " "): f"{error:+.1%}" for name, error in plan.provenance.errors.items()}


def _error(name: str, predicted: Figures, measured: Figures) -> str:
    if name in _WITHOUT_ERRORS:
        return ""
    expected, found = (getattr(figures, name.replace(" ", "_")) for figures in (predicted, measured))
    return f"{found / expected - 1:+.1%}" if expected else MISSING


def settings(data: ReportData) -> dict[str, dict[str, str]]:
    """The provenance of the figures, by group."""
    groups = {
        "model": {name: in_words(v) for name, v in data.plan.model.model_dump().items()}
        if data.plan and data.plan.model
        else {},
        "search": _provenance(data.plan) if data.plan else {},
        "study": _study(data.study) if data.study else {},
    }
    return {name: group for name, group in groups.items() if group}


def _provenance(plan: Plan) -> dict[str, str]:
    if plan.provenance is None:
        return {}
    conditions = plan.provenance.conditions.model_dump()
    versions = conditions.pop("versions", {})
    counts = {"seed": plan.provenance.seed, "trials": plan.provenance.trials}
    named = {**conditions, **counts, **plan.provenance.settings, **versions}
    return {name.replace("_", " "): in_words(value) for name, value in named.items() if value not in (None, {}, "")}


def _study(study: StudyData) -> dict[str, str]:
    seconds = [trial.seconds for trial in study.trials if trial.seconds is not None]
    rows = {
        "name": study.name,
        "trials": f"{len(study.complete)} whole, {len(study.trials) - len(study.complete)} ended early",
        "workers": ", ".join(study.workers),
        "time in trials": f"{sum(seconds):.0f} s, {sum(seconds) / len(seconds):.2f} s each" if seconds else "",
        **{str(key).replace("_", " "): in_words(value) for key, value in study.identity.items()},
    }
    return {name: value for name, value in rows.items() if value}
