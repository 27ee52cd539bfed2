"""selfspec_search: find the plan that decodes fastest, without decoding.

The target writes text once; replay computes what any draft would have got accepted on it; a profile measured on this
device turns that into tokens per second; a study looks for the best skip set; decoding confirms it.
"""

from importlib import import_module
from typing import Any

# No module may have the name of something public: once imported, it would stand in its place.
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
    """Import a public name when it is first used: the command line need not wait seconds for torch and Optuna."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
