"""Trained adapters from a folder of them, against dense fp64 algebra and the outputs of the models they belong to.

``PARA_EXT_TEST_ADAPTERS`` names a folder with one folder per adapter. Those with an adapter_config.json are PEFT's and
must compress, and so must single files of pairs; all others must be refused. The oracle knows nothing of para_ext: it
reads files, computes scales, forms every product and takes its SVD by itself.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import para_ext

if "PARA_EXT_TEST_ADAPTERS" not in os.environ:
    pytest.skip("PARA_EXT_TEST_ADAPTERS does not name a folder of trained adapters", allow_module_level=True)
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from architectures import ARCHITECTURES, Inputs, build, outputs  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

FOLDERS = sorted(path for path in Path(os.environ["PARA_EXT_TEST_ADAPTERS"]).iterdir() if path.is_dir())
ADAPTERS = {path.name: path for path in FOLDERS if (path / "adapter_config.json").is_file()}
# How the keys of A and B end in single files without an alpha, by what the folder's name starts with.
ENDS = {
    "roberta": (".lora_A", ".lora_B"),
    "sd15_cloneofsimo": (":down", ":up"),
    "sd15_diffusers": ("_lora.down.weight", "_lora.up.weight"),
}
SINGLE = {path.name: path for path in FOLDERS if path.name.startswith(tuple(ENDS))}
OTHERS = {path.name: path for path in FOLDERS if path.name not in ADAPTERS | SINGLE}
if not ADAPTERS:
    raise FileNotFoundError("PARA_EXT_TEST_ADAPTERS names a folder without a PEFT adapter in it")

KEEPS = (0.5, 0.25, 0.1)
KEEP = 0.25  # where outputs are compared
# What the refusal of a folder must say, by what the folder's name starts with.
KINDS = {
    "ia3": "IA³",
    "sam": "SAM",
    "sd_lycoris_lokr": "LoKr",
}

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers for it
    )
]


# The oracle


@dataclass(frozen=True)
class Pair:
    """ΔW = B·A in fp64 with the scale in B [m, r]; A [r, n]."""

    B: Tensor
    A: Tensor


@dataclass(frozen=True)
class Dense:
    """SVD of one ΔW [m, n]: U [m, k], S [k] descending, V [n, k], k = min(r, m, n); ``noise`` bounds every |S − σ|."""

    U: Tensor
    S: Tensor
    V: Tensor
    noise: float

    def best(self, k: int) -> Tensor:
        """[m, n]: the best approximation of rank k (Eckart & Young 1936)."""
        return self.U[:, :k] * self.S[:k] @ self.V[:, :k].T


def read(folder: Path) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Pairs by module, and the tensors that are not LoRA's by parameter, of an adapter folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", "cpu", weights_only=True)
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    pairs = {}
    for key in [key for key in tensors if re.search(r"\.lora_(embedding_)?A\b", key)]:
        name = key.partition(".lora_")[0]
        A, B = tensors.pop(key).double(), tensors.pop(re.sub(r"(\.lora_(embedding_)?)A", r"\1B", key)).double()
        rank, alpha = (
            next((value for entry, value in patterns.items() if re.fullmatch(rf"(.*\.)?({entry})", name)), default)
            for patterns, default in (
                (config.get("rank_pattern") or {}, config["r"]),
                (config.get("alpha_pattern") or {}, config["lora_alpha"]),
            )
        )
        assert len(A) == rank, name
        pairs[name] = Pair(B * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)), A)
    return pairs, tensors


def dense_svd(pair: Pair) -> Dense:
    """SVD of the dense product.

    W has rank r, so a random projection finds its range, and the SVD is that of r + 8 rows: LAPACK on all of W takes
    minutes for one adapter. Nothing is taken on trust: with W = U S Vᵀ + E and orthonormal U and V, no singular value
    of W differs from S by more than ‖E‖ (Weyl), whatever the way to them was.
    """
    W = pair.B @ pair.A
    k, width = min(*W.shape, len(pair.A)), min(*W.shape, len(pair.A) + 8)
    probe = torch.randn(W.shape[1], width, dtype=W.dtype, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(W @ probe).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    dense = Dense(Q @ U[:, :k], S[:k], Vh[:k].T, 0.0)
    eye = torch.eye(k, dtype=W.dtype)
    skew = max(float((X.T @ X - eye).norm()) for X in (dense.U, dense.V))
    noise = float((W - dense.best(k)).norm()) + 2 * skew * float(S[0])
    assert noise <= 1e-13 * float(S[0])
    return Dense(dense.U, dense.S, dense.V, noise)


def parameters(pairs: Mapping[str, Pair]) -> int:
    return sum(pair.A.numel() + pair.B.numel() for pair in pairs.values())


@cache
def original(name: str) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    return read(ADAPTERS[name])


@cache
def oracle(name: str) -> dict[str, Dense]:
    return {module: dense_svd(pair) for module, pair in original(name)[0].items()}


def errors(name: str, folder: Path) -> dict[str, float]:
    """‖ΔW − ΔW'‖_F of every module: both products are formed, so equal factors give 0; what is not written is 0."""
    written = read(folder)[0]
    found = {}
    for module, old in original(name)[0].items():
        new = written.pop(module, Pair(old.B[:, :0], old.A[:0]))
        found[module] = float((old.B @ old.A).sub_(new.B @ new.A).norm())
    assert not written
    return found


