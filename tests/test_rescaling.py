"""Factors for readers that divide B' by a gain again: their certificate against dense fp64 products.

Never below the truth, and within 3× of it: for every type, below, at and above the module's rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import U64
from torch import Tensor

import para_ext
from para_ext import LoraFactors, ParaError
from para_ext.arrays import as_numpy, as_tensor, code_of, torch_dtype
from para_ext.backends import Truncated
from para_ext.rescaling import rescaled

pytestmark = pytest.mark.usefixtures("one_thread")

CODES = ("BF16", "F16", "F32")
M, N, R = 24, 20, 6


def module(seed: int, *, scale: float, code: str, decay: float = 3.0) -> LoraFactors:
    """Numpy factors, as they are read from a file, with singular values over ``decay`` decades."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(M, R, generator=generator) * torch.logspace(0, -decay, R)
    A = torch.randn(R, N, generator=generator)
    B, A = (as_numpy(x.to(torch_dtype(code))) for x in (B, A))
    return LoraFactors(f"m{seed}", B, A, scale)


def truth(f: LoraFactors, new: Truncated | LoraFactors, gain: float) -> float:
    """‖scale·BA − B'A'/gain‖_F."""
    B, A, B2, A2 = (as_tensor(x).double() for x in (f.B, f.A, new.B, new.A))
    return float((f.scale * (B @ A) - B2 @ A2 / gain).norm())


def check(f: LoraFactors, new: Truncated, gain: float) -> None:
    true = truth(f, new, gain)
    B, A = (as_tensor(x).double() for x in (f.B, f.A))
    unit = (f.rank + new.A.shape[0]) * U64 * abs(f.scale) * float(B.norm() * A.norm())
    assert true <= new.error + unit  # to which the dense products themselves are right
    assert new.error <= 3 * true + 120 * unit  # below which QR in fp64 tells nothing


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("scale", [1.0, 0.7, -4 / 3, 2.0])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("written", [None, *CODES])
def test_certificates(backend: str, code: str, written: str | None, scale: float) -> None:
    """Dropped, truncated, unchanged and padded, each with gains that are powers of two and gains that are not."""
    ranks = [0, 1, 3, R - 1, R, R + 1, 2 * R]
    gains = [1.0, 0.25, 3 / 7, 5 / 8, 1 / 3, 2.0, 7 / 5]
    cases = [(k, gain) for k in ranks for gain in gains]
    modules = [module(i, scale=scale, code=code) for i in range(len(cases))]
    decomposition = para_ext.decompose(modules, backend=backend)
    new = decomposition.truncate_certified(
        {f.name: k for f, (k, _) in zip(modules, cases, strict=True)},
        written,
        {f.name: gain for f, (_, gain) in zip(modules, cases, strict=True)},
    )
    for f, t, (k, gain) in zip(modules, new, cases, strict=True):
        assert t.B.shape == (M, k) and t.A.shape == (k, N)
        check(f, t, gain)
        if k >= R:  # no rank falls: A as it was, B in one rounding, and zeros
            A, B = (as_tensor(x).double() for x in (t.A, t.B))
            assert torch.equal(A[:R].to(torch_dtype(code)), as_tensor(f.A)) or written not in (None, code)
            assert not A[R:].any() and not B[:, R:].any()
            exact = as_tensor(f.B).double() * (scale * gain)
            assert torch.equal(B[:, :R], exact.to(torch_dtype(written or code)).double())
            powers = all(math.frexp(x)[0] == 0.5 for x in (abs(scale), gain))
            if powers and written in (None, code) and torch.equal(B[:, :R], exact):
                assert t.error == 0


def test_a_gain_of_one_changes_nothing() -> None:
    f = module(1, scale=0.7, code="BF16")
    d = para_ext.decompose([f])
    for k in (0, 3, R, R + 2):
        (with_gain,), (without,) = d.truncate_certified({"m1": k}, None, {"m1": 1.0}), d.truncate_certified({"m1": k})
        assert with_gain.error == without.error
        assert torch.equal(as_tensor(with_gain.B), as_tensor(without.B))
        assert torch.equal(as_tensor(with_gain.A), as_tensor(without.A))


