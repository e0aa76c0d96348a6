"""A text file that is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import ParaError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside ``path``, flush it to disk, and rename it.

    Raises:
        ParaError: when the file cannot be written; what was at ``path`` is still there then.
    """
    beside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ParaError(f"{path} cannot be written, {error.strerror}: choose another place or make room") from error
    finally:
        with suppress(OSError):  # already renamed, or never made
            beside.unlink()
