"""Devices: where a benchmark of a GPU runs."""

from __future__ import annotations

import torch

from selfspec import InputError


def device_of(name: str | None, *, toy: bool) -> torch.device:
    """The device of this name; by default CUDA, or the CPU for a toy.

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cpu" if toy else "cuda"))
    except RuntimeError:
        raise InputError(f"device '{name}' is unknown; give 'cuda' or 'cpu'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "there is no CUDA device here; try the code with --toy, or give --device cpu and a lot of time"
        )
    return device
