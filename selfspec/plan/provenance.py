"""Provenance: which model a plan was made for, and what the search saw that found it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

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


class Conditions(Strict):
    """Where and how the search ran: another device, dtype or sampling makes its figures (not its output) stale.

    `context` is how many tokens a row had cached on average while it was decoded.
    """

    device: str
    dtype: str
    rows: int = 1
    context: int | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)
    compiled: bool = False
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def do_sample(self) -> bool:
        """Whether the search was for sampling, and not for greedy decoding."""
        return bool(self.sampling.get("do_sample", False))


class Figures(Strict):
    """Speed of one plan, predicted or measured; speedup is against the plain model in the same run.

    `agreement` is by draft position: the share accepted of tokens drafted there behind an accepted prefix. Measured
    figures have the speedup's 95 % `interval`, and the lowest, median and highest tokens per round of a prompt as
    `spread`.
    """

    tokens_per_round: float
    acceptance_rate: float
    tokens_per_second: float
    speedup: float
    texts: int = 0
    agreement: list[float] = Field(default_factory=list)
    interval: list[float] = Field(default_factory=list)
    spread: list[float] = Field(default_factory=list)


class Provenance(Strict):
    """What the search saw: predicted and measured figures side by side.

    `errors` are measured over predicted on the texts that were decoded, less 1; of the best contender where plain
    decoding won. `study` is the study's name in its storage.
    """

    conditions: Conditions
    seed: int
    trials: int
    study: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    predicted: Figures | None = None
    predicted_on_held_out: Figures | None = None
    measured: Figures | None = None
    errors: dict[str, float] = Field(default_factory=dict)
