"""llama.cpp loads what is written for it: its logits are those of the merged reference, for every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from bases import QUIET, relative_error
from llamacpp import MODELS, computed, expected, write_base

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]

Gguf = Callable[[str], Path]


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    """The file of a base model by its name; each is made once."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else write_base(MODELS[name].build(), path)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_base_alone(gguf_base: Gguf, name: str) -> None:
    print(relative_error(computed(gguf_base(name)), expected(MODELS[name].build())))
    assert relative_error(computed(gguf_base(name)), expected(MODELS[name].build())) <= 1e-5
