"""Load a model and its tokenizer by name. Every failure becomes an error of one line."""

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
from selfspec.models.support import check_supported, check_supported_config, position_limit, vocabulary_size
from selfspec.utils.devices import device_name, dtype_name

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
"""What transformers raises for files that are missing or damaged, or that contradict the config."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to decode, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int | None:
        """Tokens: the longest text that the model's positions reach; None if the config has no limit."""
        return position_limit(self.model.config)

    @property
    def vocabulary(self) -> int:
        """Tokens: the model's vocabulary; the tokenizer may have further added tokens."""
        return vocabulary_size(self.model.config)

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.model.dtype)


def load(name: str, *, device: str = AUTO, dtype: str = AUTO) -> Loaded:
    """Load a supported model and its tokenizer.

    Args:
        name: a hub id, a local directory, or `demo` for the embedded model.
        device: a torch device; `auto` is CUDA if available, else the CPU.
        dtype: float32, bfloat16 or float16; `auto` is the checkpoint's dtype, and float32 for the embedded model.

    Raises:
        InputError: the model, the weights or the tokenizer cannot be loaded with this device and dtype.
        UnsupportedModelError: the family is not supported.
    """
    if not name:
        raise InputError("the model's name is empty; give a hub id, a directory, or 'demo'")
    path, on = _resolve(name), _device(device)
    with _explained(f"model '{name}' cannot be loaded"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_supported_config(config)  # before any weights are downloaded
    kind = _dtype(dtype, config, demo=name == DEMO)
    check_dtype(kind, on)
    with _explained(f"the tokenizer of '{name}' cannot be loaded", "put tokenizer.json into the model's directory"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _check_vocabulary(tokenizer, config)
    model = _model(path, name, config, kind)
    check_supported(model)
    with _explained(f"model '{name}' cannot be moved to {on}", "choose another --device, or a smaller --dtype"):
        model = model.to(on)  # type: ignore[arg-type]
    return Loaded(name, model.eval(), tokenizer)


def load_draft_model(name: str, target: Loaded) -> Loaded:
    """Load a draft model on the target's device and in the target's dtype.

    Raises:
        InputError: the draft model cannot be loaded, or its tokenizer differs from the target's.
        UnsupportedModelError: the family is not supported.
    """
    loaded = load(name, device=str(target.model.device), dtype=target.dtype_name)
    own, other = loaded.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    # A token that was added to one tokenizer alone, such as a padding token, occurs in few texts.
    added = loaded.tokenizer.get_added_vocab().keys() ^ target.tokenizer.get_added_vocab().keys()
    differing = sorted(token for token in (own.keys() | other.keys()) - added if own.get(token) != other.get(token))
    if differing:
        token = differing[0]
        raise InputError(
            f"draft model '{name}' has another tokenizer than '{target.name}': token {token!r} is {own.get(token)} "
            f"there and {other.get(token)} here; give a draft model of the same tokenizer"
        )
    return loaded


def _resolve(name: str) -> str:
    """The argument for `from_pretrained`: the demo's directory, a checked local directory, or a hub id."""
    if name == DEMO:
        from selfspec.demo import model_dir

        name = str(model_dir())
    path = Path(os.path.expanduser(name))  # os.path returns false for names for which Path raises
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
        raise InputError(f"model directory '{path}' has no config.json; give a directory that save_pretrained wrote")
    if not any(file.is_file() for pattern in _WEIGHT_FILES for file in path.glob(pattern)):
        raise InputError(f"model directory '{path}' has no weights (model.safetensors); give a directory with weights")


def _device(name: str) -> torch.device:
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{name}' cannot be used: {first_sentence(error)}") from None
    if device.type == "meta":
        raise InputError("device 'meta' cannot be used: a meta tensor holds no numbers")
    return device


def _dtype(name: str, config: PretrainedConfig, *, demo: bool) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != AUTO:
        raise InputError(f"dtype '{name}' is unknown; choose one of auto, {', '.join(DTYPES)}")
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) and not demo else torch.float32


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InputError` if the device cannot compute a linear layer in this dtype."""
    try:
        one = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.linear(one, one)
    except (RuntimeError, NotImplementedError) as error:
        reason = f"{device.type} cannot compute in {dtype_name(dtype)} ({first_sentence(error)})"
        raise InputError(f"{reason}; use --dtype float32 or bfloat16") from None


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise `InputError` if the tokenizer has tokens that the model lacks. Spare tokens of the model are padding.

    Added tokens, such as a padding token, may lie beyond the model's vocabulary: most prompts hold none of them.
    """
    own = tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items()
    highest, vocabulary = max((index for _, index in own), default=-1), vocabulary_size(config)
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
    """Turn an error of transformers into an `InputError` of one line."""
    try:
        yield
    except HFValidationError:
        raise InputError(f"{what}: the name is neither a directory nor a hub id") from None
    except _LOAD_ERRORS as error:
        raise InputError(f"{what}: {first_sentence(error)}" + (f"; {advice}" if advice else "")) from None


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, up to the first full stop; without a message, the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".: ") if lines else type(error).__name__


def quiet_hugging_face() -> None:
    """Keep the progress bars, advice and warnings of Hugging Face's libraries off the terminal."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()


def describe_device(device: torch.device) -> str:
    """The device in words, for reports."""
    detail = f" ({device})" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return device_name(device) + detail


def processor_name() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, Any]:
    """The versions of the libraries that figures depend on."""
    import transformers

    return {
        "selfspec": metadata.version("selfspec"),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
