"""Ids on the Hugging Face Hub: ``user/name``, ``user/name@revision``, ``user/name/file.safetensors`` as paths.

Everything goes through huggingface_hub, so that its cache, token and settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE) hold here too. A repository's names are untrusted: only files at its top are fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ParaError, first_line
from .adapter import FILE_SUFFIXES

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_FILE = rf"\w[^/\\:@]*(?:{'|'.join(map(re.escape, FILE_SUFFIXES))})"
_ID = re.compile(
    rf"(?P<repository>{_NAME}/(?!{_FILE}(?:@|$)){_NAME})(?:/(?P<file>{_FILE}))?(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)

_SECONDS = 10  # how long the Hub may take to say which files there are

Needed = Callable[[str, Sequence[str], str | None], Sequence[str]]
"""Which files to fetch, one at least: of the id, the names at the repository's top, and the one that was named."""


def located(source: str | Path, needed: Needed) -> Path:
    """Where it lies: ``source`` itself, or, of a str that is nothing on the disk but an id, the folder in the cache.

    Raises:
        ParaError: it is empty, huggingface_hub is not installed, or the Hub doesn't give the files.
    """
    if source == "":
        raise ParaError("an empty path was given: name a folder or file")  # to pathlib it would be where we are
    if isinstance(source, Path) or os.path.lexists(source):
        return Path(source)
    found = _ID.fullmatch(source)
    if found is None or ".." in source or source.endswith(".json"):
        return Path(source)
    repository, file, revision = found["repository"], found["file"], found["revision"]
    folder = Path(repository).parent
    if revision is None and folder.is_dir():  # a mistyped path looks like an id
        raise ParaError(
            f"'{source}' does not exist, but the folder '{folder}' does: give a path that exists, or for an id on the "
            f"Hugging Face Hub a revision too, such as {source}@main"
        )
    try:
        import huggingface_hub as hub
    except ImportError as e:
        raise ParaError(
            f"'{source}' does not exist; if it is an id on the Hugging Face Hub: pip install 'para_ext[hub]'"
        ) from e
    try:
        try:
            info = hub.HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
        except Exception:  # no network, or no access: perhaps it was fetched before
            place = _cached(hub, repository, revision)
            if place is None:
                raise
        else:
            names = [sibling.rfilename for sibling in info.siblings or []]
            wanted = needed(source, [name for name in names if re.fullmatch(r"[^./\\:][^/\\:]*", name)], file)
            place = _fetched(hub, repository, revision, wanted)
    except ParaError:
        raise
    except Exception as e:  # by version and network stack it may be nearly anything
        raise ParaError(_refusal(hub, source, e)) from e
    return place / file if file else place


def _fetched(hub: Any, repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """One after the other, in this thread: so an interrupt need not wait for the others."""
    folder = Path(hub.hf_hub_download(repository, names[0], revision=revision)).parent
    for name in names[1:]:
        hub.hf_hub_download(repository, name, revision=folder.name)  # of the same commit, which is the folder's name
    return folder


def _cached(hub: Any, repository: str, revision: str | None) -> Path | None:
    try:
        # No patterns: the files that are there may be all that is needed.
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
    except Exception:
        return None


def _refusal(hub: Any, source: str, error: Exception) -> str:
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return f"'{source}' is gated on the Hugging Face Hub: ask for access on its page there, then set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"'{source}' is no revision that its repository on the Hugging Face Hub has: give a branch, tag or commit"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            f"'{source}' does not exist here, and no such repository can be seen on the Hugging Face Hub: check the "
            "path or the id, and for a private one set HF_TOKEN"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"'{source}' exists neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set: unset it"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return (
        f"'{source}' does not exist here and could not be fetched from the Hugging Face Hub ({type(cause).__name__}: "
        f"{first_line(cause)}): check the network, or give a folder"
    )
