"""Folders are written whole or not at all, whatever fails on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import write_adapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_torch

import para_ext
from para_ext.errors import ParaError
from para_ext.formats import output
from para_ext.formats.output import copy_along, write_file, write_folder, write_safetensors

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def fill(text: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for name in ADAPTER:
            (folder / name).write_text(text)
        return {"said": text}

    return write


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> str | None:
    """The version that a folder holds whole, or None."""
    texts = {(folder / name).read_text() if (folder / name).is_file() else None for name in ADAPTER}
    return texts.pop() if len(texts) == 1 else None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    fill("source")(folder)
    return folder


def test_a_new_folder_and_its_parents(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "a" / "b"
    write_folder(out, fill("new"), overwrite=False, sources=[source])
    assert content(out) == "new"
    assert names_in(out.parent) == ["b"]
    assert content(source) == "source"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_permissions_are_those_of_the_umask(tmp_path: Path, source: Path) -> None:
    def tensors(folder: Path) -> dict[str, Any]:
        write_safetensors(folder / ADAPTER[1], {"x": np.zeros(1)}, {})
        return {}

    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "out", tensors, overwrite=False, sources=[source])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / ADAPTER[1]).stat().st_mode) == 0o640


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    with pytest.raises(ParaError, match="exists: give a new folder, or overwrite=True"):
        write_folder(out, fill("new"), overwrite=False, sources=[source])
    assert content(out) == "old"
    write_folder(out, fill("new"), overwrite=True, sources=[source])
    assert names_in(out) == [*sorted(ADAPTER), "para_ext.json"]
    assert json.loads((out / "para_ext.json").read_text())["said"] == "new"
    assert names_in(tmp_path) == ["adapter", "out"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", fill("new"), overwrite=True, sources=[source])


@pytest.mark.parametrize(
    "extra", ["optimizer.pt", "README.md", "adapter_model.bin", "checkpoint-5/", "README.md -> link"]
)
def test_overwrite_keeps_what_it_did_not_write(tmp_path: Path, source: Path, extra: str) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    name = extra.split(" ")[0].rstrip("/")
    if extra.endswith("/"):
        (out / name).mkdir()
    elif extra.endswith("link"):
        (out / name).symlink_to(source / ADAPTER[0])
    else:
        (out / name).write_text("precious")
    with pytest.raises(ParaError, match=f"also holds {name}.*move that away"):
        write_folder(out, fill("new"), overwrite=True, sources=[source])
    assert content(out) == "old"
    assert (out / name).exists()


@pytest.mark.parametrize("name", ADAPTER)
@pytest.mark.parametrize("change", ["other", "longer", "link"])
def test_overwrite_keeps_what_was_changed(tmp_path: Path, source: Path, name: str, change: str) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    file = out / name
    if change == "link":
        file.rename(tmp_path / "moved")
        file.symlink_to(tmp_path / "moved")
    else:
        file.write_text("odl" if change == "other" else "old, retrained")
    before = file.read_text()
    with pytest.raises(ParaError, match=rf"{name}(?s:.*)does not replace it"):
        write_folder(out, fill("new"), overwrite=True, sources=[source])
    assert file.read_text() == before


def test_overwrite_replaces_only_what_para_ext_wrote(tmp_path: Path, source: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis").write_text("precious")
    for record in (None, "{}", "[]", "null", "{", '{"files": 3}', '{"files": ["thesis"]}', "[" * 100_000):
        if record is not None:
            (tmp_path / "notes" / "para_ext.json").write_text(record)
        with pytest.raises(ParaError, match="was not written by para-ext"):
            write_folder(tmp_path / "notes", fill("new"), overwrite=True, sources=[source])
    for files in ("{}", '{"thesis": {}}', '{"thesis": null}', '{"thesis": {"bytes": 8, "start_sha256": "0"}}'):
        (tmp_path / "notes" / "para_ext.json").write_text(f'{{"files": {files}}}')
        with pytest.raises(ParaError, match="does not replace it"):
            write_folder(tmp_path / "notes", fill("new"), overwrite=True, sources=[source])
    assert (tmp_path / "notes" / "thesis").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(ParaError, match="is not a folder"):
        write_folder(tmp_path / "file", fill("new"), overwrite=True, sources=[source])
    other = tmp_path / "other"
    write_folder(other, fill("old"), overwrite=False, sources=[source])
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(ParaError, match="is not a folder"):
        write_folder(tmp_path / "link", fill("new"), overwrite=True, sources=[source])
    assert content(other) == "old"


def test_a_file_is_compared_whole_but_for_tensors(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"

    def write(folder: Path) -> dict[str, Any]:
        (folder / "tokenizer.json").write_bytes(bytes(3 << 20))
        return fill("old")(folder)

    write_folder(out, write, overwrite=False, sources=[source])
    with (out / "tokenizer.json").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"mine")
    with pytest.raises(ParaError, match=r"tokenizer\.json has been changed since"):
        write_folder(out, fill("new"), overwrite=True, sources=[source])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("name", ["para_ext.json", ADAPTER[0]])
def test_a_pipe_is_not_read(tmp_path: Path, source: Path, name: str) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises(ParaError, match="does not replace it"):
        write_folder(out, fill("new"), overwrite=True, sources=[source])


def test_names_that_are_long_or_no_names(tmp_path: Path, source: Path) -> None:
    for name in ("名" * 84, "🦙" * 62, "x" * 255):
        for _ in range(2):
            write_folder(tmp_path / name, fill("new"), overwrite=True, sources=[source])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop/x", "x\0y"):
        with pytest.raises(ParaError, match=r"is no path that a file can have|could not be (written|read)"):
            write_folder(tmp_path / name, fill("new"), overwrite=False, sources=[source])


def test_what_cannot_be_put_back_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer comes between the two renames, while what was there turns out to be someone's."""
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    rename = Path.rename

    def raced(self: Path, target: Path) -> Path:
        if self == out:
            (out / "mine").write_text("precious")
            result = rename(self, target)
            out.mkdir()
            (out / "other").write_text("")
            return result
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", raced)
    with pytest.raises(ParaError, match=r"is another one now, and what it held before is at '(.*)'") as refusal:
        write_folder(out, fill("new"), overwrite=True, sources=[source])
    kept = Path(str(refusal.value).split("is at '")[1].split("'")[0])
    assert (kept / "mine").read_text() == "precious"
    assert content(kept) == "old"


