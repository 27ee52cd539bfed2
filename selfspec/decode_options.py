"""DecodeOptions: how to decode a model, independently of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from selfspec.errors import InputError
from selfspec.utils.settings import Described
from selfspec.utils.sizes import parse_size

PolicyName = Literal["adaptive", "fixed"]

Backend = Annotated[
    str | None,
    Described("Attention backend: flash-attn, torch-flash or sdpa; by default the best on this device."),
]
Compile = Annotated[
    bool | None, Described("Fuse passes with torch.compile: slower to start, faster to run; by default on CUDA.")
]
DRAFT_MEMORY = Described(
    "The most memory that draft weights may take in addition to the model, such as 512M or 4G.", is_size=True
)


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """The options of `wrap` other than model, plan and draft model; `wrap` explains each.

    Raises:
        InputError: the policy is unknown, or `draft_memory` is not a size.
    """

    backend: Backend = None
    compile: Compile = None
    graphs: bool | None = None
    policy: Annotated[
        PolicyName,
        Described("Whether drafter and draft length follow the text (adaptive) or the plan (fixed)."),
    ] = "adaptive"
    draft_memory: Annotated[int | str | None, DRAFT_MEMORY] = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(PolicyName):
            raise InputError(f"policy '{self.policy}' is unknown; choose one of {', '.join(get_args(PolicyName))}")
        self.draft_memory_bytes  # noqa: B018  # raises if the size cannot be parsed

    @property
    def draft_memory_bytes(self) -> int | None:
        """`draft_memory` in bytes; None for no limit."""
        if isinstance(self.draft_memory, str):
            return parse_size(self.draft_memory, "draft_memory")
        return self.draft_memory
