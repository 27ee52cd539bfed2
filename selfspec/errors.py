"""Errors that a user can cause and fix, one warning, and the test for a failed memory allocation."""


class SelfspecError(Exception):
    """Base class. The message is one line: what was given, what was expected, what to do."""


class PlanError(SelfspecError):
    """A plan or skip set is malformed or does not fit the model."""


class UnsupportedModelError(SelfspecError):
    """The views cannot reproduce the model."""


class UnsupportedOptionError(SelfspecError):
    """Speculative decoding does not support the generation option."""


class InputError(SelfspecError):
    """Prompts, files, tensors or settings cannot be used as given."""


class OutOfMemoryError(SelfspecError, MemoryError):
    """The memory does not suffice for the KV cache of a request."""


class PlanWarning(UserWarning):
    """The plan was searched under other conditions: the output is right, but the plan may not be the fastest here."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or a CPU could not allocate memory."""
    messages = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)
