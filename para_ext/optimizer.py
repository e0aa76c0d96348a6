"""An optimizer after its model was compressed: new parameters in its groups, and its moments carried over to them.

Truncation replaces B and A by B' = B·C and A' = T·A, with s·B·A ≈ B'·A'. Where G is the loss's gradient by s·B·A, those
by the factors are

    ∂B = s·G·Aᵀ  →  ∂B' = G·A'ᵀ = ∂B·Tᵀ/s            ∂A = s·Bᵀ·G  →  ∂A' = B'ᵀ·G = Cᵀ·∂A/s

so a mean of past gradients is carried over by the same products, as far as the factors stood still meanwhile and ΔW' is
ΔW; a mean of squares by the squares of T and C, as if gradients of different components were not correlated, which is
what Adam assumes of them too. It is never rounded to 0, as float16 would do to many, because steps are divided by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import ParaError
from .models import Contents, Exchange

# Of PyTorch's optimizers: means of gradients, and of their squares.
_MEANS = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")


def checked_optimizer(optimizer: object, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer itself, out of what wraps it (as accelerate does).

    Args:
        optimizer: of whatever type.
        parameters: the adapter's.

    Raises:
        ParaError: :func:`carried_over` can't work on it, or it has none of the parameters.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParaError(f"a {kind} is not a torch.optim.Optimizer: compress first, then build the optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ParaError("LBFGS remembers all parameters as one vector: compress first, then build the optimizer")
    if {p for group in optimizer.param_groups for p in group["params"]}.isdisjoint(parameters):
        raise ParaError(
            f"the {kind} has none of this adapter's parameters, as after a compression that it was not given to: build "
            "it, or the Trainer around it, for the model as it is"
        )
    return optimizer


def carried_over(optimizer: torch.optim.Optimizer, exchanges: Iterable[Exchange]) -> list[Contents]:
    """The optimizer's state and groups, and what they are to hold: new parameters where the old ones were.

    Those without a successor leave. A parameter's state starts anew where it can't be carried over: a bias, factors of
    several blocks, a scale of 0, values out of the type's range, or an optimizer that keeps anything but numbers and
    these moments, as plain tensors.
    """
    successors: dict[Tensor, Tensor | None] = {}
    state = dict(optimizer.state)
    for exchange in exchanges:
        states = _states(optimizer, exchange)
        for old, new in zip(exchange.old, exchange.new or (None,) * len(exchange.old), strict=True):
            if old in successors:  # modules that share their factors
                continue
            successors[old] = new
            state.pop(old, None)
            if new is not None and old in states:
                state[new] = states[old]
    return [(optimizer.state, state), *((group, _followed(group, successors)) for group in optimizer.param_groups)]


def _followed(group: dict[str, Any], successors: dict[Tensor, Tensor | None]) -> dict[str, Any]:
    """A group with the successors as its parameters; their names, where it has them, stay beside them."""
    places = [i for i, p in enumerate(group["params"]) if successors.get(p, p) is not None]
    lists = {"params": [successors.get(p, p) for p in group["params"]]}
    if "param_names" in group:
        lists["param_names"] = group["param_names"]
    return {**group, **{key: [values[i] for i in places] for key, values in lists.items()}}


def _states(optimizer: torch.optim.Optimizer, exchange: Exchange) -> dict[Tensor, dict[str, Any]]:
    """The states of the new B and A, by the old ones; only what can be carried over."""
    if exchange.new is None or exchange.blocks != 1 or not exchange.scale:
        return {}
    (B, A), (new_B, new_A) = exchange.old[:2], exchange.new[:2]
    T = _solution(A.flatten(1).T, new_A.flatten(1).T).T / exchange.scale  # [k, r]
    C = _solution(B.flatten(1), new_B.flatten(1)) / exchange.scale  # [r, k]
    states = {}
    for old, new, left, right in ((B, new_B, None, T.T), (A, new_A, C.T, None)):
        state = optimizer.state.get(old)
        if state and all(_is_number(value) or _is_moment(key, value, old) for key, value in state.items()):
            carried = {key: _carried(key, value, old, new, left, right) for key, value in state.items()}
            if all(bool(value.isfinite().all()) for value in carried.values() if isinstance(value, Tensor)):
                states[old] = carried
    return states


def _is_number(value: Any) -> bool:
    """A count of steps or the like, which has nothing to do with shapes."""
    return value is None or isinstance(value, int | float) or (type(value) is Tensor and value.dim() == 0)


def _is_moment(key: str, value: Any, old: Tensor) -> bool:
    """Not, under the same names, something quantized, or a vector of one number for each row."""
    if key not in (*_MEANS, *_SQUARES) or type(value) is not Tensor or not value.is_floating_point():
        return False
    return (value.shape, value.layout, value.device) == (old.shape, old.layout, old.device)


def _carried(key: str, value: Any, old: Tensor, new: Tensor, left: Tensor | None, right: Tensor | None) -> Any:
    """left · value · right, of the squares of both for a mean of squares."""
    if _is_number(value):
        return value.clone() if isinstance(value, Tensor) else value
    product = value.flatten(1).double()
    for factor, on_left in ((left, True), (right, False)):
        if factor is not None:
            weights = factor.square() if key in _SQUARES else factor
            product = weights @ product if on_left else product @ weights
    dtype = new.dtype if value.dtype == old.dtype else value.dtype
    if key in _SQUARES:
        info = torch.finfo(dtype)
        product = product.clamp(min=info.tiny * info.eps)  # the smallest number above 0
    # With the strides of the parameter, which fused steps ask for.
    return torch.empty_like(new, dtype=dtype).copy_(product.reshape(new.shape))


def _solution(X: Tensor, Y: Tensor) -> Tensor:
    """float64 S [r, k] with X [m, r] · S = Y [m, k], of least norm; X's columns may depend on each other."""
    X, Y = X.detach().double(), Y.detach().double()
    solution: Tensor = torch.linalg.pinv(X.T @ X, hermitian=True) @ (X.T @ Y)
    return solution
