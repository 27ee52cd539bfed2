"""Writing files completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from selfspec.errors import PlanError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a temporary file next to `path`, then rename: readers see the old file or the new file, never a part."""
    path, temporary = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode("utf8") if isinstance(content, str) else content)
        temporary.chmod(0o644)  # NamedTemporaryFile makes private files, but users share plans and reports
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror or error}; choose a writable directory") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path