# What was measured, for the end of the run


@dataclass
class Measured:
    adapters: set[str] = field(default_factory=set)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)

    def most(self, what: str, value: float, where: str) -> None:
        self.worst[what] = max((value, where), self.worst.get(what, (-math.inf, "")))

    def least(self, what: str, value: float, where: str) -> None:
        self.worst[what] = min((value, where), self.worst.get(what, (math.inf, "")))


@pytest.fixture(scope="session", autouse=True)
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    """Collects what the tests measure; the run ends with it, whether output is captured or not."""
    result = Measured()
    yield result
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(result.adapters)} real adapters were tested: {', '.join(sorted(result.adapters))}")
        for what, (value, where) in sorted(result.worst.items()):
            print(f"  {what:66} {value:9.3g}  {where}")


# The written file


def feasible(name: str, score: str, keep: float) -> bool:
    """Whether the first component in the order fits: what nothing fits is refused."""
    pairs = original(name)[0]
    widths = {module: len(pair.B) + pair.A.shape[1] for module, pair in pairs.items()}
    price = {"sigma": dict.fromkeys(widths, 1), "density": widths}[score]
    first = max(pairs, key=lambda module: float(oracle(name)[module].S[0]) ** 2 / price[module])
    return widths[first] <= keep * parameters(pairs)


