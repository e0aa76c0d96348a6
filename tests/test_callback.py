"""Training goes on: optimizers after a compression, and ParaCallback in a real Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import para_ext
from para_ext import ParaError
from para_ext.optimizer import carry_over

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

VOCABULARY = 32


def llama(rank: int = 8, **options: Any) -> Any:
    """A tiny Llama with a new LoRA."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def randomize(model: Any, true_rank: int | None = None) -> Any:
    """LoRA factors as if trained, of a rank below their shape's where one is given."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if "default" in getattr(module, "lora_A", ()):
            for side in (module.lora_A["default"], module.lora_B["default"]):
                weight = side.weight.data
                if true_rank is None:
                    weight.normal_(0, 0.3, generator=draw)
                else:
                    left = torch.randn(len(weight), true_rank, generator=draw)
                    weight.copy_(0.1 * left @ torch.randn(true_rank, weight.shape[1], generator=draw))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: Any) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8) % VOCABULARY
    found: Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_moments_are_the_gradients_by_the_new_factors() -> None:
    """Nothing is lost by truncating to the true rank, so that carried gradients must be those of the new factors."""
    model = randomize(llama(), true_rank=2).double()
    optimizer = torch.optim.AdamW(trained(model).values())
    names = {id(p): name for name, p in trained(model).items()}
    for name, gradient in gradients(model).items():
        p = trained(model)[name]
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()}
    assert names
    para_ext.compress_model(model, optimizer=optimizer, rank=2)
    for name, gradient in gradients(model).items():
        state = optimizer.state[trained(model)[name]]
        assert state["step"] == 7
        assert torch.allclose(state["exp_avg"], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
        assert state["exp_avg_sq"].shape == gradient.shape
        assert (state["exp_avg_sq"] >= 0).all()


def test_the_second_moment_is_that_of_uncorrelated_gradients() -> None:
    """Gradients drawn independently, component by component, transform as the factors do; so must their mean square."""
    draw = torch.Generator().manual_seed(2)
    model = randomize(llama()).double()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    scale = layer.scaling["default"]
    variances = torch.rand(B.shape, generator=draw, dtype=torch.float64)
    optimizer = torch.optim.AdamW(trained(model).values())
    optimizer.state[B] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(B), "exp_avg_sq": variances}
    para_ext.compress_model(model, optimizer=optimizer, rank=3)
    new = layer.lora_A["default"].weight.detach()
    T = new @ torch.linalg.pinv(A.detach())
    samples = variances.sqrt() * torch.randn(20_000, *B.shape, generator=draw, dtype=torch.float64)
    wanted = (samples @ T.T / scale).square().mean(0)
    found = optimizer.state[layer.lora_B["default"].weight]["exp_avg_sq"]
    assert torch.allclose(found, wanted, rtol=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
        lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
        lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
        lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    ],
    ids=["adamw", "sgd", "adafactor", "rmsprop"],
)
def test_an_optimizer_holds_the_new_parameters_only_and_goes_on(make: Any) -> None:
    model = randomize(llama())
    ps = list(trained(model).values())
    optimizer = make([{"params": ps[:9], "weight_decay": 0.1}, {"params": ps[9:]}])
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    para_ext.compress_model(model, optimizer=optimizer, total_rank=8, max_rank=4)
    now = trained(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in now.values()}
    assert len(held) == len(now) < len(ps)  # whole modules were dropped
    assert set(map(id, optimizer.state)) <= set(map(id, held))
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = copy.deepcopy(optimizer.state_dict())
    fresh = make([{"params": group["params"]} for group in optimizer.param_groups])
    fresh.load_state_dict(state)


def test_moments_are_of_the_new_factors_type() -> None:
    model = randomize(llama()).bfloat16()
    optimizer = torch.optim.AdamW(trained(model).values())
    for dtype in (torch.float32, torch.bfloat16):
        gradients(model)
        optimizer.step()
        para_ext.compress_model(model, optimizer=optimizer, keep=0.5, dtype=dtype)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}
        model.to(dtype)


def test_state_that_cannot_be_carried_over_starts_anew() -> None:
    model = randomize(llama())
    optimizer = torch.optim.Adagrad(trained(model).values())  # sums of squares, under another name
    gradients(model)
    optimizer.step()
    para_ext.compress_model(model, optimizer=optimizer, rank=2)
    assert not optimizer.state
    carry_over(optimizer, [])


def test_what_is_no_optimizer_is_refused_and_the_model_stays() -> None:
    model = randomize(llama())
    before = {name: p.clone() for name, p in trained(model).items()}
    with pytest.raises(ParaError, match=r"a str is not a torch.optim.Optimizer: compress first"):
        para_ext.compress_model(model, optimizer="adam", rank=2)  # type: ignore[arg-type]
    with pytest.raises(ParaError, match=r"LBFGS remembers all parameters as one vector"):
        para_ext.compress_model(model, optimizer=torch.optim.LBFGS(trained(model).values()), rank=2)
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


# --- Trainer ----------------------------------------------------------------------------------------------------------


def trainer_of(model: Any, folder: Path, callback: Any, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 3e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip
    rows = [{"input_ids": torch.arange(8) + i % 2} for i in range(64)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(8)[None]).logits
    return found


def ranks(model: Any) -> list[int]:
    return [m.r["default"] for m in model.modules() if "default" in getattr(m, "lora_A", ())]


def test_compressed_at_the_end_and_saved(tmp_path: Path) -> None:
    model = llama()
    callback = para_ext.ParaCallback(rank=2)
    trainer = trainer_of(model, tmp_path / "run", callback)
    trainer.train()
    trainer.save_model(tmp_path / "small")
    assert list(callback.reports) == [12]
    assert set(ranks(model)) == {2}
    again = peft.PeftModel.from_pretrained(llama().unload(), tmp_path / "small")
    assert torch.allclose(output(again), output(model), atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_fall_step_by_step_and_training_goes_on(tmp_path: Path, accumulation: int) -> None:
    model = llama()
    callback = para_ext.ParaCallback({3: {"rank": 4}, 6: {"rank": 2, "min_rank": 0}})
    trainer = trainer_of(model, tmp_path, callback, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert list(callback.reports) == [3, 6]
    assert set(ranks(model)) == {2}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trained(model).values()}
    assert all(trainer.optimizer.state[p]["step"] == 12 for p in held)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[6] < losses[0]


def test_a_checkpoint_of_a_schedule_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    steps = {2: {"keep": 0.5}, 9: {"keep": 0.5}}
    whole = llama()
    trainer_of(whole, tmp_path / "whole", para_ext.ParaCallback(steps)).train()
    first = trainer_of(llama(), tmp_path / "run", para_ext.ParaCallback(steps), save_strategy="steps", save_steps=6)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    model = peft.PeftModel.from_pretrained(llama().unload(), checkpoint, is_trainable=True)
    callback = para_ext.ParaCallback(steps)
    trainer_of(model, tmp_path / "run", callback).train(str(checkpoint))
    assert list(callback.reports) == [9]
    assert ranks(model) == ranks(whole)
    assert torch.allclose(output(model), output(whole), atol=1e-5)


def test_what_a_schedule_cannot_go_with_is_refused(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    trainer = trainer_of(llama(), tmp_path, para_ext.ParaCallback({3: {"rank": 4}}))
    for name, value in best.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ParaError, match="load_best_model_at_end would load a checkpoint of other ranks"):
        trainer.train()
    for steps in ({0: {"rank": 4}}, {"3": {"rank": 4}}, {3: 0.5}):
        with pytest.raises(ParaError, match="give it like"):
            para_ext.ParaCallback(steps)


def test_a_wrong_budget_stops_before_training(tmp_path: Path) -> None:
    with pytest.raises(ParaError, match="keeep"):
        para_ext.ParaCallback({3: {"keeep": 0.5}})
