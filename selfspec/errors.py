"""One base class for everything that a user can cause and mend; and one warning."""


class SelfspecError(Exception):
    """A one-line message: what was given, what was expected, what to do."""


class PlanError(SelfspecError):
    """A plan or skip set that is malformed, or that does not fit the model."""


class UnsupportedModelError(SelfspecError):
    """A model that the views cannot reproduce."""


class UnsupportedOptionError(SelfspecError):
    """A generation option that speculative decoding does not serve."""


class InputError(SelfspecError):
    """Prompts, files or tensors that cannot be used as given."""


class PlanWarning(UserWarning):
    """A plan that was searched in other conditions: right, but perhaps not the fastest here."""
