"""Report: a study and its plan on one self-contained HTML page. Imported by the command line."""

from __future__ import annotations

from pathlib import Path

from selfspec.errors import InputError
from selfspec.utils.files import write_atomically
from selfspec_search.report.data import ReportData, StudyData, Trial
from selfspec_search.report.page import Page, make_page
from selfspec_search.report.sources import read_source

__all__ = ["Page", "ReportData", "StudyData", "Trial", "make_page", "read_source", "write_report"]


def write_report(data: ReportData, out: Path, png: Path | None = None) -> list[Path]:
    """Write the page to `out`, and each figure into the directory `png`; return the written paths.

    Raises:
        InputError: `out` cannot be written, or the directory for PNGs cannot be made or written.
    """
    page = make_page(data, pngs=png is not None)
    written = [write_atomically(out, page.html)]
    if png is None:
        return written
    try:
        png.mkdir(parents=True, exist_ok=True)
        for name, figure in page.pngs.items():
            written.append(write_atomically(png / name, figure))
    except OSError as error:
        raise InputError(f"cannot write figures to {png}: {error.strerror or error}; choose another --png") from None
    return written
