"""Load a model and its tokenizer by name. Every failure becomes an error of one line."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfspec.errors import InputError, excerpt, is_out_of_memory, shortened
from selfspec.huggingface.hub import hub_unavailable_reason
from selfspec.huggingface.model_directory import check_directory, check_generation_config, check_size, check_sizes
from selfspec.models.support import check_supported, check_supported_config, position_limit, vocabulary_size
from selfspec.utils.devices import device_name, dtype_name

DEMO = "demo"
"""The name of the embedded model."""
AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_REASON = 300
"""Characters of a library's message that an error repeats."""
_BROKEN_WEIGHTS = "download the model again"
_INCIDENTAL = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")
"""Weights of old checkpoints that a model computes itself."""


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
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "trust_remote_code": False}
    if not os.path.isdir(path) and (reason := hub_unavailable_reason()) is not None:
        source["local_files_only"] = True  # else every file would wait for the hub
        _check_cached(name, reason)
    with _explained(f"model '{name}' cannot be loaded", _did_you_mean(name)):
        config: PretrainedConfig = AutoConfig.from_pretrained(**source)
    check_supported_config(config)  # before any weights are downloaded
    check_sizes(vars(config), name)
    kind = _dtype(dtype, config, demo=name == DEMO)
    check_dtype(kind, on)
    with _explained(f"the tokenizer of '{name}' cannot be loaded", "put tokenizer.json into the model's directory"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
        _check_vocabulary(tokenizer, config)
    model = _model(source, name, config, kind)
    check_supported(model)
    check_generation_config(model.generation_config, name)
    with _explained(f"model '{name}' cannot be moved to {on}", "choose another device, or a smaller dtype"):
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
        check_directory(path)
        return str(path)
    if os.path.exists(path):
        raise InputError(f"model '{name}' is a file; give the directory that holds config.json and the weights")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.sep in name.replace("/", ""):
        raise InputError(f"there is no model directory at '{name}'")
    return name


def _check_cached(name: str, reason: str) -> None:
    """Raise `InputError` if the hub is not available and the model is not in the cache."""
    with _explained(f"model '{name}' cannot be loaded"):
        cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise InputError(
            f"model '{name}' cannot be loaded: it is no directory here, it is not in the cache, and {reason}; "
            f"{_did_you_mean(name) or 'give a directory that holds the model'}"
        )


def _did_you_mean(name: str) -> str:
    return f"did you mean '{DEMO}'?" if get_close_matches(name.lower(), [DEMO]) else ""


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
    if demo or own is None:
        return torch.float32
    if not isinstance(own, torch.dtype) or own not in (*DTYPES.values(), torch.float64):
        raise InputError(f"the model's dtype is {excerpt(own)}, which cannot be decoded; choose {', '.join(DTYPES)}")
    return own


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InputError` if the device cannot compute a linear layer in this dtype."""
    try:
        one = torch.ones(8, 8, dtype=dtype, device=device)
        torch.nn.functional.linear(one, one)
    except (RuntimeError, NotImplementedError) as error:
        reason = f"{device.type} cannot compute in {dtype_name(dtype)} ({first_sentence(error)})"
        raise InputError(f"{reason}; choose dtype float32 or bfloat16") from None


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


def _model(source: dict[str, Any], name: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    path = Path(source["pretrained_model_name_or_path"])
    with _explained(f"the weights of '{name}' cannot be loaded", _BROKEN_WEIGHTS):
        if path.is_dir():
            check_size(path, config, name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    own = (f"{model.base_model_prefix}.", "lm_head.")
    unexpected = [key for key in report["unexpected_keys"] if key.startswith(own) and not _INCIDENTAL.search(key)]
    for problem, keys in (
        ("are not whole: {} missing ({}); transformers would fill them at random", report["missing_keys"]),
        ("do not fit config.json: {} of another shape ({})", report["mismatched_keys"]),
        ("do not fit config.json: {} unexpected ({}); transformers would drop them", unexpected),
    ):
        if keys:
            first = min(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in keys)
            reason = problem.format(len(keys), shortened(first))
            raise InputError(f"the weights of '{name}' {reason}; {_BROKEN_WEIGHTS}")
    return model  # type: ignore[no-any-return]


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn an error of transformers into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except HFValidationError:
        raise InputError(f"{what}: the name is neither a directory nor a hub id") from None
    except Exception as error:  # damaged files make transformers and tokenizers raise errors of any type
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {_reason(error)}" + (f"; {advice}" if advice else "")) from None


def _reason(error: Exception) -> str:
    """What is wrong, for the user: of an error that is not about input, the type as well."""
    if isinstance(error, StrictDataclassError):  # the second line says what was expected
        return " ".join(str(error).split())[:LONGEST_REASON]
    expected = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and str(error)
    return first_sentence(error) if expected else f"{type(error).__name__}: {first_sentence(error)}"


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, up to the first full stop; without a message, the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".: ")[:LONGEST_REASON] if lines else type(error).__name__


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
