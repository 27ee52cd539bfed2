"""Plan: what the search writes and everything else reads. The package imports no torch."""

from selfspec.plan.lookup import MOST_DRAFTED, PromptLookup
from selfspec.plan.plan import PLAN_FILE, PLAN_VERSION, Plan
from selfspec.plan.provenance import Conditions, Figures, ModelIdentity, Provenance, config_fingerprint
from selfspec.plan.round_costs import MATCHES, PassLengths, RoundCosts, match_class

__all__ = [
    "MATCHES",
    "MOST_DRAFTED",
    "PLAN_FILE",
    "PLAN_VERSION",
    "Conditions",
    "Figures",
    "ModelIdentity",
    "PassLengths",
    "Plan",
    "PromptLookup",
    "Provenance",
    "RoundCosts",
    "config_fingerprint",
    "match_class",
]
