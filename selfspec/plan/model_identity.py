"""ModelIdentity: which model a plan was made for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from selfspec.plan.schema import Strict

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys of a config that do not change what the model computes.
_INCIDENTAL = frozenset(
    {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"}
)
_INCIDENTAL_PREFIXES = ("_attn_implementation", "output_", "return_dict")


class ModelIdentity(Strict):
    """Which model a plan was made for. The fingerprint is a hash of its config."""

    model_type: str
    num_layers: int
    fingerprint: str

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelIdentity:
        return cls(
            model_type=config.model_type, num_layers=config.num_hidden_layers, fingerprint=config_fingerprint(config)
        )


def config_fingerprint(config: PretrainedConfig) -> str:
    """Sixteen hex digits that change with anything in the config that changes what the model computes.

    Only settings that differ from the family's defaults count: a release of transformers that adds a setting must not
    turn plans away.
    """
    essential = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _INCIDENTAL
        and not key.startswith(_INCIDENTAL_PREFIXES)
        and (not hasattr(type(config), key) or getattr(type(config), key) != value)
    }
    return hashlib.sha256(json.dumps(essential, sort_keys=True, default=str).encode()).hexdigest()[:16]
