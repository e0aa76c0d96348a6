"""An optimizer after its model was compressed: new parameters in its groups, and its moments carried over to them.

Truncation replaces B and A by B' = B·C and A' = T·A, with s·B·A ≈ B'·A'. Where G is the loss's gradient by s·B·A, those
by the factors are

    ∂B = s·G·Aᵀ  →  ∂B' = G·A'ᵀ = ∂B·Tᵀ/s            ∂A = s·Bᵀ·G  →  ∂A' = B'ᵀ·G = Cᵀ·∂A/s

so a mean of past gradients is carried over by the same products, as far as the factors stood still meanwhile and ΔW' is
ΔW; a mean of squares by the squares of T and C, as if gradients of different components were not correlated, which is
what Adam assumes of them too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import ParaError
from .models import Exchange

# Of PyTorch's optimizers: means of gradients, and of their squares.
_MEANS = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")


def check_optimizer(optimizer: object) -> None:
    """Refuse what :func:`carry_over` can't work on."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParaError(
            f"a {type(optimizer).__name__} is not a torch.optim.Optimizer: compress first, then build the optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ParaError("LBFGS remembers all parameters as one vector: compress first, then build the optimizer")


def carry_over(optimizer: torch.optim.Optimizer, exchanges: Iterable[Exchange]) -> None:
    """Put new parameters where the old ones were, in the same groups; those without a successor leave.

    A parameter's state starts anew where it can't be carried over: a bias, factors of several blocks, a scale of 0, or
    an optimizer that keeps other tensors than these moments.
    """
    successors: dict[Tensor, Tensor | None] = {}
    for exchange in exchanges:
        new = exchange.new or (None,) * len(exchange.old)
        found = dict(zip(exchange.old, new, strict=True))
        states = _states(optimizer, exchange) if exchange.new else {}
        for old, successor in found.items():
            if old in successors:  # modules that share their factors
                continue
            successors[old] = successor
            optimizer.state.pop(old, None)
            if successor is not None and old in states:
                optimizer.state[successor] = states[old]
    for group in optimizer.param_groups:
        kept = (successors.get(p, p) for p in group["params"])
        group["params"][:] = [p for p in kept if p is not None]


def _states(optimizer: torch.optim.Optimizer, exchange: Exchange) -> dict[Tensor, dict[str, Any]]:
    """The states of the new B and A, by the old ones; only what can be carried over."""
    assert exchange.new is not None
    if exchange.blocks != 1 or not exchange.scale:
        return {}
    (B, A), (new_B, new_A) = exchange.old[:2], exchange.new[:2]
    T = _solution(A.flatten(1).T, new_A.flatten(1).T).T / exchange.scale  # [k, r]
    C = _solution(B.flatten(1), new_B.flatten(1)) / exchange.scale  # [r, k]
    states = {}
    for old, new, left, right in ((B, new_B, None, T.T), (A, new_A, C.T, None)):
        state = optimizer.state.get(old)
        if state and all(key in (*_MEANS, *_SQUARES) for key, value in state.items() if not _is_number(value)):
            states[old] = {key: _carried(key, value, old, new, left, right) for key, value in state.items()}
    return states


def _is_number(value: Any) -> bool:
    """A count of steps or the like, which has nothing to do with shapes."""
    return not isinstance(value, Tensor) or value.dim() == 0


def _carried(key: str, value: Any, old: Tensor, new: Tensor, left: Tensor | None, right: Tensor | None) -> Any:
    """left · value · right, of the squares of both for a mean of squares."""
    if _is_number(value):
        return value.clone() if isinstance(value, Tensor) else value
    product = value.flatten(1).double()
    for factor, on_left in ((left, True), (right, False)):
        if factor is not None:
            weights = factor.square() if key in _SQUARES else factor
            product = weights @ product if on_left else product @ weights
    return product.reshape(new.shape).to(new.dtype if value.dtype == old.dtype else value.dtype)


def _solution(X: Tensor, Y: Tensor) -> Tensor:
    """float64 S [r, k] with X [m, r] · S = Y [m, k], of least norm; X's columns may depend on each other."""
    X, Y = X.detach().double(), Y.detach().double()
    solution: Tensor = torch.linalg.pinv(X.T @ X, hermitian=True) @ (X.T @ Y)
    return solution
