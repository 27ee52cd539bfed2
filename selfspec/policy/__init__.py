"""Policy: who drafts in each round, and how far, or nobody; decided once a round for the whole batch.

The plan's outlook says what a round costs in every way; how many tokens it brings is estimated as it goes. What decides
is the text so far, never a clock, so the same request is decoded the same way every time, and sampled text keeps the
model's distribution: how a round drafts is settled before anything in it is drawn.
"""

from selfspec.policy.adaptive import AdaptivePolicy
from selfspec.policy.choice import Choice, Choices, Row
from selfspec.policy.drafter import AdaptiveDrafter
from selfspec.policy.estimates import AgreementEstimate, MatchEstimate
from selfspec.policy.serving import drafter_for, longest_draft, reason_not_to_adapt, too_many_rows

__all__ = [
    "AdaptiveDrafter",
    "AdaptivePolicy",
    "AgreementEstimate",
    "Choice",
    "Choices",
    "MatchEstimate",
    "Row",
    "drafter_for",
    "longest_draft",
    "reason_not_to_adapt",
    "too_many_rows",
]
