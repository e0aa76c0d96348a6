"""Writing a result whole or not at all: a folder appears under its name only when every byte of it is on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import ParaError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
SIDECAR = "para_ext.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"
SINGLE = "lora.safetensors"
MLX = "adapters.safetensors"
GGUF = "adapter.gguf"
_REPLACED = (CONFIG, SIDECAR, WEIGHTS, PICKLED)
_TENSORS = (".safetensors", ".gguf")
_START = 1 << 20  # of our tensor files, what is hashed: their header stands there, which no other tool writes so

# What belongs to an adapter beside its weights: model card, licence, tokenizer, processor, chat template.
_CARDS = ("README.md", "LICENSE*", "NOTICE*")
_ALONG = (
    *_CARDS,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "*.chat_template.jinja",
)  # fmt: skip


def write_folder(
    out: Path, write: Callable[[Path], Mapping[str, Any]], *, overwrite: bool, sources: Sequence[Path]
) -> None:
    """Let ``write`` fill a new folder beside ``out``, flush it to disk, and give it the name ``out``.

    An interrupted call leaves one whole version: ``out`` itself, or, between two renames, the hidden folders
    ``.<out>.<number>.old`` and ``.new``.

    Args:
        out: the folder to make; missing parents are made too.
        write: fills the folder it is given, and returns what para_ext.json says; a record of the files is added.
        overwrite: replace ``out`` if every file in it is as this function wrote it, by that record.
        sources: what is read; ``out`` may not be one of them, lie in one or hold one.

    Raises:
        ParaError: refused, or it could not be written; then nothing has changed.
    """
    if ".." in out.parts:
        out = out.resolve()  # "a/../b" must not make a
    check_out(out, overwrite=overwrite, sources=sources)
    with _one_line(out):
        with _parents(out), _temporary(out) as (new, old):
            said = write(new)
            write_json(new / SIDECAR, {**said, "files": {path.name: _identity(path) for path in sorted(new.iterdir())}})
            _flush(new)
            try:
                if os.path.lexists(out):
                    out.rename(old)
                    _check_replaceable(old, out, overwrite)  # again: someone may have worked in it meanwhile
                new.rename(out)
                _flush_folder(out.parent)
            except BaseException:
                # An interrupt may come right after a rename: what lies where tells how far it got.
                if not new.exists():
                    out.rename(new)
                if os.path.lexists(old):
                    _put_back(old, out)
                raise
        if old.exists():
            _remove_old(out, old)


def write_file(
    out: Path, name: str, write: Callable[[Path], object], *, overwrite: bool, sources: Sequence[Path]
) -> None:
    """As :func:`write_folder` for a single file: ``write`` makes it under ``name`` in the folder it is given."""
    if ".." in out.parts:
        out = out.resolve()
    check_out(out, overwrite=overwrite, sources=sources, file=True)
    with _one_line(out), _parents(out), _temporary(out) as (new, _):
        write(new)
        _flush(new)
        check_out(out, overwrite=overwrite, sources=sources, file=True)
        (new / name).replace(out)
        _flush_folder(out.parent)
        new.rmdir()


def check_out(out: Path, *, overwrite: bool, sources: Sequence[Path], file: bool = False) -> None:
    """Refuse to write ``out`` where that would touch a source, or replace what may not be (see `write_folder`)."""
    with _one_line(out):
        for source in sources:
            _check_apart(out, source)
        if not os.path.lexists(out):
            return
        if file:
            _check_replaceable_file(out, overwrite)
        else:
            _check_replaceable(out, out, overwrite)


def copy_along(source: Path, target: Path, own: str = WEIGHTS) -> list[str]:
    """Copy model card, tokenizer, processor and chat-template files; regular files only, and links of a hub's cache.

    A card or licence that is in ``target`` already stays: it is that of a base model.

    Args:
        own: name of the source's tensor file.

    Returns:
        The names in ``source`` that were left out, in order; the adapter's own files, which are written anew, are not
        among them.
    """
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name in _REPLACED or path.name == own:
            continue
        stands = (target / path.name).exists() and _matches(path.name, _CARDS)
        if goes_along(path.name) and holds_itself(path) and not stands:
            shutil.copyfile(path, target / path.name)
        else:
            left_out.append(path.name)
    return left_out


def write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write contiguous arrays; the same input gives the same bytes.

    Raises:
        OSError: the file could not be written.
    """
    try:
        save_file(dict(arrays), path, dict(metadata))
    except SafetensorError as e:
        # The library reports the system's error only in its text: "... (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(e))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from e
    # The library writes a private temporary file and renames it; the folder's mode tells what the umask allows.
    path.chmod(path.parent.stat().st_mode & 0o666)
    _sort_metadata(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, in place: the library keeps it in a randomly ordered map."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def goes_along(name: str) -> bool:
    """Whether a file of this name belongs to an adapter beside its own files."""
    return _matches(name, _ALONG)


def holds_itself(path: Path) -> bool:
    """Whether it is a regular file, or a link as a hub's cache has them: to ``blobs`` of its repository, or of all."""
    if not path.is_symlink():
        return path.is_file()
    snapshots = path.parent.resolve().parent
    stores = [snapshots.parent / "blobs", snapshots.parents[1] / "blobs"] if snapshots.name == "snapshots" else []
    blob = path.resolve()
    return blob.is_file() and any(blob.is_relative_to(store) for store in stores)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_apart(out: Path, source: Path) -> None:
    try:
        to, origin = out.resolve(), source.resolve()
    except (RuntimeError, ValueError) as e:  # links that lead round in circles, up to Python 3.12; a NUL
        raise ParaError(f"'{out}' is no path that a file can have ({e}): give another one") from e
    if to == origin:
        raise ParaError(f"'{out}' is what is read: give another name for the result")
    if to.is_relative_to(origin):
        raise ParaError(f"'{out}' lies inside '{source}', which is read: give a name outside it for the result")
    if origin.is_relative_to(to):
        raise ParaError(f"'{out}' holds '{source}', which is read: give another name for the result")


def _check_replaceable(folder: Path, out: Path, overwrite: bool) -> None:
    """Refuse to replace ``out``, which lies at ``folder``, unless nothing but our own unchanged files would be lost."""
    if not overwrite:
        raise ParaError(f"'{out}' exists: give a new folder, or overwrite=True to replace the adapter in it")
    if folder.is_symlink() or not folder.is_dir():
        raise ParaError(f"'{out}' is not a folder, so overwrite=True does not replace it: give another one")
    entries = sorted(folder.iterdir())
    recorded = _recorded(folder / SIDECAR)
    if entries and not recorded:
        raise ParaError(
            f"'{out}' was not written by para-ext, so overwrite=True does not replace it: move it away first"
        )
    foreign = [path for path in entries if path.name not in {*recorded, SIDECAR} or not _is_plain(path)]
    if foreign:
        raise ParaError(
            f"'{out}' also holds {_listed(foreign)}, so overwrite=True does not replace it: move that away first"
        )
    changed = [path for path in entries if path.name != SIDECAR and _identity(path) != recorded[path.name]]
    if changed:
        raise ParaError(
            f"'{out}' was written by para-ext, but {_listed(changed)} has been changed since, so overwrite=True does "
            "not replace it: move it away first"
        )


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _check_replaceable_file(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ParaError(f"'{out}' exists: give a new name, or overwrite=True to replace it")
    if out.is_symlink() or not out.is_file():
        raise ParaError(f"'{out}' is not a regular file, so overwrite=True does not replace it: give another one")
    if not _says_ours(out):
        raise ParaError(
            f"'{out}' was not written by para-ext, so overwrite=True does not replace it: move it away first"
        )


def _says_ours(path: Path) -> bool:
    """Whether a single file has our text in its header."""
    with path.open("rb") as file:
        start = file.read(_START)
    if start[:4] == b"GGUF":
        return b"para_ext" in start
    try:
        with safe_open(path, framework="numpy") as tensors:
            return "para_ext" in (tensors.metadata() or {})
    except SafetensorError:
        return False


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _identity(path: Path) -> dict[str, Any]:
    """What para_ext.json records of a file beside it, to tell later whether it is still that file."""
    start = path.suffix in _TENSORS
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_START if start else -1)).hexdigest()
    return {"bytes": path.stat().st_size, "start_sha256" if start else "sha256": digest}


