"""TextCache: the target's texts on disk, by model and prompts, so that a second search does not write them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from selfspec.errors import PlanError
from selfspec.plan.provenance import config_fingerprint
from selfspec.utils.files import write_atomically
from selfspec_search.replay.texts import Text

TEXTS = "texts"
"""Key of the texts in the shared data of a study."""
CACHE_VARIABLE = "SELFSPEC_CACHE"
"""Environment variable that names another cache directory."""
FINGERPRINT_VALUES = 256
"""Values per weight tensor in a model's fingerprint. A training step changes nearly all values."""
_ADAPTER_STATE = frozenset({"_disable_adapters", "_active_adapter", "scaling", "merged_adapters"})
"""Attributes of peft modules that say which adapters are active."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that change with the config, the dtype, the weights or the active adapters."""
    digest = hashlib.sha256(f"{config_fingerprint(model.config)} {model.dtype}".encode())
    for name, module in model.named_modules():
        adapters = {key: str(value) for key, value in vars(module).items() if key in _ADAPTER_STATE}
        digest.update(f"{name} {sorted(adapters.items())}".encode() if adapters else b"")
    for name, weight in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        values = weight.detach().flatten()
        places = torch.linspace(0, len(values) - 1, min(FINGERPRINT_VALUES, len(values)), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values[places.to(values.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of(*parts: Any) -> str:
    """16 hex digits of values whose `repr` shows their whole content."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class TextCache:
    """A directory of texts. A file that cannot be read counts as missing; a failed write is ignored."""

    def __init__(self, directory: Path | None = None) -> None:
        given = os.environ.get(CACHE_VARIABLE)
        self.directory = directory or (Path(given) if given else platformdirs.user_cache_path("selfspec")) / "texts"

    def key(self, model: PreTrainedModel, prompts: Sequence[Tensor], **settings: Any) -> str:
        """The key of the texts for this model, these prompts and settings, and the installed libraries."""
        stops = model.generation_config.eos_token_id if model.generation_config is not None else None
        libraries = (torch.__version__, transformers.__version__, model.device.type)
        return digest_of(
            model_fingerprint(model), stops, libraries, sorted(settings.items()), [p.tolist() for p in prompts]
        )

    def read(self, key: str) -> list[Text] | None:
        """The texts in the order of `write`, or None if they are missing or unreadable."""
        try:
            return from_bytes(self._path(key).read_bytes())
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, key: str, texts: Sequence[Text]) -> None:
        """Store texts under a key."""
        with suppress(OSError, PlanError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), to_bytes(texts))

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


def to_bytes(texts: Sequence[Text]) -> bytes:
    """Texts as a safetensors file."""
    shape = torch.tensor([[len(text), text.prompt, text.allowed] for text in texts])
    return save({"tokens": torch.cat([text.tokens.cpu() for text in texts]), "shape": shape})


def from_bytes(data: bytes) -> list[Text]:
    """The inverse of `to_bytes`; tokens are on the CPU."""
    tensors = load(data)
    lengths, prompts, allowed = tensors["shape"].unbind(dim=1)
    pieces = tensors["tokens"].split(lengths.tolist())
    return [
        Text(tokens=tokens, prompt=prompt, allowed=limit)
        for tokens, prompt, limit in zip(pieces, prompts.tolist(), allowed.tolist(), strict=True)
    ]
