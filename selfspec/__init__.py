"""selfspec: self-speculative decoding by layer skipping.

Letters for shapes in all packages: `b` rows, `t` tokens, `n` drafted tokens, `v` vocabulary, `h` heads, `d` head size,
`s` cache slots.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "DecodeOptions": "decode_options",
    "Format": "plan.draft_spec",
    "InputError": "errors",
    "Metrics": "serving.metrics",
    "OptionWarning": "errors",
    "RoundCosts": "plan.round_costs",
    "PassLengths": "plan.round_costs",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "PlanWarning": "errors",
    "PromptLookup": "plan.lookup",
    "Quantised": "plan.draft_spec",
    "QuantisedSet": "plan.sublayers",
    "DraftSpec": "plan.draft_spec",
    "SelfSpeculator": "speculator",
    "SelfspecError": "errors",
    "SkipSet": "plan.sublayers",
    "SpeculativeOutput": "huggingface.output",
    "Stats": "decoding.stats",
    "SubVocabulary": "plan.draft_spec",
    "UnsupportedModelError": "errors",
    "UnsupportedOptionError": "errors",
    "draft_bytes": "speculator",
    "pure": "decoding.pure",
    "wrap": "speculator",
}
"""The module that defines each public name."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name at first use, so that `selfspec --help` does not wait seconds for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
