"""Stdout and stderr that are closed, full, or read no further."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CLOSED_PIPE = 141
"""Exit code after the reader of stdout went away: that of a command which SIGPIPE ends."""


@contextmanager
def safe_output() -> Iterator[None]:
    """Discard what is written to a closed stdout or stderr, and end quietly when the reader of stdout went away."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed; without a file in its place, the next file would get its number
            _discard(number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        _discard(1)
        if error.errno == errno.EPIPE:
            sys.exit(CLOSED_PIPE)
        with suppress(OSError):
            sys.stderr.write(f"error: cannot write to stdout: {error.strerror}\n")
        sys.exit(1)


def _discard(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
