"""The whole command on fp32 Llama-3-8B adapters (168 and 671 MB), beside the same job in plain torch: time and memory.

Times are of whole processes, with their imports and until every byte is on disk. Memory is the largest RssAnon (what a
process asked for itself, mapped files not counted), polled every 5 ms.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from measure import anonymous_bytes
from safetensors.torch import save_file
from shapes import LLAMA_3_8B, trained_like

import para_ext

RUNS = 5
PLAIN = Path(__file__).with_name("plain_torch.py")


def run(command: Sequence[str], folder: Path) -> tuple[float, int]:
    """Seconds, and the largest RssAnon in bytes."""
    start, peak = time.perf_counter(), 0
    # In an empty folder: from the checkout, Python would import the sources instead of what is installed.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    assert process.returncode == 0
    return time.perf_counter() - start, peak


@pytest.fixture(scope="module", params=[16, 64])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rank = request.param
    folder = tmp_path_factory.mktemp("llama") / f"rank-{rank}"
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": t
        for name, B, A in trained_like(LLAMA_3_8B, rank, torch.float32)
        for side, t in (("A", A), ("B", B))
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[1] for name, *_ in LLAMA_3_8B})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves, "exclude_modules": None,
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_command(adapter: Path, tmp_path: Path) -> None:
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    commands = {
        "para-ext": [sys.executable, "-m", "para_ext.cli", "compress", str(adapter), str(ours), "--keep", "0.25"],
        "plain torch": [sys.executable, str(PLAIN), str(adapter), str(plain), "0.25"],
        "import torch": [sys.executable, "-c", "import torch"],
    }  # fmt: skip
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for i in range(RUNS + 1):  # the first one warms caches up
        for name, command in commands.items():
            for folder in (ours, plain):
                shutil.rmtree(folder, ignore_errors=True)
            results[name].append(run(command, tmp_path))
            if i == 0 and name != "import torch":
                error = para_ext.verify(adapter, ours if name == "para-ext" else plain).energy
                assert error > 0.9
    print(f"\n{adapter.name}: {(adapter / 'adapter_model.safetensors').stat().st_size / 1e6:.0f} MB")
    seconds = {}
    for name, measured in results.items():
        seconds[name] = statistics.median(s for s, _ in measured[1:])
        peak = statistics.median(p for _, p in measured[1:])
        print(f"{name:12}  {seconds[name]:6.2f} s   {peak / 1e6:7.0f} MB anonymous   (median of {RUNS})")
    assert seconds["para-ext"] < min(seconds["plain torch"], seconds["import torch"] + 1)