def test_an_interrupt_while_the_old_version_goes(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    rmtree, calls = shutil.rmtree, 0

    def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, fill("new"), overwrite=True, sources=[source])
    assert content(out) == "new"
    assert names_in(tmp_path) == ["adapter", "out"]


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path: Path, source: Path) -> None:
    def write(folder: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "base" / "config.json"))

    with pytest.raises(ParaError, match=r"config\.json' could not be read"):
        write_folder(tmp_path / "out", write, overwrite=False, sources=[source])


@pytest.mark.parametrize(("before", "overwrite"), [(False, False), (False, True), (True, True)])
def test_what_comes_while_it_is_written_is_kept(tmp_path: Path, source: Path, before: bool, overwrite: bool) -> None:
    out = tmp_path / "out"
    if before:
        write_folder(out, fill("old"), overwrite=False, sources=[source])

    def write(folder: Path) -> dict[str, Any]:
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("precious")
        return fill("new")(folder)

    with pytest.raises(ParaError):
        write_folder(out, write, overwrite=overwrite, sources=[source])
    assert (out / "mine").read_text() == "precious"
    if before:
        assert content(out) == "old"
    assert names_in(tmp_path) == ["adapter", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_comes_while_one_is_written_is_kept(tmp_path: Path, source: Path, overwrite: bool) -> None:
    out = tmp_path / "out.safetensors"

    def write(folder: Path) -> None:
        (folder / "x").write_text("new")
        out.write_text("precious")

    with pytest.raises(ParaError, match=r"exists|was not written by para-ext"):
        write_file(out, "x", write, overwrite=overwrite, sources=[source])
    assert out.read_text() == "precious"
    assert names_in(tmp_path) == ["adapter", "out.safetensors"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("adapter", "is what is read"),
        ("adapter/small", "lies inside"),
        (".", "holds '.*', which is read"),
        ("link", "is what is read"),
        ("link/small", "lies inside"),
        ("adapter/../adapter", "is what is read"),
    ],
)
def test_out_is_apart_from_the_adapter(tmp_path: Path, source: Path, out: str, words: str) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ParaError, match=words):
        write_folder(tmp_path / out, fill("new"), overwrite=True, sources=[source])
    assert content(source) == "source"
    assert names_in(source) == sorted(ADAPTER)


STEPS = ("mkdir", "rename", "fsync", "rmdir", "unlink")


