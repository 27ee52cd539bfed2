"""Which attention backend serves a model."""

from __future__ import annotations

from dataclasses import dataclass

from selfspec.errors import InputError
from selfspec.models.attention_hook import AttentionNeeds
from selfspec.runtime.attention.flash import FlashAttn, TorchFlash
from selfspec.runtime.attention.sdpa import Sdpa
from selfspec.runtime.forward_pass import Backend

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (FlashAttn, TorchFlash, Sdpa)}


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and the reason for the choice."""

    backend: Backend
    reason: str


def choose_backend(needs: AttentionNeeds, name: str | None = None) -> BackendChoice:
    """The backend called `name`; by default the first backend in `BACKENDS` that serves the model.

    Raises:
        InputError: no backend has this name, or the named backend cannot serve the model.
    """
    if name is not None:
        if name not in BACKENDS:
            raise InputError(f"no attention backend is called '{name}'; choose one of {', '.join(BACKENDS)}")
        if unsupported_reason := BACKENDS[name].unsupported_reason(needs):
            raise InputError(
                f"attention backend '{name}' cannot be used: {unsupported_reason}; choose another backend or none"
            )
        return BackendChoice(BACKENDS[name](), "requested by name")
    rejected: list[str] = []
    for candidate in BACKENDS.values():
        unsupported_reason = candidate.unsupported_reason(needs)
        if unsupported_reason is None:
            return BackendChoice(candidate(), "; ".join(rejected) or "first choice")
        rejected.append(f"{candidate.name}: {unsupported_reason}")
    raise AssertionError("sdpa serves every model")
