"""Checks of a model directory and its config before a model is built: what is damaged, in one line, at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from selfspec.errors import InputError, excerpt
from selfspec.plan.strict_json import MOST_LEVELS, is_deeper
from selfspec.plan.sublayers import MOST_LAYERS
from selfspec.utils.files import read_bounded
from selfspec.utils.sizes import in_words

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_JSON_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
_MOST_JSON_BYTES = 2**26
_TOO_DEEP = f"it nests deeper than {MOST_LEVELS} levels"
_POINTER = b"version https://git-lfs"
_SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 2**40),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**20),
}
"""Sizes in a config, each with its largest value."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size")


def check_directory(path: Path) -> None:
    """Raise `InputError` if the directory lacks files, or if its files cannot be those of a model."""
    if not os.path.isfile(path / "config.json"):
        raise InputError(f"model directory '{path}' has no config.json; give a directory that save_pretrained wrote")
    weights = weight_files(path)
    if not weights:
        raise InputError(f"model directory '{path}' has no weights (model.safetensors); give a directory with weights")
    for file in (*weights, path / "tokenizer.json"):
        if os.path.isfile(file) and _starts_with(file, _POINTER):
            raise InputError(f"'{file}' is a Git LFS pointer to a file that is not here; run 'git lfs pull' there")
    for file in (path / name for name in _JSON_OBJECTS):
        if os.path.exists(file) and (problem := _json_problem(file)) is not None:
            raise InputError(f"'{file}' is not a valid JSON file of a model ({problem}); download the model again")
    check_sizes(json.loads((path / "config.json").read_bytes()), str(path))


def weight_files(path: Path) -> list[Path]:
    """The files of weights in a model directory."""
    return sorted(file for pattern in _WEIGHT_FILES for file in path.glob(pattern) if file.is_file())


def _starts_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror or error}") from None


def _json_problem(file: Path) -> str | None:
    """Why a file does not hold a JSON object of a reasonable size; None if the file does."""
    try:
        data = json.loads(read_bounded(file, _MOST_JSON_BYTES, "the file"))
    except json.JSONDecodeError as error:
        return f"{error.msg} at line {error.lineno}"
    except RecursionError:
        return _TOO_DEEP
    except InputError as error:
        return str(error)
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, or an integer of too many digits
        return (getattr(error, "strerror", None) or str(error)).partition(";")[0]
    if not isinstance(data, dict):
        return f"a {type(data).__name__} where an object is expected"
    return _TOO_DEEP if is_deeper(data, MOST_LEVELS) else None


def check_sizes(config: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` if the config has a size that no model can have."""
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise InputError(
                f"config.json of model '{name}' has {key} {excerpt(value)}, but an integer from 1 to {most} is "
                "expected; correct it, or download the model again"
            )


def check_size(path: Path, config: PretrainedConfig, name: str) -> None:
    """Raise `InputError` if the config describes a model larger than its weights, before memory is taken for it.

    Weights of a quantised model are not checked: several parameters share a byte.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        described = sum(part.numel() for part in AutoModelForCausalLM.from_config(config).parameters())
    present = sum(file.stat().st_size for file in weight_files(path))
    if described > present:
        raise InputError(
            f"config.json of model '{name}' describes {described} parameters, but the weights have only "
            f"{in_words(present)}: they are not whole, or belong to another config; download the model again"
        )


def check_generation_config(config: GenerationConfig, name: str) -> None:
    """Raise `InputError` if a token or a number of the generation config is none."""
    for key in (*_TOKENS, *_NUMBERS):
        value = getattr(config, key, None)
        parts = value if key in _TOKENS and isinstance(value, list) and value else [value]
        allowed = int if key in _TOKENS else int | float
        for part in parts:
            whole = part is None and value is None
            if not whole and (not isinstance(part, allowed) or isinstance(part, bool) or abs(part) >= 2**63):
                expected = "tokens are" if key in _TOKENS else "a number is"
                raise InputError(
                    f"the generation config of model '{name}' has {key} {excerpt(value)}, but {expected} expected; "
                    "correct generation_config.json"
                )
