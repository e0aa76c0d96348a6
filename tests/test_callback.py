"""Training goes on: optimizers after a compression, and ParaCallback in a real Trainer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import para_ext
from para_ext import ParaError, models
from para_ext import optimizer as optimizers
from para_ext.compress import check_compression

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
    for layer in lora_layers(model):
        for side in (layer.lora_A["default"], layer.lora_B["default"]):
            weight = side.weight.data
            if true_rank is None:
                weight.normal_(0, 0.3, generator=draw)
            else:
                left = torch.randn(len(weight), true_rank, generator=draw)
                weight.copy_(0.1 * left @ torch.randn(true_rank, weight.shape[1], generator=draw))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "default" in getattr(module, "lora_A", ())]


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


class Quantized(Tensor):
    """As torchao's states: a tensor to look at, with another way of keeping numbers."""


@pytest.mark.parametrize(
    "state",
    [
        lambda p: {"sum": torch.ones_like(p)},  # Adagrad's, of squares, under another name
        lambda p: {"step": 1, "exp_avg": torch.ones_like(p).as_subclass(Quantized)},
        lambda p: {"step": 1, "exp_avg": torch.ones(len(p))},  # of rows, as Adafactor's
        lambda p: {"step": 1, "exp_avg": torch.ones(p.shape, dtype=torch.uint8)},
        lambda p: {"step": 1, "exp_avg": torch.ones_like(p), "map": [1.0, 2.0]},
        lambda p: {"step": 1, "exp_avg": torch.full_like(p, torch.inf)},
        lambda p: {"momentum_buffer": torch.eye(*p.shape).to_sparse()},
    ],
    ids=["name", "subclass", "rows", "uint8", "list", "infinite", "sparse"],
)
def test_state_that_cannot_be_carried_over_starts_anew(state: Callable[[Tensor], dict[str, Any]]) -> None:
    model = randomize(llama())
    optimizer = torch.optim.AdamW(trained(model).values())
    for p in trained(model).values():
        optimizer.state[p] = state(p)
    para_ext.compress_model(model, optimizer=optimizer, rank=2)
    assert not optimizer.state
    gradients(model)
    optimizer.step()
    assert set(optimizer.state) == set(trained(model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_second_moment_is_rounded_to_0(dtype: torch.dtype) -> None:
    """A step would be divided by it."""
    model = randomize(llama()).to(dtype)
    optimizer = torch.optim.AdamW(trained(model).values())
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for p in trained(model).values():
        optimizer.state[p] = {"exp_avg": torch.full_like(p, 1e-4), "exp_avg_sq": torch.full_like(p, smallest)}
    para_ext.compress_model(model, optimizer=optimizer, rank=2)
    for state in optimizer.state.values():
        assert state["exp_avg_sq"].dtype == dtype
        assert (state["exp_avg_sq"] > 0).all()


def test_names_of_parameters_stay_beside_them() -> None:
    model = randomize(llama())
    named = list(trained(model).items())
    head = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [*named[:9], ("head", head)]}, {"params": named[9:]}])
    para_ext.compress_model(model, optimizer=optimizer, total_rank=8, max_rank=4)
    now = {**trained(model), "head": head}
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        found |= zip(group["param_names"], group["params"], strict=True)
    assert {name: id(p) for name, p in found.items()} == {name: id(p) for name, p in now.items()}
    assert len(found) <= len(named)  # whole modules were dropped


def test_training_goes_on_after_a_compression_in_inference_mode() -> None:
    model = randomize(llama())
    optimizer = torch.optim.AdamW(trained(model).values())
    gradients(model)
    optimizer.step()
    with torch.inference_mode():
        para_ext.compress_model(model, optimizer=optimizer, rank=2)
    gradients(model)
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_parameter_of_the_adapter_that_is_not_trained_is_none_of_the_optimizers() -> None:
    model = randomize(llama())
    ups = [p for name, p in trained(model).items() if "lora_B" in name]
    optimizer = torch.optim.SGD(ups, lr=1e-2, momentum=0.9)
    gradients(model)
    optimizer.step()
    para_ext.compress_model(model, optimizer=optimizer, rank=2)
    now = [p for name, p in trained(model).items() if "lora_B" in name]
    assert set(optimizer.param_groups[0]["params"]) == set(optimizer.state) == set(now)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


