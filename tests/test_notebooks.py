"""Every notebook runs from top to bottom."""

import re
from itertools import product
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALLER = {r"\btrials=\d+": "trials=8", r"\bnew_tokens=\d+": "new_tokens=19", r"\[:\d+\]": "[:4]"}
"""Patterns of sizes in the notebooks' code, and smaller sizes: fewer trials, shorter texts, fewer prompts."""
TIMED = ("profile", "draft_costs", "pass_lengths", "round_costs")
ROUGH_COSTS = "".join(f"import selfspec_search.profile.{name} as timed; timed.CYCLES = 1\n" for name in TIMED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell, (size, smaller) in product(notebook.cells, SMALLER.items()):
        cell.source = re.sub(size, smaller, cell.source)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = ROUGH_COSTS + first.source
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
