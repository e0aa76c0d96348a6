"""AdaLoRA (arXiv 2303.10512), PEFT's: ranks are allotted while it is trained, to the parameters of a budget."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import training
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

if TYPE_CHECKING:
    from tasks import Task

INITIAL = 1.5  # of the final rank, as in the paper
PRUNED = (0.1, 0.5)  # the part of the steps in which ranks fall
INTERVAL = 5  # steps between two allotments
ORTHOGONALITY = 0.1  # weight of ‖PᵀP − I‖_F


def train(task: Task, model: nn.Module, rank: int, params: int, seed: int, learning_rate: float) -> Any:
    """A plain LoRA of scale 1, a PEFT model, of what AdaLoRA allots: ``rank`` in the mean, no more than ``params``."""
    data = task.splits().train
    steps, first = len(data.batches(task.batch, 0)) * task.epochs, round(INITIAL * rank)
    config = AdaLoraConfig(
        init_r=first, target_r=rank, lora_alpha=first, target_modules=list(task.targets),
        modules_to_save=["classifier"], total_step=steps, deltaT=INTERVAL,
        tinit=int(PRUNED[0] * steps), tfinal=steps - int(PRUNED[1] * steps),
    )  # fmt: skip
    adapted = get_peft_model(model, config).eval()
    training.train(
        adapted, data, task, seed, learning_rate,
        penalty=partial(_penalty, adapted), after=adapted.base_model.update_and_allocate,
    )  # fmt: skip
    terms, head = _terms(adapted, params), adapted.base_model.model.classifier.modules_to_save["default"]
    plain = task.model()
    plain.classifier.load_state_dict(head.state_dict())
    kept = {name: len(A) for name, (_, A) in terms.items() if len(A)}
    found = training.adapt(plain, kept)
    with torch.no_grad():
        for name in kept:
            layer = found.base_model.model.get_submodule(name)
            B, A = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
            B.copy_(terms[name][0].reshape(B.shape))
            A.copy_(terms[name][1].reshape(A.shape))
    return found


def _penalty(adapted: nn.Module) -> Tensor:
    """Mean of ‖PᵀP − I‖_F over the factors, which PEFT adds to the loss of models that have one."""
    factors = [p for name, p in adapted.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    grams = (p @ p.T if len(p) < p.shape[1] else p.T @ p for p in factors)
    return ORTHOGONALITY * torch.stack([(gram - torch.eye(len(gram))).norm() for gram in grams]).mean()


def _terms(adapted: nn.Module, params: int) -> dict[str, tuple[Tensor, Tensor]]:
    """B [m, rank] and A [rank, n] of every layer, without what was pruned.

    AdaLoRA counts components, not parameters: where layers differ, the smallest go until the parameters fit.
    """
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_E") and "default" in layer.lora_E
    }
    size = {name: layer.lora_E["default"].detach().abs()[:, 0] for name, layer in layers.items()}
    cost = {name: layer.lora_A["default"].shape[1] + len(layer.lora_B["default"]) for name, layer in layers.items()}
    order = sorted(((value.item(), name, j) for name, own in size.items() for j, value in enumerate(own)), reverse=True)
    taken: dict[str, list[int]] = {name: [] for name in layers}
    for value, name, j in order:
        params -= cost[name]
        if value == 0 or params < 0:
            break
        taken[name].append(j)
    return {name: _product(layer, taken[name]) for name, layer in layers.items()}


def _product(layer: Any, kept: list[int]) -> tuple[Tensor, Tensor]:
    """B [m, kept] and A [kept, n] of ΔW, all scaling in B."""
    scale = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)  # as PEFT does
    B, E, A = (part["default"].detach() for part in (layer.lora_B, layer.lora_E, layer.lora_A))
    return scale * B[:, kept], E[kept] * A[kept]