def accelerated(optimizer: torch.optim.Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("wrap", [Wrapper, accelerated, lambda optimizer: Wrapper(accelerated(optimizer))])
def test_an_optimizer_is_looked_for_inside_of_what_wraps_it(wrap: Callable[[torch.optim.Optimizer], Any]) -> None:
    model = randomize(llama())
    with pytest.raises(ParaError, match="LBFGS remembers all parameters as one vector"):
        para_ext.compress_model(model, optimizer=wrap(torch.optim.LBFGS(trained(model).values())), rank=2)
    assert set(ranks(model)) == {8}
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2, momentum=0.9)
    gradients(model)
    optimizer.step()
    para_ext.compress_model(model, optimizer=wrap(optimizer), rank=2)
    assert set(optimizer.param_groups[0]["params"]) == set(optimizer.state) == set(trained(model).values())


def test_what_is_no_optimizer_of_the_adapter_is_refused_and_the_model_stays() -> None:
    model = randomize(llama())
    before = {name: p.clone() for name, p in trained(model).items()}
    stale = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in before.values()])
    for optimizer, message in (
        ("adam", r"a str is not a torch.optim.Optimizer: compress first"),
        (torch.optim.LBFGS(trained(model).values()), "LBFGS remembers all parameters as one vector"),
        (stale, "the AdamW has none of this adapter's parameters"),
    ):
        with pytest.raises(ParaError, match=message):
            para_ext.compress_model(model, optimizer=optimizer, rank=2)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Whether a KeyboardInterrupt at this line, counted from where `LiveAdapter.replace` begins, ended the call."""
    ours = [module.__file__ for module in (models, optimizers)]
    seen = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if event == "line" and seen:
            seen += 1
            if seen > at:
                raise KeyboardInterrupt
        if frame.f_code is models.LiveAdapter.replace.__code__ and not seen:
            seen = 1
        return trace if frame.f_code.co_filename in ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_leaves_model_and_optimizer_both_old_or_both_new() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    original = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    adam = torch.optim.Adam(list(trained(original).items()))
    original(torch.randn(3, 6)).sum().backward()
    adam.step()
    outcomes, at = [], 0
    while not outcomes or outcomes[-1] != "done":
        at += 1
        model, optimizer = copy.deepcopy((original, adam))
        done = not interrupted(lambda: para_ext.compress_model(model, optimizer=optimizer, rank=2), at)  # noqa: B023
        now = trained(model)
        (group,) = optimizer.param_groups
        assert dict(zip(group["param_names"], group["params"], strict=True)) == now
        assert set(optimizer.state) == set(now.values())
        assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
        (rank,) = {p.shape[0] for name, p in now.items() if "lora_A" in name}
        assert model.peft_config["default"].r == rank
        assert {layer.scaling["default"] for layer in lora_layers(model)} == {2.0 if rank == 4 else 1.0}
        outcomes.append("done" if done else "old" if rank == 4 else "new")
    assert outcomes == sorted(outcomes, key=["old", "new", "done"].index)
    assert outcomes.count("old") > 100


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
    return [layer.r["default"] for layer in lora_layers(model)]


def test_compressed_at_the_end_and_saved(tmp_path: Path) -> None:
    model = llama()
    callback = para_ext.ParaCallback(rank=2)
    trainer = trainer_of(model, tmp_path / "run", callback)
    trainer.train()
    trainer.save_model(tmp_path / "small")
    assert list(callback.reports) == ["end"]
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
    for steps in ({0: {"rank": 4}}, {"3": {"rank": 4}}, {True: {"rank": 4}}, {3: 0.5}):
        with pytest.raises(ParaError, match="give it like"):
            para_ext.ParaCallback(steps)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keeep": 0.5}, "'keeep' is no argument of compress_model"),
        ({"size": "1MiB"}, "'size' is no argument of compress_model"),
        ({"keep": 1.5}, r"keep=1\.5 is out of range"),
        ({"rank": 4, "keep": 0.5}, "keep and rank are given together"),
        ({"threshold": -1}, "threshold=-1 is out of range"),
        ({"min_rank": 4, "max_rank": 2}, "min_rank=4 is above 2"),
        ({"auto": "elbow"}, "auto='elbow' is unknown"),
        ({"auto": "dtype"}, "auto='dtype' needs to know the type"),
        ({"auto": "knee", "keep": 0.5}, "auto and keep are given together"),
    ],
)
def test_a_wrong_value_is_refused_at_once(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ParaError, match=message):
        para_ext.ParaCallback(**budget)
    with pytest.raises(ParaError, match=message):
        para_ext.ParaCallback({3: {"keep": 0.5}, 6: budget})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"adapter_name": "other"}, "there is no adapter 'other'"),
        ({"balance": "C"}, "balance is 'C'"),
        ({"dtype": "float12"}, "float12"),
        ({"backend": "tpu"}, "backend 'tpu' is unknown"),
        ({"threads": 0}, "threads=0 is out of range"),
        ({"multiple_of": 16}, "can take no rank from 1 to 8"),
        ({"keep": 0.1, "min_rank": 1}, r"keep=0\.1 is too small"),
        ({"keep": 0.1, "uniform": "all"}, r"keep=0\.1 is too small"),
        ({"params": 31}, "params=31 is too small"),
        ({"total_rank": 1, "multiple_of": 2}, "total_rank=1 is too small"),
        ({"rank": 2, "multiple_of": 4}, "rank=2 is too small"),
    ],
)
def test_what_does_not_fit_the_model_stops_before_training(
    budget: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for callback in (para_ext.ParaCallback(**budget), para_ext.ParaCallback({3: budget})):
        trainer = trainer_of(llama(), tmp_path, callback)
        with pytest.raises(ParaError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_options_of_later_budgets_are_tried_too(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path, para_ext.ParaCallback({3: {"rank": 4}}, keep=0.5, balance="C"))
    with pytest.raises(ParaError, match="balance is 'C'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_lora_stops_before_training(tmp_path: Path) -> None:
    trainer = trainer_of(llama().unload(), tmp_path, para_ext.ParaCallback(keep=0.5))
    with pytest.raises(ParaError, match="has no LoRA layers"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "budget",
    [
        {"threshold": 1e-9}, {"params": 10**9}, {"energy": 0.9}, {"sv_ratio": 10},
        {"layer_energy": 0.5}, {"energy": 0.2, "max_rank": 1}, {"dtype": "float16"}, {"auto": "knee"},
    ],
    ids=str,
)  # fmt: skip
def test_what_only_training_decides_does_not_stop_it(budget: dict[str, Any], tmp_path: Path) -> None:
    """A new adapter's ΔW is 0."""
    callback = para_ext.ParaCallback(**budget)
    trainer_of(llama(), tmp_path, callback, max_steps=2).train()
    assert list(callback.reports) == ["end"]