def failing_at(step: int, fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the step-th system call that changes something fail; returns the calls made so far."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) == step:
                fail()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return calls


def steps_of_an_overwrite(tmp_path: Path, source: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        write_folder(tmp_path / "count", fill("old"), overwrite=False, sources=[source])
        calls = failing_at(0, lambda: None, patch)
        write_folder(tmp_path / "count", fill("new"), overwrite=True, sources=[source])
    assert {"mkdir", "rename", "fsync", "rmdir"} <= set(calls)
    return len(calls)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failure_at_any_step_changes_nothing(tmp_path: Path, source: Path, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for step in range(1, steps_of_an_overwrite(tmp_path, source) + 1):
        out = tmp_path / str(step) / "out"
        write_folder(out, fill("old"), overwrite=False, sources=[source])
        with pytest.MonkeyPatch.context() as patch:
            calls = failing_at(step, fail, patch)
            with pytest.raises(ParaError) as refusal:
                write_folder(out, fill("new"), overwrite=True, sources=[source])
            failed = calls[step - 1]
        if failed in ("rmdir", "unlink"):  # of the old version, when the new one is in place
            assert "is written" in str(refusal.value)
            assert content(out) == "new"
        else:
            assert ("no space left" if code == errno.ENOSPC else "could not be written") in str(refusal.value)
            assert content(out) == "old"
            assert names_in(out.parent) == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash is tried in a forked process")
def test_a_crash_at_any_step_leaves_one_whole_version(tmp_path: Path, source: Path) -> None:
    for step in range(1, steps_of_an_overwrite(tmp_path, source) + 1):
        out = tmp_path / str(step) / "out"
        write_folder(out, fill("old"), overwrite=False, sources=[source])
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                failing_at(step, lambda: os._exit(3), patch)
                write_folder(out, fill("new"), overwrite=True, sources=[source])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        folders = list(out.parent.iterdir())
        assert {"old", "new"} & {content(folder) for folder in folders}
        assert out in folders or any(folder.suffix == ".new" and content(folder) == "new" for folder in folders)


def test_a_failing_writer_leaves_nothing(tmp_path: Path, source: Path) -> None:
    def write(folder: Path) -> dict[str, Any]:
        fill("new")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "a" / "out", write, overwrite=False, sources=[source])
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_errors_of_the_safetensors_library(
    tmp_path: Path, source: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_file(*_: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    def write(folder: Path) -> dict[str, Any]:
        write_safetensors(folder / ADAPTER[1], {"x": np.zeros(4)}, {"format": "pt"})
        return {}

    monkeypatch.setattr(output, "save_file", save_file)
    with pytest.raises(ParaError, match="no space left.*free some" if code == errno.ENOSPC else os.strerror(code)):
        write_folder(tmp_path / "out", write, overwrite=False, sources=[source])
    assert names_in(tmp_path) == ["adapter"]


def test_what_goes_along(tmp_path: Path, source: Path) -> None:
    along = [
        "README.md",
        "LICENSE.txt",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "vocab.json",
    ]
    left = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", "notes"]
    for name in [*along, *left, "adapter_model.bin", "para_ext.json"]:
        (source / name).write_text(name)
    (source / "merges.txt").symlink_to(source / "notes")
    (source / "runs").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    assert copy_along(source, target) == sorted([*left, "merges.txt", "runs"])
    assert names_in(target) == sorted(along)
    assert (target / "README.md").read_text() == "README.md"


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    metadata = {"format": "pt", "ä": '"\n\x01', **{str(i): "x" for i in range(9)}}
    arena = np.arange(12.0)
    files = []
    for i in range(4):
        write_safetensors(tmp_path / str(i), {"b": arena[:6].reshape(2, 3), "a": arena[6:]}, metadata)
        files.append((tmp_path / str(i)).read_bytes())
    assert len(set(files)) == 1
    with safe_open(tmp_path / "0", framework="numpy") as file:
        assert file.metadata() == metadata
        assert np.array_equal(file.get_tensor("b"), arena[:6].reshape(2, 3))


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_right_after_a_rename_leaves_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    out = tmp_path / "out"
    write_folder(out, fill("old"), overwrite=False, sources=[source])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    rename, calls = Path.rename, 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        result = rename(self, target)
        if calls == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, fill("new"), overwrite=True, sources=[source])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_dots_in_the_path_make_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_folder(tmp_path / "nope" / ".." / "out", fill("x"), overwrite=False, sources=[source])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_overwrite_spares_what_is_not_ours(tmp_path: Path) -> None:
    """A model's weights beside an adapter, and a file that para_ext did not write, are not replaced."""
    adapter = write_adapter(tmp_path / "adapter")
    out = tmp_path / "out"
    para_ext.compress_adapter(adapter, out, keep=0.5)
    (out / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ParaError, match=r"also holds model\.safetensors"):
        para_ext.compress_adapter(adapter, out, keep=0.5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"weights"

    style = tmp_path / "style.safetensors"
    pair = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    save_torch(pair, style)
    foreign = tmp_path / "model.safetensors"
    for note in (None, {"note": "as para_ext"}):
        save_torch({"w": torch.ones(3), "para_ext": torch.ones(1)}, foreign, note)
        before = foreign.read_bytes()
        with pytest.raises(ParaError, match="was not written by para-ext"):
            para_ext.compress_adapter(style, foreign, keep=1.0, overwrite=True)
        assert foreign.read_bytes() == before
    foreign.write_text("my notes on para_ext")
    with pytest.raises(ParaError, match="was not written by para-ext"):
        para_ext.compress_adapter(style, foreign, keep=1.0, overwrite=True)
    small = tmp_path / "small.safetensors"
    for _ in range(2):
        para_ext.compress_adapter(style, small, keep=1.0, overwrite=True)
