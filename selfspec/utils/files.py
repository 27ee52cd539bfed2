"""Reading files with a limit; writing files completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from pathlib import Path

from selfspec.errors import InputError
from selfspec.utils.sizes import in_words

STDOUT, STDERR = 1, 2
"""File descriptors."""
_MOST_OF_A_NAME = 40
"""Characters of a file's name that its temporary file repeats: names have a limit."""


def read_bounded(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """The content of a file or a pipe of at most `most` bytes. Does not wait for a named pipe that has no writer.

    Raises:
        OSError: the file cannot be read.
        InputError: the file is a device, or is larger; the message calls the file `what`.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise InputError(f"{what} is a device; give a file")
        os.set_blocking(file.fileno(), True)
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{what} is larger than {in_words(most)}; give another file")
    return content


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a temporary file next to `path`, then rename: readers see the old file or the new file, never a part.

    A symlink is followed, and a new file gets the permissions that the umask allows. Devices, pipes, and the files
    that stdout and stderr go to are written directly, because a rename would put another file in their place.

    Raises:
        InputError: the file cannot be written.
    """
    path, data = Path(path), content.encode("utf8") if isinstance(content, str) else content
    try:
        if (stream := _stream(path)) is None:
            _replace(Path(os.path.realpath(path)), data)
        else:
            if stream == STDOUT:
                sys.stdout.flush()
            with open(os.dup(stream) if isinstance(stream, int) else stream, "wb", opener=_open_at_once) as file:
                os.set_blocking(file.fileno(), True)
                file.write(data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENXIO:
            reason = "nothing reads this pipe"
        raise InputError(f"cannot write {path}: {reason}; choose a writable file") from None
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` if `write_atomically` could not write, before the content is computed."""
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise InputError(f"cannot write {path}: it is a directory; choose a file")
    if not is_stream(path) and not os.path.isdir(target.parent):
        raise InputError(f"cannot write {path}: there is no directory {target.parent}; make it first")
    needed = [Path(path)] if os.path.exists(path) else []
    if not is_stream(path):
        needed.append(target.parent)
    if not all(os.access(part, os.W_OK) for part in needed):
        raise InputError(f"cannot write {path}: choose a file and a directory that are writable")


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a device, a pipe, or where stdout or stderr goes."""
    return _stream(Path(path)) is not None


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether stdout goes to the file."""
    return _stream(Path(path)) == STDOUT


def _stream(path: Path) -> Path | int | None:
    """What to write directly: a device, a pipe, or the descriptor of stdout or stderr. None for any other file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    for descriptor in (STDOUT, STDERR):
        try:
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
        except OSError:  # closed
            continue
    return None if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) else path


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _replace(path: Path, data: bytes) -> None:
    if path.is_symlink():  # a loop: `os.path.realpath` follows all others
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    temporary = path.with_name(f".{path.name[:_MOST_OF_A_NAME]}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