def test_a_gain_rounds_once() -> None:
    """Factors in 16 bits are as far from ΔW with a gain as without: B' is multiplied before it is rounded."""
    modules = [module(i, scale=1.3, code="BF16", decay=0.5) for i in range(20)]
    ranks: Mapping[str, int] = {f.name: R - 1 for f in modules}
    d = para_ext.decompose(modules)
    plain = d.truncate_certified(ranks)
    gained = d.truncate_certified(ranks, None, dict.fromkeys(ranks, 5 / 7))
    errors = [
        math.fsum(truth(f, t, gain) ** 2 for f, t in zip(modules, new, strict=True))
        for new, gain in ((plain, 1.0), (gained, 5 / 7))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("gain", [1.0, 3 / 7])
def test_all_of_sigma_on_one_side(backend: str, code: str, side: str, gain: float) -> None:
    """The other side is orthonormal but for its type's rounding, whether the rank falls, stays, or is filled up."""
    ranks = [0, 1, 3, R, R + 2]
    modules = [module(i, scale=0.7, code=code, decay=1.0) for i in range(len(ranks))]
    decomposition = para_ext.decompose(modules, backend=backend)
    plan = {f.name: k for f, k in zip(modules, ranks, strict=True)}
    gains = dict.fromkeys(plan, gain)
    for f, t, k in zip(modules, decomposition.truncate_certified(plan, None, gains, side), ranks, strict=True):
        assert t.B.shape == (M, k) and t.A.shape == (k, N)
        check(f, t, gain)
        B, A = as_tensor(t.B).double() / gain, as_tensor(t.A).double()
        kept = min(k, R)
        for name, gram in (("B", B.T @ B), ("A", A @ A.T)):
            sigma = torch.tensor(decomposition.spectra.columns[f.name])[:kept]
            wanted = torch.diag(sigma.square() if name == side else torch.ones_like(sigma))
            allowed = (
                4 * R * torch.finfo(torch_dtype(code)).eps * (float(sigma[0]) ** 2 if name == side and kept else 1.0)
            )
            assert kept == 0 or float((gram[:kept, :kept] - wanted).abs().max()) <= allowed
            assert not gram[kept:].any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-7, 1e-12, 0.0])
@pytest.mark.parametrize("shape", [(M, N), (4, N), (M, 4)])
def test_orthonormal_down_to_roundoff(backend: str, side: str, small: float, shape: tuple[int, int]) -> None:
    """In factors that are ill-conditioned, too, and where rank exceeds a side; and with the certificate."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 0.5, small, small, small, small])
    mixed = torch.randn(R, R, generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], R, generator=generator) * sizes @ mixed.float()
    A = (torch.linalg.inv(mixed) @ torch.randn(R, shape[1], generator=generator).double()).float()
    f = LoraFactors("x", B.numpy(), A.numpy(), 0.7)
    (new,) = para_ext.decompose([f], backend=backend).truncate_certified({"x": R}, balance=side)
    assert new.B.shape == (shape[0], R) and new.A.shape == (R, shape[1])
    check(f, new, 1.0)
    there = min(R, shape[0] if side == "A" else shape[1])
    unit = as_tensor(new.B).T if side == "A" else as_tensor(new.A)
    gram = unit.double() @ unit.double().T
    assert torch.allclose(gram[:there, :there], torch.eye(there, dtype=torch.float64), atol=1e-6)
    assert not gram[there:].any()


def test_an_unknown_balance_is_refused() -> None:
    with pytest.raises(ParaError, match="balance is 'C'; give one of even, A, B"):
        para_ext.decompose([module(0, scale=1.0, code="F32")]).truncate({"m0": 3}, balance="C")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    code=st.sampled_from(CODES),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8)),
    gain=st.floats(2**-6, 2**6),
    distance=st.sampled_from([0.0, 1e-9, 1e-4, 1e-2, 1.0]),
    spread=st.floats(0, 6),
)
def test_amplified_from_any_approximation(
    seed: int, code: str, shape: tuple[int, int, int], gain: float, distance: float, spread: float
) -> None:
    """Whatever the approximation is, balanced or not, near or far: its error and what rounding adds are bounded."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(0, -spread, k)
    B, A = torch.randn(m, k, generator=generator) * rows, torch.randn(k, n, generator=generator) / rows.sqrt()[:, None]
    near = (B + distance * torch.randn(m, k, generator=generator) * rows).float()
    f = LoraFactors("x", B.numpy(), A.numpy())
    exact = Truncated(
        near.numpy(), A.numpy(), float(((B.double() - near.double()) @ A.double()).norm()) * (1 + 1e-9), 0, 0
    )
    new = rescaled(f, exact, code, gain)
    assert code_of(new.B) == code_of(new.A) == code
    check(f, new, gain)
    unrounded: tuple[Tensor, ...] = (near.double() * gain, A.double())
    for stored, ideal, lost in zip((new.B, new.A), unrounded, (new.rounding_B, new.rounding_A), strict=True):
        assert lost == pytest.approx(float((as_tensor(stored).double() - ideal).norm()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("size", "gain", "why"), [(3e4, 8.0, "exceeds the range of float16"),
                                                   (1e-5, 1 / 64, "too small for float16")])  # fmt: skip
@pytest.mark.parametrize("rank", [R - 1, R, R + 1])
def test_what_the_type_cannot_hold_is_refused(size: float, gain: float, why: str, rank: int) -> None:
    f = module(0, scale=1.0, code="F32")
    f = LoraFactors("layers.0.x", f.B * np.float32(size), f.A)
    if rank < R:  # balanced: the size is on both sides
        f = LoraFactors("layers.0.x", f.B * np.float32(size), f.A)
    with pytest.raises(ParaError, match=rf"module 'layers\.0\.x': .*{why}.*dtype="):
        para_ext.decompose([f]).truncate_certified({"layers.0.x": rank}, "F16", {"layers.0.x": gain})
