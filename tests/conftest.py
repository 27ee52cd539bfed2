"""What every test shares: one thread (tiny models, shared machines), fixed seeds, and quiet libraries."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # For commands and notebooks, too: threads that share a core mostly wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("COLUMNS", None)  # a terminal's width, which pytest-xdist hands to its workers
    logging.set_verbosity_error()
    # The same examples in every run, and no deadline: on a busy machine a fast function may take a second.
    settings.register_profile("selfspec", derandomize=True, deadline=None, max_examples=50, database=None)
    settings.load_profile("selfspec")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_cache_of_others(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cached in a directory of the test's own."""
    monkeypatch.setenv("SELFSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
