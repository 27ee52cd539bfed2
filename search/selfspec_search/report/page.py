"""Page: one HTML file that needs nothing else, made of a report's panels, tables and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from selfspec.plan import Figures, Plan
from selfspec_search.report import canvas
from selfspec_search.report.data import ReportData, StudyData, Trial, in_words
from selfspec_search.report.panels import panels, provenance_figures

BEST_TRIALS = 10
MISSING = "—"
_SPREAD = "tokens per round by prompt: lowest, median, highest"


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report: HTML text, and each figure as a PNG by its file name, if they were asked for."""

    html: str
    pngs: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure of the headline. `source` is 'measured' or 'predicted'."""

    value: str
    label: str
    source: str


def make_page(data: ReportData, *, pngs: bool = False) -> Page:
    """Draw and write everything that there is data for, with `pngs` each figure apart from the page too."""
    with canvas.style():
        made = list(panels(data))
        drawn = [(panel, canvas.to_svg(panel.figure)) for panel in made]
        apart = {f"{panel.key}.png": canvas.to_png(panel.figure) for panel in made if pngs}
    html = _template().render(
        title=_title(data),
        source=data.source,
        verdict=verdict(data),
        tiles=tiles(data),
        panels=drawn,
        comparison=comparison_rows(data),
        best=data.study.best(BEST_TRIALS) if data.study else [],
        chosen=data.chosen_trial if data.plan else None,
        confirmed=_came_of(data) and "measured" in provenance_figures(data),
        layers=range(data.num_layers),
        settings=settings(data),
    )
    html = html.encode("utf8", "replace").decode("utf8")  # names of files may hold what UTF-8 cannot
    return Page(html=html, pngs=apart)


def _came_of(data: ReportData) -> bool:
    """Whether the plan is what this very study led to."""
    recorded = getattr(data.plan.provenance, "study", None) if data.plan else None
    return data.study is not None and data.study.name == recorded


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("selfspec_search.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(times=times, percent=percent, plain=plain_number)
    return environment.get_template("page.html.jinja")


def verdict(data: ReportData) -> str:
    """What was found, in a sentence."""
    plan, study = data.plan, data.study
    if plan is not None:
        if plan.speculates:
            return f"Speculate: {plan}."
        return "Do not speculate: nothing that was tried decodes faster than the plain model."
    best = data.best_trial
    if best is None or best.speedup is None:
        return "No trial was whole, so there is nothing to choose from yet."
    if best.speedup <= 1:
        return "No trial is predicted to decode faster than the plain model."
    assert study is not None
    return f"Best of {len(study.trials)} trials: {drafting_of(best)}."


def tiles(data: ReportData) -> list[Tile]:
    """The headline's figures: those of the plan, measured first; of a study alone, the best trial's."""
    given = provenance_figures(data)
    if data.plan is not None and not data.plan.speculates:
        return _tiles_of_none(data, given.get("measured"))
    if given:
        measured = given.get("measured")
        predicted = given.get("predicted, held-out") or given.get("predicted, calibration")
        main = measured or predicted
        assert main is not None
        made = [_tile(times(predicted.speedup), "speedup", "predicted")] if measured and predicted else []
        source = "measured" if measured else "predicted"
        return [_tile(times(main.speedup), "speedup", source), *made, *_tiles_of(main, source)]
    best = None if data.plan else data.best_trial
    if best is None:
        return []
    return [_tile(times(best.speedup), "speedup", "predicted"), *_tiles_of(best, "predicted")]


def _tiles_of(figures: Figures | Trial, source: str) -> list[Tile]:
    return [
        _tile(plain_number(figures.tokens_per_round), "tokens per round", source),
        _tile(percent(figures.acceptance_rate), "of drafted tokens accepted", source),
        _tile(plain_number(figures.tokens_per_second), "tokens per second", source),
    ]


def _tiles_of_none(data: ReportData, plain: Figures | None) -> list[Tile]:
    """Of a plan that does not speculate: what plain decoding does, and the most that a trial promised."""
    best, made = data.best_trial, []
    if plain is not None:
        made.append(_tile(plain_number(plain.tokens_per_second), "tokens per second", "measured"))
    if best is not None:
        made.append(_tile(times(best.speedup), "speedup, the best trial's", "predicted"))
    return made


def _tile(value: str, label: str, source: str) -> Tile:
    return Tile(value=value, label=label, source=source)


def comparison_rows(data: ReportData) -> dict[str, list[str]]:
    """A table of the plan's figures: columns by where they are from, then measured over predicted, less 1."""
    given = provenance_figures(data)
    if not given:
        return {}
    measured = given.get("measured")
    predicted = {label: figures for label, figures in given.items() if label != "measured"}
    rows = {"": [*given, *(label.replace("predicted", "error") for label in predicted if measured)]}
    for name, shown in _SHOWN.items():
        cells = [shown(getattr(figures, name)) for figures in given.values()]
        errors = [_error(getattr(p, name), getattr(measured, name)) for p in predicted.values() if measured]
        rows[name.replace("_", " ")] = cells + errors
    spread = [_in_brief(getattr(figures, "spread", None) or ()) for figures in given.values()]
    if any(cell != MISSING for cell in spread):
        rows[_SPREAD] = spread + [""] * (len(rows[""]) - len(given))
    texts = [str(figures.texts or MISSING) for figures in given.values()]
    rows["prompts"] = texts + [""] * (len(rows[""]) - len(given))
    return rows


def _in_brief(values: Sequence[float]) -> str:
    return ", ".join(map(plain_number, values)) or MISSING


def _error(predicted: float, measured: float) -> str:
    return f"{measured / predicted - 1:+.1%}" if predicted else MISSING


def settings(data: ReportData) -> dict[str, dict[str, str]]:
    """Everything that says where the figures come from, by group."""
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
    chosen = getattr(plan.provenance, "settings", {})
    named = {**conditions, **counts, **chosen, **versions}
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


def _title(data: ReportData) -> str:
    named = data.study.identity.get("model") if data.study else None
    if isinstance(named, str) and named:
        return f"{named}, {data.num_layers} layers"
    if data.plan is not None and data.plan.model is not None:
        return f"{data.plan.model.model_type}, {data.plan.model.num_layers} layers"
    return data.study.name if data.study else data.source


def drafting_of(trial: Trial) -> str:
    """How a trial drafts, in the words of a plan."""
    threshold = "" if trial.threshold is None else f", exit below {trial.threshold:.3f}"
    gamma = "" if trial.gamma is None else f"; gamma {trial.gamma}{threshold}"
    lookup = "" if trial.lookup is None else f"; lookup first ({trial.lookup})"
    return f"skip {trial.skip_set}{gamma}{lookup}"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def plain_number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


_SHOWN = {
    "speedup": times,
    "tokens_per_second": plain_number,
    "tokens_per_round": plain_number,
    "acceptance_rate": percent,
}
