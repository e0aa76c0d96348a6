"""Training: a head fitted on frozen features, then LoRA and head together; and the tests of what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from tasks import Data, Task

HEAD_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
WEIGHT_DECAY = 0.01
WARMUP = 0.1


def evaluate(function: Callable[..., Tensor], data: Data, size: int = 100) -> Tensor:
    """``function(*batch)`` of all rows, [rows, ...] in their order, without gradients."""
    order, results = [], []
    with torch.inference_mode():
        for rows in data.batches(size, 0):
            results.append(function(*data.batch(rows)))
            order += rows
    return torch.cat(results)[torch.tensor(order).argsort()]


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor, decay: float = 1e-3) -> None:
    """Set the head to the logistic regression of labels [rows] on features [rows, features], by L-BFGS in float64."""
    features, scale = features.double(), features.double().std(0, correction=0).clamp_min(1e-6).mean()
    features = features / scale  # so that one decay suits features of any size
    weight = torch.zeros(head.weight.shape, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(head.bias.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias)


def ranks(task: Task, model: nn.Module, rank: int) -> dict[str, int]:
    """The rank of each layer that gets a LoRA: ``rank``, or min(m, n) where the layer is smaller than that."""
    return {
        name: min(rank, *module.weight.shape[:2])
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in task.targets
    }


def adapt(model: nn.Module, ranks: dict[str, int]) -> PeftModel:
    """The model with a new LoRA of scale 1 on every layer that has a rank, and a head to be trained along."""
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    config = LoraConfig(
        r=largest, lora_alpha=largest, rank_pattern=smaller, alpha_pattern=smaller,
        target_modules=list(ranks), modules_to_save=["classifier"],
    )  # fmt: skip
    return get_peft_model(model, config).eval()


def train(
    model: nn.Module, data: Data, task: Task, seed: int, learning_rate: float, steps: int | None = None,
    penalty: Callable[[], Tensor] | None = None, after: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """AdamW on all parameters that want a gradient, learning rate linearly up, then down; all epochs, or ``steps``.

    ``penalty`` is added to the loss; ``after`` is called with the number of every step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = [rows for epoch in range(task.epochs) for rows in data.batches(task.batch, 1000 * seed + epoch)][:steps]
    warmup = WARMUP * len(batches)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup))
    )
    for step, rows in enumerate(batches):
        loss = F.cross_entropy(model(*data.batch(rows)), data.labels[rows])
        if penalty:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after:
            after(step)
