"""selfspec_search: find the plan that decodes fastest, without decoding.

The target writes text once. Replay computes what any draft would have got accepted on this text. A profile measured on
this device turns acceptance into tokens per second, a study looks for the best draft, and decoding confirms the plan.
"""

from importlib import import_module
from typing import Any

# A module must not have the name of a public object: importing the module would replace the object.
_MODULES = {
    "Confirmed": "confirm.confirm",
    "OnProgress": "settings",
    "Progress": "settings",
    "Sampling": "replay.sampling_settings",
    "SearchResult": "confirm.result",
    "SearchSettings": "settings",
    "load_study": "storage.study_store",
    "repick": "confirm.repick",
    "search": "pipeline",
}
"""The module of every public name."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts without loading torch and Optuna."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
