"""selfspec: self-speculative decoding by layer skipping.

Letters for shapes, everywhere: `b` rows, `t` tokens, `n` drafted, `v` vocabulary, `h` heads, `d` head size, `s` cache
slots.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfspec.decode_options import DecodeOptions
    from selfspec.errors import (
        InputError,
        PlanError,
        PlanWarning,
        SelfspecError,
        UnsupportedModelError,
        UnsupportedOptionError,
    )
    from selfspec.generation import SelfSpeculator, SpeculativeOutput, draft_bytes, wrap
    from selfspec.metrics import Metrics
    from selfspec.plan import Outlook, Padding, Plan, PromptLookup, Tree
    from selfspec.recipe import Format, Quantised, Recipe, SubVocabulary
    from selfspec.skip_set import QuantisedSet, SkipSet
    from selfspec.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "DecodeOptions",
    "Format",
    "InputError",
    "Metrics",
    "Outlook",
    "Padding",
    "Plan",
    "PlanError",
    "PlanWarning",
    "PromptLookup",
    "Quantised",
    "QuantisedSet",
    "Recipe",
    "SelfSpeculator",
    "SelfspecError",
    "SkipSet",
    "SpeculativeOutput",
    "Stats",
    "SubVocabulary",
    "Tree",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "draft_bytes",
    "wrap",
]

_HOMES = {
    "DecodeOptions": "decode_options",
    "Format": "recipe",
    "Metrics": "metrics",
    "Outlook": "plan",
    "Padding": "plan",
    "Plan": "plan",
    "PromptLookup": "plan",
    "Quantised": "recipe",
    "QuantisedSet": "skip_set",
    "Recipe": "recipe",
    "SelfSpeculator": "generation",
    "SkipSet": "skip_set",
    "SpeculativeOutput": "generation",
    "Stats": "stats",
    "SubVocabulary": "recipe",
    "Tree": "plan",
    "draft_bytes": "generation",
    "wrap": "generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `selfspec --help` need not wait seconds for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
