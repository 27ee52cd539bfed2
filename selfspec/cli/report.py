"""selfspec report: a study and its plan on one page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from selfspec.cli.terminal import results_beside
from selfspec.errors import InputError, printable
from selfspec.utils.files import check_writable

NAME_FOR_URLS = "selfspec_report.html"


def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STUDY_OR_PLAN",
            help="A plan that 'search' wrote, whose trials are shown if their storage lies next to the plan; or the "
            "storage of a search: an SQLite file, a journal file, a URL.",
        ),
    ],
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Which study, where there are several.")] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="The plan that was chosen, to show in the report of a storage.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page to write; by default in the directory of the plan or storage, *_report.html."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each figure as a PNG into this directory, too.")
    ] = None,
) -> None:
    """Show what a search found and why: one HTML page that needs no network.

    What is skipped, what it costs and how often it agrees, how the search went, what was predicted and what measured.
    """
    page = page_path(source, out)
    if png is not None:
        check_directory(png)
    from selfspec_search.report import read_source, write_report

    data = read_source(source, study=study, plan=plan)
    written = write_report(data, page, png)
    figures = f" and {len(written) - 1} figures in {png}" if png is not None else ""
    results_beside(page).print(printable(f"wrote {page}{figures}"), markup=False, soft_wrap=True)


def page_path(source: str, out: Path | None) -> Path:
    """The file to write; `InputError` if it cannot be written."""
    page = out or default_page(source)
    if os.path.isdir(page):
        page = page / NAME_FOR_URLS
    check_writable(page)
    return page


def check_directory(png: Path) -> None:
    """Raise `InputError` if figures cannot be written into the directory, or the directory cannot be made."""
    nearest = next(path for path in (png, *png.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write figures to {png}: {nearest} is no writable directory; choose another --png")


def default_page(source: str) -> Path:
    """In the directory of the source, under its name; for a URL in the working directory."""
    from selfspec.plan.plan import PLAN_FILE

    if "://" in source:
        return Path(NAME_FOR_URLS)
    path = Path(source)
    file = path / PLAN_FILE if os.path.isdir(path) else path
    return file.with_name(f"{file.stem}_report.html")
