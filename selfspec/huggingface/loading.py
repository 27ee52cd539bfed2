"""Loading a model and its tokenizer by name, with one clear line for whatever cannot be loaded."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfspec.errors import InputError
from selfspec.models.support import check_supported, check_supported_config

DEMO = "demo"
"""The name of the embedded model."""
AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    ImportError,
    SafetensorError,
    HfHubHTTPError,
    StrictDataclassError,
)
"""What transformers raises for files that are missing, damaged or not what the config says."""


@dataclass(frozen=True)
class Loaded:
    """A model, ready to decode, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int | None:
        """The most tokens that the model's positions reach, None where its config names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype_name(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def load(name: str, *, device: str = AUTO, dtype: str = AUTO) -> Loaded:
    """Load a supported model and its tokenizer.

    Args:
        name: a hub id, a local directory, or `demo` for the embedded model.
        device: a torch device; `auto` is CUDA where there is any, else the CPU.
        dtype: float32, bfloat16 or float16; `auto` is the checkpoint's own, and float32 for the embedded model.

    Raises:
        InputError: the model, its weights or its tokenizer cannot be loaded, or not with this device or dtype.
        UnsupportedModelError: the family is not supported.
    """
    if not name:
        raise InputError("the model's name is empty; give a hub id, a directory, or 'demo'")
    path = _resolve(name)
    on = _device(device)
    config = _config(path, name)
    kind = _dtype(dtype, config, demo=name == DEMO)
    check_dtype(kind, on)
    tokenizer = _tokenizer(path, name)
    check_vocabulary(tokenizer, config)
    model = _model(path, name, config, kind)
    check_supported(model)
    with _explained(f"model '{name}' cannot be moved to {on}", "choose another --device, or a smaller --dtype"):
        model = model.to(on)  # type: ignore[arg-type]
    return Loaded(name, model.eval(), tokenizer)


def load_draft_model(name: str, beside: Loaded) -> Loaded:
    """Load a model that is to draft for `beside`: on its device, in its dtype, of its tokenizer.

    Raises:
        InputError: it cannot be loaded, or its tokenizer is another one.
        UnsupportedModelError: the family is not supported.
    """
    loaded = load(name, device=str(beside.model.device), dtype=beside.dtype_name)
    own, other = loaded.tokenizer.get_vocab(), beside.tokenizer.get_vocab()
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        token = differing[0]
        raise InputError(
            f"draft model '{name}' has another tokenizer than '{beside.name}': token {token!r} is {own.get(token)} "
            f"there and {other.get(token)} here; give a draft model of the same tokenizer"
        )
    return loaded


def _resolve(name: str) -> str:
    """What to hand to `from_pretrained`: the demo's directory, a checked local directory, or a hub id."""
    if name == DEMO:
        from selfspec.demo import model_dir

        name = str(model_dir())
    path = Path(os.path.expanduser(name))  # of os.path, which answers no where a Path raises
    if os.path.isdir(path):
        _check_directory(path)
        return str(path)
    if os.path.exists(path):
        raise InputError(f"model '{name}' is a file; give the directory that holds config.json and the weights")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.sep in name.replace("/", ""):
        raise InputError(f"there is no model directory at '{name}'")
    return name


def _check_directory(path: Path) -> None:
    if not os.path.isfile(path / "config.json"):
        raise InputError(f"model directory '{path}' has no config.json; give one that save_pretrained wrote")
    if not any(file.is_file() for pattern in _WEIGHT_FILES for file in path.glob(pattern)):
        raise InputError(f"model directory '{path}' has no weights (model.safetensors); give one that has")


def _device(name: str) -> torch.device:
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{name}' cannot be used: {first_sentence(error)}") from None
    if device.type == "meta":
        raise InputError("device 'meta' cannot be used: it holds no numbers")
    return device


def _config(path: str, name: str) -> PretrainedConfig:
    """The config, checked before any weights are downloaded."""
    with _explained(f"model '{name}' cannot be loaded"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_supported_config(config)
    return config


def _dtype(name: str, config: PretrainedConfig, *, demo: bool) -> torch.dtype:
    if name != AUTO and name not in DTYPES:
        raise InputError(f"dtype '{name}' is unknown; choose one of auto, {', '.join(DTYPES)}")
    if name != AUTO:
        return DTYPES[name]
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) and not demo else torch.float32


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InputError` if the device cannot compute a linear layer in this dtype."""
    try:
        one = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.linear(one, one)
    except (RuntimeError, NotImplementedError) as error:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{device.type} cannot compute in {kind} ({first_sentence(error)}); use --dtype float32 or bfloat16"
        ) from None


def _tokenizer(path: str, name: str) -> PreTrainedTokenizerBase:
    with _explained(f"the tokenizer of '{name}' cannot be loaded", "put tokenizer.json beside the model"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise `InputError` if the tokenizer knows tokens that the model does not. (Fewer are usual: padding.)"""
    highest, vocabulary = max(tokenizer.get_vocab().values(), default=-1), config.get_text_config().vocab_size
    if highest >= vocabulary:
        raise InputError(
            f"the tokenizer has tokens up to {highest}, but the model's vocabulary is 0..{vocabulary - 1}; "
            "use the tokenizer that belongs to the model"
        )


def _model(path: str, name: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with _explained(f"the weights of '{name}' cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    model, report = loaded
    for key in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report[key])):
            raise InputError(
                f"the weights of '{name}' are not whole: {len(wrong)} {key.replace('_keys', '')} ({wrong[0]}); "
                "transformers would fill them at random"
            )
    return model  # type: ignore[no-any-return]


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn what transformers raises into one line."""
    try:
        yield
    except HFValidationError:
        raise InputError(f"{what}: it is neither a directory nor a hub id") from None
    except _LOAD_ERRORS as error:
        raise InputError(f"{what}: {first_sentence(error)}" + (f"; {advice}" if advice else "")) from None


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, up to its first full stop, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".: ") if lines else type(error).__name__


def quiet_hugging_face() -> None:
    """Keep progress bars, advice and warnings of the libraries beneath off the terminal."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()


def describe_device(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device.type}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, Any]:
    """The libraries that figures depend on."""
    import transformers

    return {
        "selfspec": metadata.version("selfspec"),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
