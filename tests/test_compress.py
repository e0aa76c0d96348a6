"""The public calls on small adapters: what is written, what the report says, what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import contents, factors, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import para_ext
from para_ext import LoraFactors, ParaError
from para_ext.arrays import as_tensor
from para_ext.decomposition import Decomposition
from para_ext.plan import Plan
from para_ext.report import at_most, percent, relative_error


def dense(folder: Path) -> dict[str, Tensor]:
    """ΔW of every module of a folder of linears, in fp64, by PEFT's rule for the scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = config["rank_pattern"].get(name, config["r"])
        assert len(A) == rank
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        found[name] = scale * tensors[key.replace("lora_A", "lora_B")].double() @ A.double()
    return found


def distance(original: dict[str, Tensor], new: dict[str, Tensor]) -> float:
    assert set(new) <= set(original)
    return math.sqrt(sum(float((W - new.get(name, torch.zeros(()))).square().sum()) for name, W in original.items()))


BUDGETS: tuple[dict[str, Any], ...] = (
    {}, {"keep": 0.4}, {"params": 3000}, {"size": "20kB"}, {"total_rank": 20}, {"threshold": 1.0}, {"rank": 3},
    {"energy": 0.8, "multiple_of": 2},
)  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_budget_end_to_end(tmp_path: Path, budget: dict[str, Any], rslora: bool) -> None:
    adapter = write_adapter(tmp_path / "adapter", use_rslora=rslora)
    before = contents(adapter)
    report = para_ext.compress_adapter(adapter, tmp_path / "small", **budget)
    assert contents(adapter) == before

    original, new = dense(adapter), dense(tmp_path / "small")
    assert {n for n, k in report.ranks.items() if k} == set(new)
    optimum = math.sqrt(
        sum(float(torch.linalg.svdvals(W)[report.ranks[n] :].square().sum()) for n, W in original.items())
    )
    true = distance(original, new)
    assert true <= 1.001 * optimum + 1e-6
    assert true <= report.error <= 1.01 * true + 1e-5
    assert report.error_floor == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    assert para_ext.verify(adapter, tmp_path / "small").error == pytest.approx(true, rel=1e-6)
    written = tmp_path / "small" / "adapter_model.safetensors"
    assert report.bytes_after == written.stat().st_size
    if "size" in budget:
        assert report.bytes_after <= 20_000
    parameters = sum(t.numel() for t in load_file(written).values())
    assert parameters == report.parameters_after


def test_what_lies_beside_the_tensors(tmp_path: Path) -> None:
    head = {"base_model.model.classifier.weight": torch.randn(500, 32)}
    adapter = write_adapter(tmp_path / "adapter", foreign=head, modules_to_save=["classifier"])
    (adapter / "README.md").write_text("model card")
    (adapter / "optimizer.pt").write_bytes(b"x")
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.3)
    assert sorted(contents(tmp_path / "small")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "para_ext.json",
    ]  # fmt: skip
    assert any("optimizer.pt" in note for note in report.notes)
    assert any("are not LoRA factors" in note for note in report.notes)
    sidecar = json.loads((tmp_path / "small" / "para_ext.json").read_text())
    assert sidecar["error"] == report.error
    assert sidecar["bytes_after"] == report.bytes_after
    with safe_open(tmp_path / "small" / "adapter_model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["para_ext"])
        assert torch.equal(file.get_tensor("base_model.model.classifier.weight"), *head.values())
    assert record["source_sha256"] == sidecar["source_sha256"]
    assert record["energy"] == report.energy


def test_several_keeps_are_the_single_ones(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    reports = para_ext.compress_adapter(adapter, tmp_path / "many", keep=[0.5, "25%"])
    assert [Path(r.output or "").name for r in reports] == ["keep-0.5", "keep-0.25"]
    para_ext.compress_adapter(adapter, tmp_path / "one", keep=0.25)
    many = contents(tmp_path / "many" / "keep-0.25")
    one = contents(tmp_path / "one")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert many[name] == one[name]


def test_several_keeps_with_one_impossible_write_nothing(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(ParaError, match="smallest feasible"):
        para_ext.compress_adapter(adapter, tmp_path / "many", keep=[0.5, 1e-6])
    assert not (tmp_path / "many").exists()


def test_dry_run_predicts_and_writes_nothing(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    dry = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.3, dry_run=True)
    assert not (tmp_path / "small").exists()
    wet = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.3)
    assert dry.ranks == wet.ranks
    assert dry.bytes_after == wet.bytes_after
    assert dry.error == pytest.approx(wet.error, rel=1e-3)


def test_compressing_again_with_everything_kept_changes_no_tensor(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    report = para_ext.compress_adapter(tmp_path / "small", tmp_path / "same", keep=1.0)
    assert report.error == 0
    small = load_file(tmp_path / "small" / "adapter_model.safetensors")
    same = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert small.keys() == same.keys()
    assert all(torch.equal(small[key], same[key]) for key in small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5, dtype=dtype)
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert distance(dense(adapter), dense(tmp_path / "small")) <= report.error


@pytest.mark.parametrize(
    ("scale", "message"), [(1e6, "exceeds the range of float16"), (1e-9, "too small for float16")], ids=str
)
def test_fp16_that_cannot_hold_it_is_refused(tmp_path: Path, scale: float, message: str) -> None:
    pairs = [(name, B * scale, A * scale) for name, B, A in factors()]
    adapter = write_adapter(tmp_path / "adapter", pairs)
    with pytest.raises(ParaError, match=message):
        para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5, dtype=torch.float16)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(("side", "value"), [("A", math.nan), ("B", math.inf)])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, side: str, value: float) -> None:
    pairs = list(factors())
    (pairs[4][1] if side == "B" else pairs[4][2])[2, 3] = value
    adapter = write_adapter(tmp_path / "adapter", pairs)
    with pytest.raises(ParaError, match=rf"'layers\.1\.attn\.v_proj': {side} holds"):
        para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5)
    assert not (tmp_path / "small").exists()