def test_which_module_comes_first_is_not_known_before_training() -> None:
    """One of 32 parameters would fit, the first one by name, of 40, doesn't."""
    check_compression(llama(), params=35)
    with pytest.raises(ParaError, match="params=35 is too small"):
        para_ext.compress_model(llama(), params=35)


def test_a_later_budget_may_fit_what_an_earlier_one_leaves(tmp_path: Path) -> None:
    """One component of each module is too much for it, as long as there are all of them."""
    callback = para_ext.ParaCallback({1: {"total_rank": 2}, 2: {"params": 100, "min_rank": 1}})
    trainer_of(llama(), tmp_path, callback, max_steps=2).train()
    assert callback.reports[2].plan.parameters_after <= 100


def test_a_step_after_the_last_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path, para_ext.ParaCallback({3: {"rank": 4}, 13: {"rank": 2}}))
    with pytest.raises(ParaError, match="step 13 is never reached, training ends at step 12"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loop_of_ones_own_need_not_tell_the_last_step(tmp_path: Path) -> None:
    model, callback = llama(), para_ext.ParaCallback({3: {"rank": 4}})
    args, state, control = trainer_of(model, tmp_path, callback).args, transformers.TrainerState(), None
    training = {"model": model, "optimizer": torch.optim.AdamW(trained(model).values())}
    callback.on_train_begin(args, state, control, **training)
    state.global_step = 3
    callback.on_step_end(args, state, control, **training)
    assert set(ranks(model)) == {4}


def test_the_last_step_and_the_end_are_two_compressions(tmp_path: Path) -> None:
    model = llama()
    callback = para_ext.ParaCallback({4: {"rank": 4}}, rank=2)
    trainer_of(model, tmp_path, callback, max_steps=4).train()
    assert {when: max(r.plan.ranks.values()) for when, r in callback.reports.items()} == {4: 4, "end": 2}
    assert set(ranks(model)) == {2}


def test_a_second_training_of_what_was_compressed_at_the_end_is_refused(tmp_path: Path) -> None:
    """The Trainer would go on with the optimizer of the old factors."""
    model = llama()
    callback = para_ext.ParaCallback(keep=0.5)
    trainer = trainer_of(model, tmp_path, callback, max_steps=2)
    trainer.train()
    before = ranks(model)
    with pytest.raises(ParaError, match=r"has none of this adapter.s parameters.*or the Trainer around it"):
        trainer.train()
    assert ranks(model) == before
    trainer_of(model, tmp_path, callback, max_steps=2).train()
    assert sum(ranks(model)) < sum(before)
