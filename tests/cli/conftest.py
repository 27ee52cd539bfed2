"""A small model on disk, for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved import save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")
