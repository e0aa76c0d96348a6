"""Factors in numpy arrays: the same bits as in tensors, without PyTorch where nothing needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import factors, write_adapter
from cases import BF16, DTYPES, FP16, FP32

from para_ext import LoraFactors, ParaError, decompose
from para_ext.arrays import NUMPY, as_numpy, as_tensor, checked_dtype, code_of, torch_dtype
from para_ext.formats.mapped import read_safetensors

PROBE = """
import sys
from itertools import cycle
sys.argv = ["para-ext", *sys.argv[1:]]
from para_ext.cli import main
try: main()
finally: print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("code", NUMPY)
def test_every_type_goes_to_torch_and_back_without_a_copy(code: str) -> None:
    try:
        dtype = torch_dtype(code)
    except AttributeError:
        pytest.skip(f"this PyTorch has no {code}")
    bits = np.arange(24, dtype=np.uint8).repeat(NUMPY[code].itemsize)
    array = (bits % 2 if code == "BOOL" else bits).view(NUMPY[code]).reshape(4, 6)
    tensor = as_tensor(array)
    assert tensor.dtype == dtype and code_of(tensor) == code_of(array) == code
    assert tensor.data_ptr() == array.ctypes.data
    assert as_numpy(tensor).dtype == array.dtype
    assert as_numpy(tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_arrays_and_tensors_give_the_same_bits(dtype: torch.dtype, keep: float) -> None:
    pairs = [(name, B, A.t().contiguous().t()) for name, B, A in factors(dtype=dtype)]
    results = []
    for convert in (as_tensor, as_numpy):
        scaled = zip(pairs, cycle([1.5, 2.0]), strict=False)
        modules = [LoraFactors(name, convert(B), convert(A), scale) for (name, B, A), scale in scaled]
        d = decompose(modules)
        plan = d.spectra.plan(keep=keep)
        results.append((plan, d.truncate_certified(plan), d.truncate(plan)))
    (plan, new, _), (other_plan, other, tensors) = results
    assert plan == other_plan
    for t, a, f in zip(new, other, tensors, strict=True):
        assert torch.equal(t.B, as_tensor(a.B)) and torch.equal(t.A, as_tensor(a.A))
        assert (t.error, t.rounding_B, t.rounding_A) == (a.error, a.rounding_B, a.rounding_A)
        assert isinstance(f.B, torch.Tensor) and torch.equal(f.B, t.B)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_arrays_that_are_read_only_and_pairs_of_both_kinds(backend: str | None) -> None:
    pairs = [(name, as_numpy(B), as_numpy(A)) for name, B, A in factors()]
    for _, B, A in pairs:
        B.setflags(write=False)
        A.setflags(write=False)
    arrays = decompose([LoraFactors(*pair) for pair in pairs], backend=backend)
    mixed = decompose([LoraFactors(name, B, torch.tensor(A)) for name, B, A in pairs], backend=backend)
    plan = arrays.spectra.plan(keep=0.5)
    for f, g in zip(arrays.truncate(plan), mixed.truncate(plan), strict=True):
        assert torch.equal(as_tensor(f.B), as_tensor(g.B)) and torch.equal(as_tensor(f.A), as_tensor(g.A))


def test_arrays_that_are_refused() -> None:
    good = np.ones((4, 3), np.float32)
    for bad, words in (
        (good[::-1], "backward"),
        (np.ones(49, np.uint8)[1:].view(np.float32).reshape(4, 3), "unaligned"),
        (good.astype(">f4"), "dtype >f4"),
        (good.astype(int), "dtype int64"),
    ):
        with pytest.raises(ParaError, match=f"module 'x': B .*{words}"):
            decompose([LoraFactors("x", bad, np.ones((3, 5), np.float32))])


@pytest.mark.parametrize(
    ("given", "code"), [(FP32, "F32"), ("bf16", "BF16"), ("float16", "F16"), ("F64", "F64"), (None, None)]
)
def test_names_of_types(given: Any, code: str | None) -> None:
    assert checked_dtype(given) == code
    for bad in ("int8", torch.int8, "float", "torch", 7):
        with pytest.raises(ParaError, match="is not one of float32"):
            checked_dtype(bad)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("command", ["compress", "compress-some", "inspect", "dry-run"])
def test_the_command_line_works_without_torch(tmp_path: Path, dtype: torch.dtype, command: str) -> None:
    """Also where the ranks of some modules stay, and with foreign tensors and a bias."""
    pytest.importorskip("para_ext._cpu", reason="without the native core PyTorch does the work", exc_type=ImportError)
    foreign = {"base_model.model.head.weight": torch.ones(3, 3, dtype=BF16), "base_model.model.count": torch.tensor(3)}
    foreign["base_model.model.layers.0.attn.q_proj.lora_B.bias"] = torch.ones(48, dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", factors(dtype=dtype), foreign)
    arguments = {
        "compress": ["compress", adapter, tmp_path / "out", "--keep", "0.4", "--dtype", "bf16"],
        "compress-some": ["compress", adapter, tmp_path / "out", "--keep", "0.9"],
        "inspect": ["inspect", adapter],
        "dry-run": ["compress", adapter, tmp_path / "out", "--energy", "0.9", "--dry-run"],
    }[command]
    done = subprocess.run([sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("False\n")


def test_a_file_whose_tensors_are_not_aligned(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    header = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [1, 25]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + values.tobytes())
    arrays, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {}
    assert arrays["x"].flags.aligned and np.array_equal(arrays["x"], values.reshape(2, 3))
    arrays["flag"][:] = 0  # a copy on write
    assert read_safetensors(tmp_path / "x.safetensors")[0]["flag"] == [1]
