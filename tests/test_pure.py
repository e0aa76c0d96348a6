"""An install without a compiler: pure Python on the torch backend, and it says so. Run by `make test-pure`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import para_ext

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("para_ext._cpu") is not None, reason="the native core is installed"
)


def _adapter(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.layers.{i}.q_proj.lora_{side}.weight": torch.randn(shape, generator=generator)
        for i in range(3)
        for side, shape in (("A", (8, 32)), ("B", (48, 8)))
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "exclude_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_compresses_and_warns_once(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="native core is not installed") as warned:
        report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5)
        para_ext.compress_adapter(adapter, tmp_path / "smaller", keep=0.25)
    assert len(warned) == 1
    assert report.backends == ("torch",)
    assert para_ext.verify(adapter, tmp_path / "small").error <= report.error * (1 + 1e-6)


def test_asking_for_the_native_core_is_refused(tmp_path: Path) -> None:
    with pytest.raises(para_ext.ParaError, match="reinstall with a C\\+\\+ compiler"):
        para_ext.decompose(_adapter(tmp_path / "adapter"), backend="cpu")


def test_info_says_so() -> None:
    shown = subprocess.run([sys.executable, "-m", "para_ext.cli", "info"], capture_output=True, text=True, check=True)
    assert "the native core is not installed" in shown.stdout
