"""Policy: chooses the drafter and the draft length of each round for the whole batch, or plain decoding.

The plan says what rounds cost. Running estimates say how many tokens rounds bring. The policy reads no clock, so equal
requests are decoded equally. It chooses before the round draws a token, so sampled text keeps the target's
distribution. Imported by the Hugging Face layer, the speculator and the benchmarks.
"""

from selfspec.policy.policy import AdaptivePolicy
from selfspec.policy.select import drafter_for, longest_draft, too_many_rows
from selfspec.policy.without_plan import quick_plan

__all__ = ["AdaptivePolicy", "drafter_for", "longest_draft", "quick_plan", "too_many_rows"]
