"""Policy: chooses the drafter and the draft length once a round, for the whole batch, down to plain decoding.

The plan says what rounds cost, running estimates say what rounds bring. No clock is read, so the same request is
decoded the same way each time. The choice is made before a round draws anything, so sampled text keeps the target's
distribution. `selfspec.speculator` and the benchmarks import this package.
"""

from selfspec.policy.adaptive_drafter import AdaptiveDrafter
from selfspec.policy.estimates import AgreementEstimate
from selfspec.policy.policy import AdaptivePolicy, Choice, Row, Seen
from selfspec.policy.select import PolicyName, drafter_for, longest_draft, too_many_rows, unsupported_reason

__all__ = [
    "AdaptiveDrafter",
    "AdaptivePolicy",
    "AgreementEstimate",
    "Choice",
    "PolicyName",
    "Row",
    "Seen",
    "drafter_for",
    "longest_draft",
    "too_many_rows",
    "unsupported_reason",
]
