"""Page: one self-contained HTML file of a report's headline, panels and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from selfspec_search.report import canvas
from selfspec_search.report.data import ReportData
from selfspec_search.report.headline import tiles, title, verdict
from selfspec_search.report.panels import panels
from selfspec_search.report.tables import comparison_rows, settings
from selfspec_search.report.words import listed, percent, plain_number, times

BEST_TRIALS = 10


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report: HTML text, and PNGs of the figures by file name if asked for."""

    html: str
    pngs: Mapping[str, bytes]


def make_page(data: ReportData, *, pngs: bool = False) -> Page:
    """Draw the panels that have data; with `pngs`, each figure is a PNG as well."""
    with canvas.style():
        made = list(panels(data))
        drawn = [(panel, canvas.to_svg(panel.figure)) for panel in made]
        apart = {f"{panel.key}.png": canvas.to_png(panel.figure) for panel in made if pngs}
    html = _template().render(
        title=title(data),
        source=data.source,
        study=data.study.name if data.study else None,
        verdict=verdict(data),
        draft=data.drafted_with,
        tiles=tiles(data),
        panels=drawn,
        comparison=comparison_rows(data),
        confirmation=data.plan.provenance.confirmation if data.plan and data.plan.provenance else [],
        why=data.plan.provenance.why if data.plan and data.plan.provenance else "",
        best=data.study.best(BEST_TRIALS) if data.study else [],
        chosen=data.chosen_trial if data.plan else None,
        confirmed="measured" in data.figures and _is_winner(data),
        layers=range(data.num_layers),
        settings=settings(data),
    )
    html = html.encode("utf8", "replace").decode("utf8")  # file names may hold characters that UTF-8 cannot encode
    return Page(html=html, pngs=apart)


def _is_winner(data: ReportData) -> bool:
    """Whether the plan speculates and came from this study."""
    plan, study = data.plan, data.study
    return bool(plan and study and plan.speculates and plan.provenance and plan.provenance.study == study.name)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("selfspec_search.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(times=times, percent=percent, plain=plain_number, listed=listed)
    return environment.get_template("page.html.jinja")
