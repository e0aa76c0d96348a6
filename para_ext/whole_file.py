"""A text file that is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import ParaError


def check_new(path: Path, adapters: Iterable[Path], option: str, *, overwrite: bool) -> None:
    """Refuse a file, before any work, that can't be written or would be part of an adapter; ``option`` is its name."""
    if any(path.resolve().is_relative_to(adapter.resolve()) for adapter in adapters):
        raise ParaError(f"'{path}' lies inside an adapter: give {option} a place elsewhere")
    if path.is_dir():
        raise ParaError(f"'{path}' is a folder: give {option} the name of a file")
    if path.exists() and not overwrite:
        raise ParaError(f"'{path}' exists: give another {option}, or overwrite=True")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ParaError(f"'{path.parent}' is not a folder that can be written to: give another {option}")


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
        raise ParaError(f"'{path}' cannot be written, {error.strerror}: choose another place or make room") from error
    finally:
        with suppress(OSError):  # already renamed, or never made
            beside.unlink()