def test_an_untrained_adapter_is_one_pair_of_zeros(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", [(name, B * 0, A) for name, B, A in factors()])
    report = para_ext.compress_adapter(adapter, tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert len(tensors) == 2
    assert not any(t.any() for t in tensors.values())
    assert report.error == 0
    assert para_ext.verify(adapter, tmp_path / "small").error == 0


def test_backends_agree(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    reports = [
        para_ext.compress_adapter(adapter, tmp_path / str(backend), keep=0.3, backend=backend)
        for backend in (None, "torch")
    ]
    assert reports[0].ranks == reports[1].ranks
    assert reports[0].error == pytest.approx(reports[1].error, rel=1e-4)
    assert distance(dense(tmp_path / "None"), dense(tmp_path / "torch")) < 1e-5 * reports[0].norm


@pytest.mark.parametrize("backend", [None, "torch"])
def test_steps_change_no_bit(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    """Work is cut by the clock where an adapter is large; ranks above 96 go to torch.linalg."""
    modules = [
        LoraFactors(f"{rank}.{name}", B, A, 0.5)
        for rank in (8, 100)
        for name, B, A in factors(layers=9, rank=rank, dtype=torch.float16)
    ]

    def results() -> tuple[int, list[tuple[float, ...]], list[Tensor]]:
        decomposition = para_ext.decompose(modules, backend=backend, threads=1)
        new = decomposition.truncate(decomposition.spectra.plan(keep=0.3))
        sigma = [module.sigma for module in decomposition.spectra.modules]
        return len(decomposition._parts), sigma, [as_tensor(x) for f in new for x in (f.B, f.A)]

    whole, sigma, tensors = results()
    monkeypatch.setattr("para_ext.decomposition._FIRST_STEP", 1)
    monkeypatch.setattr("para_ext.decomposition._STEP_SECONDS", 0)
    parts, same_sigma, same_tensors = results()
    assert parts > whole + 3
    assert same_sigma == sigma
    assert all(torch.equal(x, y) for x, y in zip(tensors, same_tensors, strict=True))


def test_components_equal_within_rounding_are_named() -> None:
    Q = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    B = (Q * torch.tensor([8, 4, 2, 1, 1, 0.5, 0.25, 0.1])).float()
    d = para_ext.decompose([LoraFactors("a", B, torch.eye(8)), LoraFactors("b", B.flip(0), torch.eye(8))])
    plan = d.spectra.plan(total_rank=7)
    from para_ext.report import undecided_components

    doubtful = undecided_components(d.spectra, plan, d.betas)
    assert doubtful
    assert all(name in ("a[3]", "a[4]", "b[3]", "b[4]") for name in doubtful)
    assert not undecided_components(d.spectra, d.spectra.plan(total_rank=4), d.betas)


def test_decompose_plan_truncate_on_factors() -> None:
    given = [LoraFactors(name, B, A, 2.0) for name, B, A in factors()]
    d = para_ext.decompose(given)
    plan = d.spectra.plan(keep=0.3)
    new = d.truncate(plan)
    assert [f.name for f in new] == [f.name for f in given]
    assert all(f.rank == plan.ranks[f.name] and f.scale == 1 for f in new)
    assert para_ext.verify(given, new).error == pytest.approx(plan.error, rel=1e-5)
    with pytest.raises(ParaError, match="not for this adapter"):
        d.truncate({"nothing": 1})
    with pytest.raises(ParaError, match="does not write float64"):
        d.truncate(plan, torch.float64)
    with pytest.raises(ParaError, match="is not one of"):
        d.truncate(plan, torch.int8)


def test_mixed_precisions_in_one_call() -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    given = [
        LoraFactors(name, B.to(dtypes[i % 4]), A.to(dtypes[i % 4]), 0.5) for i, (name, B, A) in enumerate(factors())
    ]
    d = para_ext.decompose(given)
    new = d.truncate(d.spectra.plan(keep=0.5))
    assert [f.A.dtype for f in new] == [f.A.dtype for f in given]
    if "cpu" in d.backends:
        assert set(d.backends) == {"cpu", "torch"}


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (LoraFactors("x", torch.zeros(4, 2), torch.zeros(3, 5)), r"B is \[4, 2\] and A is \[3, 5\]"),
        (LoraFactors("x", torch.zeros(4), torch.zeros(3, 5)), "must be"),
        (LoraFactors("x", torch.zeros(4, 0), torch.zeros(0, 5)), "no dimension may be 0"),
        (LoraFactors("x", torch.zeros(4, 2).int(), torch.zeros(2, 5)), "has dtype int32"),
        (LoraFactors("x", torch.zeros(4, 2, device="meta"), torch.zeros(2, 5)), "holds no dense data"),
        (LoraFactors("x", torch.zeros(4, 2), torch.zeros(2, 5), math.nan), "its scale is nan"),
    ],
)
def test_malformed_factors_are_refused(factor: LoraFactors, message: str) -> None:
    with pytest.raises(ParaError, match=f"module 'x'.*{message}"):
        para_ext.decompose([factor])


def test_a_module_given_twice_is_refused() -> None:
    f = LoraFactors("x", torch.ones(4, 2), torch.ones(2, 5))
    with pytest.raises(ParaError, match="'x' is given twice"):
        para_ext.decompose([f, f])


def test_unknown_backend_device_and_target_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(ParaError, match="backend 'abacus' is unknown"):
        para_ext.decompose(adapter, backend="abacus")
    with pytest.raises(ParaError, match="device 'tpu' is unknown"):
        para_ext.decompose(adapter, device="tpu")
    with pytest.raises(ParaError, match="target 'wax' is unknown"):
        para_ext.compress_adapter(adapter, tmp_path / "out", target="wax")
    if not torch.cuda.is_available():
        with pytest.raises(ParaError, match="no CUDA device"):
            para_ext.decompose(adapter, device="cuda")


def test_arguments_that_do_not_exist_are_refused_by_name(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    spectra = para_ext.decompose(adapter).spectra
    layer: Any = torch.nn.Linear(8, 6)
    layer.r, layer.lora_alpha, layer.scaling, layer.merged = 2, 2, 1.0, False
    layer.lora_A, layer.lora_B = torch.nn.Parameter(torch.ones(2, 8)), torch.nn.Parameter(torch.ones(6, 2))
    calls: list[Callable[..., Any]] = [
        lambda **budget: para_ext.compress_adapter(adapter, tmp_path / "out", **budget),
        lambda **budget: para_ext.compress_model(torch.nn.Sequential(layer), **budget),
        lambda **budget: para_ext.predict(spectra, **budget),
        spectra.plan,
    ]
    for call in calls:
        with pytest.raises(ParaError, match=r"^'keeep' is no argument here: did you mean keep=\?$"):
            call(keeep=0.5)
        with pytest.raises(ParaError, match=r"^'foo' is no argument here: a budget is given like keep=0\.25$"):
            call(foo=1, keep=0.5)
    assert not (tmp_path / "out").exists()


def test_several_values_are_a_list_or_a_tuple_each_once(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    reports = para_ext.compress_adapter(adapter, tmp_path / "out", keep=(0.5, "25%"), target=("peft", "vllm"))
    assert isinstance(reports, list)
    assert [Path(str(r.output)).relative_to(tmp_path / "out").as_posix() for r in reports] == [
        "peft/keep-0.5", "peft/keep-0.25", "vllm/keep-0.5", "vllm/keep-0.25",
    ]  # fmt: skip
    for wrong, message in (
        ({"keep": []}, "keep is an empty list"),
        ({"target": ()}, "target is an empty list"),
        ({"target": [["peft"]]}, r"target \['peft'\] is unknown"),
        ({"target": ["peft", "peft"]}, "target has 'peft' twice"),
        ({"keep": (0.5, 0.5)}, "keep has 0.5 twice"),
        ({"keep": [0.5, "50%"]}, "two outputs would be"),
    ):
        with pytest.raises(ParaError, match=message):
            para_ext.compress_adapter(adapter, tmp_path / "no", **wrong)
        with pytest.raises(ParaError, match=message):
            para_ext.merge_adapters({adapter: 0.5, str(adapter): 0.5}, tmp_path / "no", **wrong)
    assert not (tmp_path / "no").exists()


def test_of_several_outputs_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though while one is written the next is truncated already, and refused."""
    adapter = write_adapter(tmp_path / "adapter")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncated(
        self: Decomposition, plan: Plan, *arguments: Any, truncate: Any = Decomposition.truncate_certified
    ) -> Any:
        if plan.value == 0.25:
            raise ParaError("the second")
        return truncate(self, plan, *arguments)

    monkeypatch.setattr(Decomposition, "truncate_certified", truncated)
    with pytest.raises(ParaError, match="the second"):
        para_ext.compress_adapter(adapter, tmp_path / "one", keep=[0.5, 0.25])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["keep-0.5"]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ParaError, match="no space left"):
        para_ext.compress_adapter(adapter, tmp_path / "two", keep=[0.5, 0.25])


def test_a_module_that_is_dropped_is_off_by_its_norm(tmp_path: Path) -> None:
    """By 1 of it and no more, whatever rounding its bound allows for; the bound itself keeps that."""
    adapter = write_adapter(tmp_path / "adapter")
    report = para_ext.compress_adapter(adapter, tmp_path / "small", total_rank=1)
    measured = para_ext.verify(adapter, tmp_path / "small")
    for modules in (report.modules, measured.modules):
        dropped = [module for module in modules if not module.rank_after]
        assert len(dropped) == 8
        assert relative_error(dropped) == 1.0
        assert all(module.error > module.norm for module in dropped)
        assert 0 < relative_error([module for module in modules if module.rank_after]) < 1
    assert 0 < report.relative_error < 1
    assert 0 < measured.relative_error < 1


def test_an_empty_path_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_adapter(tmp_path / "adapter"))
    assert para_ext.decompose(".").factors
    for call in (
        lambda: para_ext.decompose(""),
        lambda: para_ext.verify(".", ""),
        lambda: para_ext.compress_adapter(".", tmp_path / "out", target="gguf", base=""),
    ):
        with pytest.raises(ParaError, match=r"^an empty path was given: name a folder or file$"):
            call()


def test_names_from_files_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """In no refusal: each is a line of what can be printed."""
    name = "q\x1b[2J\n\r\x00\u202e\x9b_proj"
    B, A = torch.full((8, 2), torch.nan), torch.ones(2, 8)
    with pytest.raises(ParaError) as refused:
        para_ext.decompose([LoraFactors(name, B, A, 1.0)])
    assert str(refused.value).startswith(r"module 'q\x1b[2J\n\r\x00\u202e\x9b_proj': ")
    assert str(refused.value).isprintable()
    with pytest.raises(ParaError, match=r"'a\\nb' does not exist"):
        para_ext.decompose(tmp_path.relative_to(tmp_path) / "a\nb")


def test_importing_para_ext_imports_nothing_heavy() -> None:
    code = (
        "import sys, para_ext; para_ext.__version__; "
        "print([m for m in ('torch', 'peft', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names() -> None:
    assert set(para_ext.__all__) == set(dir(para_ext))
    assert all(getattr(para_ext, name) is not None for name in para_ext.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        para_ext.nonsense  # noqa: B018


def test_patterns_that_need_a_newer_peft_are_said(tmp_path: Path) -> None:
    # `layers.0.attn.q_proj` as a plain key would also match the second tower's module of that name.
    pairs = [*factors(1), *((f"vision.{name}", B.flip(0)[:, :5], A[:5]) for name, B, A in factors(1, seed=1))]
    names = {name: A.shape[0] for name, _, A in pairs}
    adapter = write_adapter(
        tmp_path / "adapter", pairs, r=8, lora_alpha=8, rank_pattern={f"^{n}": r for n, r in names.items()}
    )
    report = para_ext.compress_adapter(adapter, tmp_path / "small", rank=2)
    assert not any("PEFT" in note for note in report.notes)
    report = para_ext.compress_adapter(adapter, tmp_path / "smaller", keep=0.6)
    assert any("need PEFT ≥ 0.15" in note for note in report.notes)


def test_verify_in_both_directions_and_of_strangers(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.1)
    assert 0 in report.ranks.values()
    there, back = (para_ext.verify(*pair) for pair in ((adapter, tmp_path / "small"), (tmp_path / "small", adapter)))
    assert there.error == pytest.approx(back.error, rel=1e-9)
    assert "energy kept ≥ " in repr(there)
    stranger = write_adapter(tmp_path / "stranger", [(f"other.{name}", B, A) for name, B, A in factors()])
    with pytest.raises(ParaError, match="no module in common"):
        para_ext.verify(adapter, stranger)


def test_all_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    para_ext.compress_adapter(adapter, tmp_path / "many" / "keep-0.1", keep=0.1)
    with pytest.raises(ParaError, match=r"keep-0\.1' exists"):
        para_ext.compress_adapter(adapter, tmp_path / "many", keep=[0.5, 0.1])
    with pytest.raises(ParaError, match=r"two outputs would be .*keep-0\.25'"):
        para_ext.compress_adapter(adapter, tmp_path / "many", keep=[0.25, "25%"])
    assert [p.name for p in (tmp_path / "many").iterdir()] == ["keep-0.1"]


def test_notes_speak_of_the_budget_that_was_given(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")

    def notes(**budget: Any) -> str:
        return " ".join(para_ext.compress_adapter(adapter, tmp_path / "small", dry_run=True, **budget).notes)

    assert "No budget was given" in notes(multiple_of=2)
    assert "with this shaping no budget gives 95%" in notes(keep=0.05, max_rank=1)
    advice = notes(keep=0.1, multiple_of=2)
    better = advice.split("keep=")[1].split()[0]
    assert para_ext.compress_adapter(adapter, tmp_path / "x", dry_run=True, keep=better, multiple_of=2).energy >= 0.95
    untrained = write_adapter(tmp_path / "untrained", [(name, B * 0, A) for name, B, A in factors()])
    report = para_ext.compress_adapter(untrained, tmp_path / "small", dry_run=True)
    assert "is this adapter trained?" in " ".join(report.notes)


def test_components_that_must_stay_are_not_in_doubt() -> None:
    given = [LoraFactors(name, B * (1e-3 if i == 0 else 1), A, min_rank=1) for i, (name, B, A) in enumerate(factors())]
    d = para_ext.decompose(given)
    from para_ext.report import undecided_components

    assert not undecided_components(d.spectra, d.spectra.plan(keep=0.3), d.betas)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ParaError, match="use compress_adapter"):
        para_ext.compress_model(str(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)], ids=str)
def test_size_counts_what_mixed_precisions_are_written_in(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    pairs = [(name, B.to(dtypes[1]), A.to(dtypes[0])) for name, B, A in factors()]
    adapter = write_adapter(tmp_path / "adapter", pairs)
    for i, budget in enumerate(({"size": 12_000}, {"keep": 1.0}, {"keep": 0.5, "dtype": torch.bfloat16})):
        report = para_ext.compress_adapter(adapter, tmp_path / f"small{i}", **budget)
        size = (tmp_path / f"small{i}" / "adapter_model.safetensors").stat().st_size
        sidecar = json.loads((tmp_path / f"small{i}" / "para_ext.json").read_text())
        assert report.bytes_after == sidecar["bytes_after"] == size
        assert size <= budget.get("size", size)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (math.nan, None, "lora_B.bias holds a NaN"),
        (4e4, torch.float16, "lora_B.bias exceeds the range of float16"),
        (1.5, torch.bfloat16, None),
    ],
)
def test_biases_are_folded_or_refused(
    tmp_path: Path, value: float, dtype: torch.dtype | None, message: str | None
) -> None:
    bias = {"base_model.model.layers.0.attn.q_proj.lora_B.bias": torch.full((48,), value)}
    adapter = write_adapter(tmp_path / "adapter", foreign=bias, lora_bias=True)
    if message:
        with pytest.raises(ParaError, match=message):
            para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5, dtype=dtype)
        assert not (tmp_path / "small").exists()
        return
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.5, dtype=dtype)
    written = tmp_path / "small" / "adapter_model.safetensors"
    folded = load_file(written)[next(iter(bias))]
    assert folded.dtype == dtype
    assert torch.equal(folded, torch.full_like(folded, 2 * value))
    assert report.bytes_after == written.stat().st_size


def test_the_negative_bit_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(50, 4, dtype=torch.complex64, generator=generator).conj().imag
    assert B.is_neg()
    f = LoraFactors("x", B, torch.randn(4, 30, generator=generator))
    d = para_ext.decompose([f])
    (new,) = d.truncate_certified({"x": 2})
    true = torch.linalg.matrix_norm(B.double() @ f.A.double() - new.B.double() @ new.A.double())
    assert float(true) <= new.error <= 1.01 * float(true)


def test_freed_and_fake_tensors_are_refused() -> None:
    freed = torch.randn(2000, 8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ParaError, match="holds no dense data"):
        para_ext.decompose([LoraFactors("x", freed, torch.randn(8, 30))])
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.randn(20, 8)
    with pytest.raises(ParaError, match="holds no dense data"):
        para_ext.decompose([LoraFactors("x", fake, torch.randn(8, 30))])


def test_a_rank_far_above_the_shape_costs_no_large_core() -> None:
    d = para_ext.decompose([LoraFactors("x", torch.randn(8, 3000), torch.randn(3000, 8))])
    assert d.backends == ("torch",)
    assert len(d.spectra.modules[0].sigma) == 8


def test_a_scale_beyond_fp64_is_refused_by_name() -> None:
    for rank in (4, 200):
        f = LoraFactors("x", torch.full((300, rank), 1e10), torch.randn(rank, 300), 1e308)
        with pytest.raises(ParaError, match="module 'x': its singular values exceed"):
            para_ext.decompose([f])


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    f = LoraFactors("x", torch.randn(20, 4), torch.randn(4, 30))
    for threads in (0, -1, 1.5, "2", 2**31):
        with pytest.raises(ParaError, match="threads="):
            para_ext.decompose([f], threads=threads)  # type: ignore[arg-type]
    for scale in (None, "1", 10**400, Fraction(10**400), np.float32("inf")):
        with pytest.raises(ParaError, match="its scale is"):
            para_ext.decompose([LoraFactors("x", f.B, f.A, scale)])  # type: ignore[arg-type]
    third = para_ext.decompose([LoraFactors("x", f.B, f.A, Fraction(1, 3))])  # type: ignore[arg-type]
    torch.testing.assert_close(third.truncate({"x": 4})[0].B, f.B / 3)
    d = para_ext.decompose([f])
    for rank in (-1, 1.5, None, 2**61):
        with pytest.raises(ParaError, match="its rank is"):
            d.truncate({"x": rank})  # type: ignore[dict-item]
    for source in (None, 5):
        with pytest.raises(ParaError, match="cannot be decomposed"):
            para_ext.decompose(source)  # type: ignore[arg-type]


def test_bounds_stay_bounds_when_they_are_printed() -> None:
    assert [percent(x) for x in (1.0, 0.999999, 0.9794988, 0.29, 0.0)] == [
        "100.00%",
        "99.99%",
        "97.94%",
        "29.00%",
        "0.00%",
    ]
    assert [at_most(x) for x in (0.1431824, 0.143, 1e-9, 0.0, math.inf)] == [
        "1.44e-01", "1.43e-01", "1.00e-09", "0.00e+00", "inf",
    ]  # fmt: skip


def test_a_dry_run_says_that_its_errors_are_predictions(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    dry = para_ext.compress_adapter(adapter, tmp_path / "out", keep=0.5, dry_run=True)
    assert dry.predicted and dry.to_dict()["predicted"]
    assert not para_ext.compress_adapter(adapter, tmp_path / "out", keep=0.5).predicted
