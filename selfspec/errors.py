"""One base class for everything that a user can cause and mend; one warning; and how memory that is missing is told."""


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory does not suffice, on an accelerator or a CPU."""
    said = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)