@pytest.mark.parametrize("score", ["sigma", "density"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_written_file_is_the_best_of_its_size(name: str, score: str, tmp_path: Path, measured: Measured) -> None:
    source, spectra = ADAPTERS[name], oracle(name)
    keeps = [keep for keep in KEEPS if feasible(name, score, keep)]
    reports = para_ext.compress_adapter(source, tmp_path / "out", keep=keeps, score=score, dtype=torch.float32)
    for keep, report in zip(keeps, reports, strict=True):
        where = f"{name}, keep {keep}, {score}"
        folder = Path(report.output)
        pairs, others = read(folder)
        assert {module: len(pair.A) for module, pair in pairs.items()} == {m: k for m, k in report.ranks.items() if k}
        budget = keep * parameters(original(name)[0])
        assert parameters(pairs) == report.parameters_after <= budget, where
        assert (folder / "adapter_model.safetensors").stat().st_size == report.bytes_after, where
        assert others.keys() == original(name)[1].keys()
        assert all(torch.equal(others[key], tensor) for key, tensor in original(name)[1].items())

        found = errors(name, folder)
        error = math.hypot(*found.values())
        optimum = math.hypot(*(float(spectra[m].S[k:].norm()) for m, k in report.ranks.items()))
        # What is lost beyond the optimum is orthogonal to it: the quotient of the two would hide an error of 1e-3.
        excess = math.sqrt(max(0.0, error**2 - optimum**2))
        assert error <= 1.001 * optimum and excess <= 2e-7 * report.norm, where
        assert error <= report.error <= 1.001 * error, where
        assert all(found[m.name] <= m.error for m in report.modules), where
        verified = para_ext.verify(source, folder)
        assert error <= verified.error <= 1.001 * error, where
        measured.most("written file: error / optimum of its ranks - 1", error / optimum - 1, where)
        measured.most("written file: √(error² - optimum²) / norm", excess / report.norm, where)
        measured.most("written file: certificate / error - 1", report.error / error - 1, where)
        measured.least("written file: certificate / error - 1, the least", report.error / error - 1, where)
        measured.most("written file: parameters / budget", parameters(pairs) / budget, where)
    measured.adapters.add(name)

    for keep in set(KEEPS).difference(keeps):
        with pytest.raises(para_ext.ParaError, match=r"the smallest feasible is keep=0\.\d+$"):
            para_ext.compress_adapter(source, tmp_path / "infeasible", keep=keep, score=score)
        assert not (tmp_path / "infeasible").exists()


@pytest.mark.parametrize("name", ADAPTERS)
def test_keeping_all_changes_nothing(name: str, tmp_path: Path, measured: Measured) -> None:
    """A is the source's, B is scale·B rounded once; only a rank above min(m, n) comes down, at the cost of rounding."""
    report = para_ext.compress_adapter(ADAPTERS[name], tmp_path / "out", keep=1.0, dtype=torch.float32)
    pairs = read(tmp_path / "out")[0]
    for module, old in original(name)[0].items():
        new, most = pairs[module], min(len(old.B), old.A.shape[1])
        assert len(new.A) == min(len(old.A), most)
        assert len(old.A) > most or (torch.equal(new.A, old.A) and torch.equal(new.B, old.B.float().double()))
    error = math.hypot(*errors(name, tmp_path / "out").values())
    assert error <= report.error <= 1e-7 * report.norm
    measured.most("written file: error / norm at keep 1", error / report.norm, name)
    measured.adapters.add(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_selection_is_the_brute_force_one(name: str, measured: Measured) -> None:
    """For every total rank there is; a cut between two σ that neither side can tell apart proves nothing."""
    spectra = para_ext.decompose(ADAPTERS[name]).spectra
    dense = oracle(name)
    for found in spectra.modules:
        S = dense[found.name].S
        difference = float((S - S.new_tensor(found.sigma)).abs().max() / S[0])
        assert difference <= 1e-10
        measured.most("spectra: |σ - oracle's σ| / σ₁", difference, f"{name}, {found.name}")
    noise = 1e-12 * max(float(svd.S[0]) for svd in dense.values())
    order = sorted(((float(s), module) for module, svd in dense.items() for s in svd.S), reverse=True)
    ranks: Counter[str] = Counter()
    decided = 0
    for total, (sigma, module) in enumerate(order, 1):
        ranks[module] += 1
        if total == len(order) or sigma - order[total][0] > noise:
            decided += 1
            assert spectra.plan(total_rank=total, score="sigma").ranks == {m: ranks[m] for m in dense}, total
    measured.least("selection: total ranks with a clear cut", decided / len(order), name)
    assert decided >= 0.9 * len(order)
    measured.adapters.add(name)


# The models


@dataclass(frozen=True)
class Case:
    """One adapter, the model it belongs to, and the outputs [2, 8, ...] that dense weights give at the plan's ranks."""

    name: str
    folder: Path
    ranks: Mapping[str, int]
    base: nn.Module
    inputs: Inputs
    expected: Tensor

    def load(self, folder: Path) -> Any:
        """The adapter in a model that has the base's own weights: PEFT wraps the layers and leaves these alone."""
        model = copy.deepcopy(self.base, {id(parameter): parameter for parameter in self.base.parameters()})
        return peft.PeftModel.from_pretrained(model, folder, torch_device="cpu")

    def distance(self, model: Any) -> float:
        return distance(outputs(model, self.inputs), self.expected)


def distance(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def base_of(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    return str(config["base_model_name_or_path"] or config["auto_mapping"]["base_model_class"])


def with_updates(
    model: nn.Module, inputs: Inputs, updates: Iterable[tuple[str, Tensor]], others: Mapping[str, Tensor]
) -> Tensor:
    """Outputs of the model with W + ΔW for the weights of these modules, and with the adapter's other tensors."""
    weights = {key: tensor.double() for key, tensor in others.items()}
    for module, update in updates:
        layer: Any = model.get_submodule(module)
        transposed = isinstance(layer, nn.Embedding | Conv1D)
        weights[f"{module}.weight"] = layer.weight.detach() + (update.T if transposed else update)
    return outputs(lambda **kwargs: torch.func.functional_call(model, weights, kwargs=kwargs), inputs)


@pytest.fixture(scope="module", params=[name for name in ADAPTERS if base_of(ADAPTERS[name]) in ARCHITECTURES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, measured: Measured) -> Case:
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "small"
    ranks = para_ext.compress_adapter(ADAPTERS[name], folder, keep=KEEP, dtype=torch.float32).ranks
    base, inputs = build(base_of(ADAPTERS[name]))
    pairs, others = original(name)
    expected = with_updates(base, inputs, ((m, oracle(name)[m].best(k)) for m, k in ranks.items()), others)
    whole = distance(with_updates(base, inputs, ((m, p.B @ p.A) for m, p in pairs.items()), others), expected)
    off = distance(with_updates(base, inputs, (), others), expected)
    assert off >= 1e-3, "the adapter does not show in the outputs"
    assert whole >= 1e-4, "what was dropped does not show in the outputs"
    measured.least("outputs: distance without LoRA", off, name)
    measured.least("outputs: distance before compression", whole, name)
    return Case(name, folder, ranks, base, inputs, expected)


def test_peft_loads_the_written_adapter(case: Case, measured: Measured) -> None:
    found = case.distance(case.load(case.folder))
    assert found <= 1e-6
    measured.most("outputs: written adapter, loaded (fp32 factors)", found, case.name)
    measured.adapters.add(case.name)


def test_a_live_model_gives_the_same_outputs(case: Case, tmp_path: Path, measured: Measured) -> None:
    model = case.load(ADAPTERS[case.name])
    assert para_ext.compress_model(model, keep=KEEP).ranks == case.ranks
    found = case.distance(model)
    assert found <= 1e-10
    measured.most("outputs: live model (fp64 factors)", found, case.name)

    model.save_pretrained(tmp_path, save_embedding_layers=False)
    del model
    found = case.distance(case.load(tmp_path))
    assert found <= 1e-10
    measured.most("outputs: live model, saved and loaded (fp64 factors)", found, case.name)
    measured.adapters.add(case.name)


# Single files


@pytest.mark.parametrize("name", SINGLE)
def test_single_files(name: str, tmp_path: Path) -> None:
    """Keys and other tensors stay, and every ΔW is as near as the report says."""
    (source,) = (path for path in SINGLE[name].iterdir() if path.suffix in (".bin", ".safetensors"))
    old = load_file(source) if source.suffix == ".safetensors" else torch.load(source, "cpu", weights_only=True)
    report = para_ext.compress_adapter(source, tmp_path / "out.safetensors", keep=KEEP)
    new = load_file(tmp_path / "out.safetensors")
    end_A, end_B = next(ends for start, ends in ENDS.items() if name.startswith(start))
    stems = [key.removesuffix(end_A) for key in old if key.endswith(end_A)]
    assert len(stems) == len(report.modules)
    kept = {stem for stem in stems if stem + end_A in new}
    assert new.keys() == {key for key in old if key.removesuffix(end_A).removesuffix(end_B) not in {*stems} - kept}
    lost = []
    for stem in stems:
        W = old[stem + end_B].double() @ old[stem + end_A].double()
        if stem in kept:
            W -= new[stem + end_B].double() @ new[stem + end_A].double()
        lost.append(float(W.norm()))
    assert report.error_floor * (1 - 1e-6) <= math.hypot(*lost) <= report.error * (1 + 1e-12)
    assert report.error <= 1.1 * math.hypot(*lost)
    assert report.parameters_after <= KEEP * report.parameters_before
    pairs = {stem + end for stem in kept for end in (end_A, end_B)}
    assert all(torch.equal(new[key], old[key]) for key in new.keys() - pairs)
    assert para_ext.verify(source, tmp_path / "out.safetensors").error == pytest.approx(math.hypot(*lost), rel=1e-6)


# What can't be done


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_are_refused_by_their_kind(name: str, tmp_path: Path) -> None:
    kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), "")
    before = state(OTHERS[name])
    tensors = [path for path in OTHERS[name].iterdir() if path.suffix in (".bin", ".safetensors")]
    refusals = []
    for source in (OTHERS[name], *tensors):
        with pytest.raises(para_ext.ParaError) as refusal:
            para_ext.compress_adapter(source, tmp_path / "out", keep=0.5)
        assert not any(tmp_path.iterdir())
        refusals.append(str(refusal.value))
    assert state(OTHERS[name]) == before
    for message in refusals:
        path, _, text = message.partition("' ")
        assert path.startswith(f"'{OTHERS[name]}") and kind in text and "\n" not in text


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
