"""Ids on the Hub: what is fetched, what is not, and that what can't be had is one line; by the real huggingface_hub."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import contents, factors, write_adapter
from hub import Hub, commit, files_of, run, serving
from safetensors.numpy import save
from safetensors.torch import load_file

import para_ext
from para_ext.formats import read_adapter
from para_ext.formats.output import copy_along

pytest.importorskip("huggingface_hub")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The adapter that the Hub has, in a folder."""
    folder = write_adapter(tmp_path / "local")
    (folder / "README.md").write_text("# an adapter")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def kohya(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for i in range(4):
        stem = f"lora_unet_down_blocks_0_attentions_{i}_proj_in"
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((8, 32), np.float32)
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((48, 8), np.float32)
        tensors[f"{stem}.alpha"] = np.float32(4)
    return save({key: np.asarray(value) for key, value in tensors.items()})


def test_an_id_is_as_good_as_the_folder(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    """Only what an adapter consists of is fetched; the output is the same, and no link."""
    others = {
        "adapter_model.bin": b"pickle", "optimizer.pt": b"pickle", "training_args.bin": b"pickle",
        ".gitattributes": b"", "checkpoint-5/adapter_model.safetensors": b"",
    }  # fmt: skip
    hub.repositories["user/adapter"] = {"main": {**files_of(local), **others}}
    code, out, err = run(
        home, "compress", "user/adapter", tmp_path / "small", "--keep", "0.5", "--json", hub=hub, HF_TOKEN="hf_secret"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["source"] == "user/adapter"
    assert hub.fetched() == {WEIGHTS, CONFIG, "README.md", "tokenizer.json"}
    assert hub.tokens == {"Bearer hf_secret"}
    para_ext.compress_adapter(local, tmp_path / "same", keep=0.5)
    small, same = contents(tmp_path / "small"), contents(tmp_path / "same")
    assert small.keys() == same.keys()
    assert all(small[name] == same[name] for name in small if name != "para_ext.json")  # has the source's name
    assert not any(path.is_symlink() for path in (tmp_path / "small").iterdir())


def test_what_was_fetched_is_not_fetched_again_and_serves_offline(
    hub: Hub, home: Path, local: Path, tmp_path: Path
) -> None:
    hub.repositories["user/adapter"] = {"main": files_of(local)}
    assert run(home, "inspect", "user/adapter", hub=hub)[0] == 0
    hub.asked.clear()
    online = run(home, "inspect", "user/adapter", "--json", hub=hub)
    assert not hub.fetched()
    offline = run(home, "inspect", "user/adapter", "--json")
    gone = run(home, "inspect", "user/adapter", "--json", hub=Hub(url="http://127.0.0.1:9"))
    assert online[0] == 0
    assert online == offline == gone


def test_a_revision(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors(seed=1))
    hub.repositories["user/adapter"] = {
        "main": files_of(local), "v1.0": files_of(other), "refs/pr/2": files_of(other),
    }  # fmt: skip
    norm = {"": para_ext.decompose(local).spectra.energy ** 0.5}
    norm |= dict.fromkeys(
        ("@v1.0", "@refs/pr/2", f"@{commit('v1.0')}"), para_ext.decompose(other).spectra.energy ** 0.5
    )
    for revision, expected in norm.items():
        code, out, err = run(home, "inspect", f"user/adapter{revision}", "--json", hub=hub)
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert (document["source"], document["norm"]) == (f"user/adapter{revision}", expected)
    code, _, err = run(home, "inspect", "user/adapter@v9", hub=hub)
    assert (code, err.count("\n")) == (1, 1)
    assert "'user/adapter@v9' is no revision" in err


def test_one_file_of_several(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.repositories["user/loras"] = {"main": {"a.safetensors": kohya(1), "b.safetensors": kohya(2), "README.md": b""}}
    code, _, err = run(home, "inspect", "user/loras", hub=hub)
    assert code == 1
    assert "has 2 tensor files: give one of them, such as user/loras/a.safetensors" in err
    code, _, err = run(home, "inspect", "user/loras/c.safetensors", hub=hub)
    assert code == 1
    assert "'user/loras/c.safetensors' names a file that its repository does not have" in err
    assert not hub.fetched()
    out = tmp_path / "small.safetensors"
    assert run(home, "compress", "user/loras/b.safetensors@main", out, "--keep", "0.5", hub=hub)[::2] == (0, "")
    assert hub.fetched() == {"b.safetensors"}
    assert out.is_file() and not out.is_symlink()
    hub.repositories["user/one"] = {"main": {"style.safetensors": kohya(1)}}
    assert run(home, "inspect", "user/one", hub=hub)[0] == 0


def test_what_the_hub_refuses_is_one_line(hub: Hub, home: Path, local: Path) -> None:
    hub.repositories |= {"user/gated": {"main": files_of(local)}, "user/empty": {"main": {"README.md": b""}}}
    hub.repositories["user/broken"] = {"main": files_of(local)}
    hub.refused = {"user/gated": (403, "GatedRepo"), "user/broken": (403, "")}
    for name, words in {
        "user/gated": "is gated on the Hugging Face Hub: ask for access",
        "user/missing": "does not exist here, and no such repository can be seen on the Hugging Face Hub",
        "user/empty": "has no tensor file at its top",
        "user/broken": "does not exist here and could not be fetched from the Hugging Face Hub (HfHubHTTPError: 403",
    }.items():
        code, out, err = run(home, "inspect", name, hub=hub)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"para-ext: '{name}' {words}" in err


def test_without_a_network_it_is_one_line(home: Path) -> None:
    code, _, err = run(home, "inspect", "user/adapter")
    assert (code, err.count("\n")) == (1, 1)
    assert "'user/adapter' exists neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set" in err
    code, _, err = run(home, "inspect", "user/adapter", hub=Hub(url="http://127.0.0.1:9"))
    assert (code, err.count("\n")) == (1, 1)
    assert "could not be fetched" in err and "check the network" in err


def test_without_the_library_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(para_ext.ParaError, match=r"^'user/adapter' does not exist.*pip install 'para_ext\[hub\]'$"):
        para_ext.decompose("user/adapter")


@pytest.mark.parametrize(
    "name",
    [
        "adapter", "./user/adapter", "user/adapter/", "a/user/adapter", "/user/adapter", "~/adapter", "../adapter",
        "user/..", "user/adapter@../../x", "user/adapter@", "user/adapter.safetensors", "user/adapter.gguf",
        "user/x.json", "user/ad apter", "user/adapter/../x.safetensors", "user/adapter/.safetensors", "user\\adapter",
        "user/adapter\n", "", "user/adapter/sub/x.safetensors", Path("user/adapter"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_names_are_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str | Path) -> None:
    """And their error is that of a path: the library is not even imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(para_ext.ParaError) as refusal:
        read_adapter(name)
    assert "Hub" not in str(refusal.value)


def test_what_is_on_the_disk_goes_first(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    hub.repositories["user/adapter"] = {"main": {}}
    write_adapter(tmp_path / "user" / "adapter", factors(seed=1))
    assert run(home, "inspect", "user/adapter", hub=hub, cwd=tmp_path)[0] == 0
    assert hub.asked == []


def test_a_mistyped_path_is_not_asked_for(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    """Where its folder is here; with a revision it is an id even so."""
    hub.repositories["user/adapter"] = {"main": files_of(local)}
    (tmp_path / "user").mkdir()
    code, _, err = run(home, "inspect", "user/adapter", hub=hub, cwd=tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "'user/adapter' does not exist, but the folder 'user' does" in err and "user/adapter@main" in err
    assert hub.asked == []
    assert run(home, "inspect", "user/adapter@main", hub=hub, cwd=tmp_path)[0] == 0


def test_a_part_of_a_folder_is_refused_by_its_id(hub: Hub, home: Path, local: Path) -> None:
    hub.repositories["user/adapter"] = {"main": files_of(local)}
    code, _, err = run(home, "inspect", f"user/adapter/{WEIGHTS}@main", hub=hub)
    assert code == 1
    assert (
        f"'user/adapter/{WEIGHTS}@main' is the tensor file of an adapter: give its repository, user/adapter@main\n"
        in err
    )


def test_names_that_lead_out_are_not_fetched(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    evil = {
        "../README.md": b"x",
        "..\\README.md": b"x",
        "C:README.md": b"x",
        "/tokenizer.json": b"x",
        "a/LICENSE": b"x",
    }
    hub.repositories["user/adapter"] = {"main": {**evil, **files_of(local)}}
    assert run(home, "compress", "user/adapter", tmp_path / "small", hub=hub)[0] == 0
    assert hub.fetched() == {WEIGHTS, CONFIG, "README.md", "tokenizer.json"}


def in_cache(home: Path, name: str, files: dict[str, bytes], shared: bool = False) -> Path:
    """A repository as huggingface_hub keeps it: snapshots of links into blobs, its own or those of the whole cache."""
    cache = home / "hub"
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit("main"), (cache if shared else repository) / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit("main"))
    for file, content in files.items():
        (blobs / commit(file)).write_bytes(content)
        (snapshot / file).symlink_to(os.path.relpath(blobs / commit(file), snapshot))
    return snapshot


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
@pytest.mark.parametrize("shared", [False, True])
def test_offline_from_a_cache_that_others_filled(home: Path, local: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = in_cache(home, "user/adapter", {**files_of(local), "optimizer.pt": b"x"}, shared)
    code, out, err = run(home, "compress", "user/adapter", tmp_path / "small", "--keep", "0.5", "--json")
    assert (code, err) == (0, "")
    assert "Not copied: optimizer.pt." in json.loads(out)["notes"]
    assert (tmp_path / "small" / "README.md").read_text() == "# an adapter"
    assert not any(path.is_symlink() for path in (tmp_path / "small").iterdir())
    assert run(home, "compress", snapshot, tmp_path / "same", "--keep", "0.5")[0] == 0  # the folder itself, too
    assert (tmp_path / "same" / "README.md").read_bytes() == (tmp_path / "small" / "README.md").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
def test_links_that_lead_out_of_a_cache_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    snapshot = in_cache(tmp_path, "user/adapter", {"README.md": b"mine"})
    (snapshot / "LICENSE").symlink_to(secret)
    (snapshot / "NOTICE").symlink_to(snapshot.parents[1] / "blobs" / "link")
    (snapshot.parents[1] / "blobs" / "link").symlink_to(secret)
    out = tmp_path / "out"
    out.mkdir()
    assert copy_along(snapshot, out) == ["LICENSE", "NOTICE"]
    assert contents(out) == {"README.md": b"mine"}


def test_a_base_on_the_hub(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    """config.json alone where only that is read; the weights, once, where they are needed."""
    weights = {f"{name}.weight": np.zeros((B.shape[0], A.shape[1]), np.float32) for name, B, A in factors()}
    hub.repositories["user/base"] = {"main": {
        "config.json": json.dumps({"model_type": "x", "num_hidden_layers": 4, "tie_word_embeddings": False}).encode(),
        "model.safetensors": save(weights, {"format": "pt"}), "tokenizer.json": b"{}",
        "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.onnx": b"x",
    }}  # fmt: skip
    code, _, err = run(
        home, "compress", local, tmp_path / "uniform", "--target", "uniform", "--base", "user/base", "--json", hub=hub
    )
    assert (code, err) == (0, "")
    assert len(load_file(tmp_path / "uniform" / WEIGHTS)) == 2 * 3 * 4  # the layer that the adapter lacks is there
    assert hub.fetched() == {"config.json"}
    code, _, err = run(
        home, "convert", local, tmp_path / "merged", "--target", "merged", "--base", "user/base", hub=hub
    )
    assert (code, err) == (0, "")
    assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    hub.repositories["user/none"] = {"main": {"README.md": b""}}
    code, _, err = run(home, "compress", local, tmp_path / "no", "--target", "gguf", "--base", "user/none", hub=hub)
    assert code == 1
    assert "'user/none' is no base model, which has a config.json" in err


def test_merged_and_shown_by_id(hub: Hub, home: Path, local: Path, tmp_path: Path) -> None:
    hub.repositories["user/adapter"] = {"main": files_of(local)}
    code, out, err = run(
        home, "merge", "user/adapter@main=0.5", f"{local}=0.5", "-o", tmp_path / "sum", "--json", hub=hub
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["source"] == f"0.5 × user/adapter@main + 0.5 × {local}"
    assert run(home, "verify", local, tmp_path / "sum", "--max-error", "1e-6", hub=hub)[0] == 0
    pytest.importorskip("plotly")
    para_ext.compress_adapter(local, tmp_path / "small")
    hub.repositories["user/small"] = {"main": files_of(tmp_path / "small")}
    page = tmp_path / "page.html"
    code, _, err = run(home, "report", "user/adapter", "user/small", "-o", page, hub=hub)
    assert (code, err) == (0, "")
    assert '"origin": "as certified when it was written"' in page.read_text()
