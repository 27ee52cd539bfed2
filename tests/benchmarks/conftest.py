"""Toy runs of benchmark scripts, as commands, and the mid-size model that two of them measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import midsize
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(midsize.__file__).parent


@dataclass(frozen=True)
class Ran:
    """A finished script: exit code and output."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line, read as JSON."""
        assert self.code == 0, self.err
        return dict(json.loads(self.out.splitlines()[-1]))


def run_script(script: str, *arguments: object) -> Ran:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    with TemporaryDirectory() as cache:
        env = os.environ | {"SELFSPEC_CACHE": cache}
        ran = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture(scope="session")
def script() -> Any:
    """Runs a script with arguments."""
    return run_script


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of training the toy mid-size model; `out` is its folder."""
    return run_script("midsize.py", "--toy", "--out", tmp_path_factory.mktemp("midsize") / "model").result


@pytest.fixture
def small_model() -> Any:
    """Makes a Llama of 3 layers, each with 64 x 192 weights of attention, 3 x 64 x 96 of an MLP and 128 of norms. The
    last norm has 64 weights, embedding and head have 48 x 64 each."""

    def make(*, tied: bool = False) -> LlamaForCausalLM:
        sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
        return LlamaForCausalLM(config).eval()

    return make
