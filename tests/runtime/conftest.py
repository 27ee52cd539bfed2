"""Fixtures of the folder: pytest finds imported fixtures here."""

from __future__ import annotations

import pytest
from captured import compilations, fresh_compiler, reads, reads_by_round  # noqa: F401
from flash_kernels import flash_attn_installed, flash_kernels  # noqa: F401
from models import FIRST_DROPPED, damped_model
from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)
