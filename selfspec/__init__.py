"""selfspec: self-speculative decoding by layer skipping.

Letters for shapes, everywhere: `b` rows, `t` tokens, `n` drafted, `v` vocabulary, `h` heads, `d` head size, `s` cache
slots.
"""

from selfspec.errors import InputError, PlanError, SelfspecError, UnsupportedModelError, UnsupportedOptionError
from selfspec.generation import SelfSpeculator, SpeculativeOutput, wrap
from selfspec.plan import Plan
from selfspec.skip_set import SkipSet
from selfspec.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Plan",
    "PlanError",
    "SelfSpeculator",
    "SelfspecError",
    "SkipSet",
    "SpeculativeOutput",
    "Stats",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "wrap",
]
