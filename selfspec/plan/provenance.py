"""Provenance: the model that a plan was made for, and how the search found the plan."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from selfspec.plan.draft_spec import MOST_DRAFTED
from selfspec.plan.schema import Strict
from selfspec.plan.sublayers import MOST_LAYERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys of a config that do not change what the model computes.
_INCIDENTAL = frozenset(
    {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"}
)
_INCIDENTAL_PREFIXES = ("_attn_implementation", "output_", "return_dict")

Count = Annotated[int, Field(ge=0, le=2**62)]
Figure = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1 + 1e-9, allow_inf_nan=False)]
"""A share. The quotient of two rounded sums may be a little above 1."""


class ModelIdentity(Strict):
    """The model that a plan was made for. The fingerprint is a hash of the model's config."""

    model_type: str
    num_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    fingerprint: str

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelIdentity:
        return cls(
            model_type=config.model_type, num_layers=config.num_hidden_layers, fingerprint=config_fingerprint(config)
        )


def config_fingerprint(config: PretrainedConfig) -> str:
    """Sixteen hex digits that change with every config setting that changes what the model computes.

    Only settings that differ from the family's defaults count, so that a new setting in transformers does not
    invalidate plans.
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
    """Where and how the search ran. Under other conditions the plan's figures may not hold; its output does.

    Attributes:
        rows: rows that decode together.
        context: Tokens: the average number of cached tokens per row during decoding.
        sampling: the sampling settings; empty for greedy decoding.
        compiled: whether passes were compiled.
        versions: versions of the libraries.
    """

    device: str
    dtype: str
    rows: Annotated[int, Field(ge=1)] = 1
    context: Count | None = None
    sampling: dict[str, Any] = Field(default_factory=dict)
    compiled: bool = False
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def do_sample(self) -> bool:
        """Whether the search was for sampling rather than greedy decoding."""
        return bool(self.sampling.get("do_sample", False))


class Figures(Strict):
    """The speed of one plan, predicted or measured.

    Attributes:
        speedup: ratio to the plain model's speed in the same run.
        texts: the number of texts.
        agreement: by draft position, the share of drafted tokens accepted, given that all tokens before were accepted.
        interval: the 95 % interval of a measured speedup; empty if predicted.
        spread: minimum, median and maximum over the prompts of measured tokens per round; empty if predicted.
    """

    tokens_per_round: Figure
    acceptance_rate: Rate
    tokens_per_second: Figure
    speedup: Figure
    texts: Count = 0
    agreement: list[Rate] = Field(default_factory=list, max_length=MOST_DRAFTED)
    interval: list[Figure] = Field(default_factory=list, max_length=2)
    spread: list[Figure] = Field(default_factory=list, max_length=3)


class Provenance(Strict):
    """How the search found the plan, with predicted and measured figures.

    Attributes:
        study: the study's name in its storage.
        errors: measured / predicted - 1, by figure, on the decoded texts. For a plan that does not speculate, the
            errors are those of the best plan that does.
        confirmation: the figures of plain decoding and of every confirmed plan, as rows of a table.
        why: why the plan was chosen although another row looks better; empty if no row does.
    """

    conditions: Conditions
    seed: Count
    trials: Count
    study: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    predicted: Figures | None = None
    predicted_on_held_out: Figures | None = None
    measured: Figures | None = None
    errors: dict[str, Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]] = Field(default_factory=dict)
    confirmation: list[dict[str, str]] = Field(default_factory=list)
    why: str = ""
