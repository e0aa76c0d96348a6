"""ParaCallback: compression inside transformers' Trainer, at the end of training or step by step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from .compress import compress_model
from .errors import ParaError, shown
from .plan import plan
from .report import Report

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_Base: Any
try:
    from transformers import TrainerCallback as _Base
except ImportError:  # so that `from para_ext import *` works without it
    _Base = None

_ARGUMENTS = {*signature(compress_model).parameters, *signature(plan).parameters} - {"model", "optimizer", "spectra"}
_LOGGER = logging.getLogger("para_ext")


class ParaCallback(_Base or object):  # type: ignore[misc]
    """Compress the model's adapter while or after it is trained.

    At the end, so that ``trainer.save_model()`` writes the small adapter::

        Trainer(..., callbacks=[ParaCallback(keep=0.25)])

    Or by steps, so that training repairs what was lost; Adam's moments are carried over (:mod:`para_ext.optimizer`)::

        ParaCallback({500: {"keep": 0.5}, 800: {"keep": 0.5}})

    A budget is what :func:`para_ext.compress_model` takes, and is of the adapter as it then is: above, a quarter of the
    parameters is left. Checkpoints are whole at any step: to go on from one, load it with
    ``PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`` and call ``trainer.train(checkpoint)``; what it
    has behind it is not repeated.

    Attributes:
        reports: step → Report of each compression.
    """

    def __init__(self, steps: Mapping[int, Mapping[str, Any]] | None = None, **budget: Any) -> None:
        """
        Args:
            steps: optimizer step, from 1 → budget, as keyword arguments.
            **budget: of a compression when training has ended; without any, and without ``steps``, it is
                ``energy=0.95``. ``adapter_name``, ``dtype``, ``backend`` and ``threads`` go along.

        Raises:
            ParaError: ``steps`` are not positive whole numbers with a budget each, or transformers is not installed.
        """
        if _Base is None:
            raise ParaError("ParaCallback needs transformers: pip install transformers accelerate")
        for step, chosen in (steps or {}).items():
            if not isinstance(step, int) or step < 1 or not isinstance(chosen, Mapping):
                raise ParaError(f"steps has {shown(step)}: {shown(chosen)}; give it like {{500: {{'keep': 0.5}}}}")
        for name in {*budget, *(name for chosen in (steps or {}).values() for name in chosen)} - _ARGUMENTS:
            raise ParaError(f"ParaCallback: '{name}' is no argument of compress_model; one is keep=0.5")
        self.steps = {step: dict(chosen) for step, chosen in (steps or {}).items()}
        self.budget = budget if budget or not self.steps else None
        self.reports: dict[int, Report] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what a schedule can't be followed in.

        Raises:
            ParaError: naming what and why.
        """
        if not self.steps:
            return
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compress where this step has a budget."""
        if state.global_step in self.steps:
            self._compress(state.global_step, kwargs["model"], self.steps[state.global_step], kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compress where there is a budget for the end; after the best model was loaded, if one was."""
        if self.budget is not None:
            self._compress(state.global_step, kwargs["model"], self.budget, None)

    def _compress(self, step: int, model: Any, budget: Mapping[str, Any], optimizer: Any) -> None:
        self.reports[step] = compress_model(model, optimizer=optimizer, **budget)
        _LOGGER.info("step %d: %s", step, self.reports[step].summary())
