"""What every test shares: one thread (tiny models, shared machines), fixed seeds, and quiet libraries."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging


def pytest_configure() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
