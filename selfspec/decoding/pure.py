"""pure: declares a user's own logits processor or stopping criterion to be a function of each row alone."""

from __future__ import annotations

from typing import Any, TypeVar

from selfspec.errors import InputError

T = TypeVar("T")
_MARK, _LASTING = "selfspec_pure", "selfspec_lasting"


def pure(declared: T, *, lasting: bool = False) -> T:
    """Declare a logits processor or a stopping criterion pure, so that rounds with drafts serve it; returns `declared`.

    Takes an object, a function, or a class (as a decorator: every instance of the class itself is pure, an instance of
    a subclass is not). Also takes the function of `prefix_allowed_tokens_fn`. Without the declaration, a processor or a
    criterion of the user's own sees each context exactly once, in lock-step decoding.

    A pure *processor* is called with some rows at a time, in any order, for contexts that may never become text. The
    scores that it returns for a row must depend on the row's `input_ids` and `scores` alone, and it must accept every
    `input_ids`. It is not called for a context that continues with a token which it forbade itself (score -inf).

    A pure *criterion* is called with one row, `input_ids` of shape `1 length`, and None for the scores; in a batch that
    another option decodes in lock-step, with all rows. Its answer for a row must depend on the row's `input_ids` alone.
    The output is that of `model.generate`: the criterion is asked after each committed
    token, and the row ends where it first holds.

    Args:
        lasting: of a criterion, that it also holds for every continuation of a text for which it holds. So it is asked
            once a round and row, and further only about the tokens of the round in which it holds. A criterion that
            reads the outside world may be declared lasting, such as the state of a cancel button: the row then ends in
            the round in which it is set.
    """
    target: Any = getattr(declared, "__func__", declared)  # a method's attributes are its function's
    try:
        setattr(target, _MARK, True)
        setattr(target, _LASTING, lasting)
    except AttributeError:
        raise InputError(
            f"{type(declared).__name__} takes no attributes, so it cannot be declared pure; wrap it in a function"
        ) from None
    return declared


def is_pure(value: Any) -> bool:
    """Whether `pure` was called on this object or on its own class."""
    return _marked(value, _MARK)


def is_lasting(value: Any) -> bool:
    """Whether `pure(..., lasting=True)` was called on this object or on its own class."""
    return _marked(value, _LASTING)


def _marked(value: Any, mark: str) -> bool:
    value = getattr(value, "__func__", value)
    return bool(getattr(value, "__dict__", {}).get(mark, vars(type(value)).get(mark, False)))
