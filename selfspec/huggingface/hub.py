"""Whether the Hugging Face hub answers, found out at once: its own client tries for half a minute."""

from __future__ import annotations

from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants

HUB_SECONDS = 3.0
"""Seconds to wait for an answer."""


def hub_unavailable_reason() -> str | None:
    """Why no file can be fetched; None if the hub answers, whatever the answer is."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the hub"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, SSLError):  # the hub's client may know other certificates
            return None
        return f"the hub ({constants.ENDPOINT}) cannot be reached: {getattr(reason, 'strerror', None) or reason}"
    return None
