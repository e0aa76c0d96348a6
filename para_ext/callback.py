"""ParaCallback: compression inside transformers' Trainer, at the end of training or step by step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from typing import TYPE_CHECKING, Any

from .compress import check_compression, compress_model
from .errors import ParaError, shown
from .plan import Infeasible, plan
from .report import Report
from .rewriting import planned
from .spectra import Spectra

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_Base: Any
try:
    from transformers import TrainerCallback as _Base
except ImportError:  # so that `from para_ext import *` works without it
    _Base = None

_PLANS = {*signature(plan).parameters, "auto"} - {"spectra", "size"}
_ARGUMENTS = {*signature(compress_model).parameters, *_PLANS} - {"model", "optimizer", "budget"}
_LOGGER = logging.getLogger("para_ext")


class ParaCallback(_Base or object):  # type: ignore[misc]
    """Compress the model's adapter while or after it is trained.

    At the end, so that ``trainer.save_model()`` writes the small adapter::

        Trainer(..., callbacks=[ParaCallback(keep=0.25)])

    Or by steps, so that training repairs what was lost; Adam's moments are carried over (:mod:`para_ext.optimizer`)::

        ParaCallback({500: {"keep": 0.5}, 800: {"keep": 0.5}})

    A budget is what :func:`para_ext.compress_model` takes, and is of the adapter as it then is: above, a quarter of the
    parameters is left. Whatever training doesn't decide is refused before its first step. Checkpoints are whole at any
    step: to go on from one, load it with ``PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`` and call
    ``trainer.train(checkpoint)``; what it has behind it is not repeated.

    After a compression at the end the Trainer still has the optimizer of the old factors, so that its ``train()`` is
    refused: to train on, give the model to a new one. Steps are counted anew by every ``train()`` without a checkpoint.

    Attributes:
        reports: step → Report of each compression; "end" → that of the one at the end.
    """

    def __init__(self, steps: Mapping[int, Mapping[str, Any]] | None = None, **budget: Any) -> None:
        """
        Args:
            steps: optimizer step, from 1 → budget, as keyword arguments.
            **budget: of a compression when training has ended; without any, and without ``steps``, it is
                ``energy=0.95``. ``adapter_name``, ``dtype``, ``balance``, ``backend`` and ``threads`` go along.

        Raises:
            ParaError: ``steps`` are not positive whole numbers with a budget each, a budget is refused for any adapter,
                or transformers is not installed.
        """
        if _Base is None:
            raise ParaError("ParaCallback needs transformers: pip install transformers accelerate")
        for step, chosen in (steps or {}).items():
            if type(step) is not int or step < 1 or not isinstance(chosen, Mapping):
                raise ParaError(f"steps has {shown(step)}: {shown(chosen)}; give it like {{500: {{'keep': 0.5}}}}")
        for chosen in (budget, *(steps or {}).values()):
            for name in chosen.keys() - _ARGUMENTS:
                raise ParaError(f"ParaCallback: '{name}' is no argument of compress_model; one is keep=0.5")
            # Without modules every budget is met: what is refused are the values.
            with suppress(Infeasible):
                planned({name: value for name, value in chosen.items() if name in _PLANS}, Spectra(()))
        self.steps = {step: dict(chosen) for step, chosen in sorted((steps or {}).items())}
        self.budget = budget if budget or not self.steps else None
        self.reports: dict[int | str, Report] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what can't be followed in, before time is spent on training.

        Raises:
            ParaError: naming what and why.
        """
        if self.steps:
            self._check_schedule(args, state)
        due = [(self.steps[step], kwargs["optimizer"]) for step in self.steps if step > state.global_step]
        if self.budget is not None:
            due.append((self.budget, kwargs["optimizer"] if "end" in self.reports else None))
        for i, (chosen, optimizer) in enumerate(due):
            # After the first one ranks are others, so that their options can be tried now, but not their plans.
            tried = chosen if i == 0 else {name: value for name, value in chosen.items() if name not in _PLANS}
            check_compression(kwargs["model"], optimizer=optimizer, **tried)

    def _check_schedule(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise ParaError(
                "ParaCallback: ranks can't fall while several processes, DeepSpeed or FSDP hold the parameters; "
                "compress at the end, ParaCallback(keep=…)"
            )
        if args.load_best_model_at_end:
            raise ParaError(
                "ParaCallback: load_best_model_at_end would load a checkpoint of other ranks into this model; leave it "
                "out, or compress at the end, ParaCallback(keep=…)"
            )
        if 0 < state.max_steps < (last := max(self.steps)):  # 0 in loops that don't tell
            raise ParaError(
                f"ParaCallback: step {last} is never reached, training ends at step {state.max_steps}; give an earlier "
                "one, or compress at the end, ParaCallback(keep=…)"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compress where this step has a budget."""
        if state.global_step in self.steps:
            self._compress(state.global_step, kwargs["model"], self.steps[state.global_step], kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compress where there is a budget for the end; after the best model was loaded, if one was."""
        if self.budget is not None:
            self._compress("end", kwargs["model"], self.budget, None)

    def _compress(self, when: int | str, model: Any, budget: Mapping[str, Any], optimizer: Any) -> None:
        self.reports[when] = compress_model(model, optimizer=optimizer, **budget)
        _LOGGER.info("%s: %s", when if when == "end" else f"step {when}", self.reports[when].summary())