def _recorded(sidecar: Path) -> Mapping[str, Any]:
    """The record of the files that were written along with para_ext.json; empty where there is none."""
    try:
        files = json.loads(sidecar.read_text(encoding="utf-8"))["files"] if _is_plain(sidecar) else {}
        return files if isinstance(files, dict) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


@contextlib.contextmanager
def _one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ParaError(f"no space left to write '{out}': free some, or give a folder on another disk") from e
        if e.filename and not _is_output(Path(os.fsdecode(e.filename)), out):
            reason = e.strerror or e
            raise ParaError(f"'{os.fsdecode(e.filename)}' could not be read ({reason}): make it readable") from e
        raise ParaError(f"'{out}' could not be written ({e.strerror or e}): give a folder that can be") from e


def _is_output(path: Path, out: Path) -> bool:
    """Whether it is of what is written: a parent, ``out`` or its hidden twins, or in these."""
    if path in out.parents:
        return True
    below = path.relative_to(out.parent).parts[0] if path.is_relative_to(out.parent) else ""
    return below == out.name or below.startswith(_stem(out))


def _stem(out: Path) -> str:
    """What the hidden twins' names begin with, short enough for file systems that allow 255 bytes."""
    return f".{os.fsencode(out.name)[:100].decode(errors='ignore')}."


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the missing parents of ``out``, and take them back on failure."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[tuple[Path, Path]]:
    """A new hidden folder beside ``out``, removed on failure, and a free name for the old one."""
    stem = out.parent / f"{_stem(out)}{secrets.token_hex(4)}"
    new, old = Path(f"{stem}.new"), Path(f"{stem}.old")
    try:
        new.mkdir()  # not tempfile.mkdtemp, which would ignore the umask
        yield new, old
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _put_back(old: Path, out: Path) -> None:
    try:
        old.rename(out)
    except OSError as e:
        raise ParaError(f"'{out}' is another one now, and what it held before is at '{old}': look at both") from e


def _remove_old(out: Path, old: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as e:
        raise ParaError(f"'{out}' is written, but what it replaced is still at '{old}': remove that folder") from e
    except BaseException:  # an interrupt: what is written stays, so what it replaced must go
        shutil.rmtree(old, ignore_errors=True)
        raise


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and needs no flush of one
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
