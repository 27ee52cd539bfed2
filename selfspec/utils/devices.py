"""Names of devices and dtypes in plans, profiles and messages."""

from __future__ import annotations

import torch


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the device type, such as `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which `torch.autocast` is off."""
    return torch.autocast(device.type, enabled=False)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without the prefix `torch.`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
