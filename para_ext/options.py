"""The options that commands share: what they are called, how help groups them, and how their text is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from .errors import ParaError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]

ADAPTER = click.Path()
"""A folder, a file, or an id on the Hub, and so a str; shells complete it as a path."""
TARGETS = ["peft", "vllm", "uniform", "gguf", "trtllm", "mlx", "diffusers", "kohya", "merged"]
_DTYPES = ["same", "fp32", "fp16", "bf16", "float32", "float16", "bfloat16"]


class Option(click.Option):
    """An option that help shows in a section of its own."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help shows options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections[getattr(parameter, "section", "Options")].append(record)
        for title, records in sorted(sections.items(), key=lambda section: section[0] == "Options"):
            with formatter.section(title):
                formatter.write_dl(records)


class Group(click.Group):
    """Commands whose help shows options by section."""

    command_class = Command


def together(*options: Decorator[Any]) -> Decorator[Any]:
    """Several options as one decorator, in this order."""

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_budget = partial(click.option, cls=Option, section="Budget: one at most")
_shaping = partial(click.option, cls=Option, section="Shape of the ranks")
_reader = partial(click.option, cls=Option, section="Reader")
_output = partial(click.option, cls=Option, section="Output")
_work = partial(click.option, cls=Option, section="Work")

plan_options = together(
    _budget("--energy", metavar="E", help="Smallest global selection that keeps this part of Σσ²: 0.95 or 95%."),
    _budget("--keep", metavar="F", multiple=True, help="Part of the LoRA parameters: 0.25 or 25%. May be repeated."),
    _budget("--params", metavar="N", type=int, help="Number of LoRA parameters."),
    _budget("--size", metavar="S", help="Bytes of the written file, all included: 32MiB, 500kB, 1000000."),
    _budget("--total-rank", metavar="K", type=int, help="Number of rank-1 components in all."),
    _budget("--threshold", metavar="T", type=float, help="Keep every singular value ≥ T."),
    _budget("--rank", metavar="R", type=int, help="Uniform truncation: every module keeps its own top R."),
    _budget(
        "--auto",
        type=click.Choice(["knee", "dtype"]),
        help="What follows from the adapter: the knee of its curve, or what storage rounding hides.",
    ),
    _budget(
        "--dynamic-method",
        type=click.Choice(["sv_ratio", "sv_cumulative", "sv_fro"]),
        help="kohya's rules, each module by itself: σ > σ₁/X; Σσ ≥ X of its Σσ; √Σσ² ≥ X of its √Σσ² (0.9: 81 % of "
        "the energy).",
    ),
    _budget("--dynamic-param", metavar="X", help="X of --dynamic-method."),
    _budget("--layer-energy", metavar="E", help="PEFT's rule: every module keeps the fewest with E of its own Σσ²."),
    _shaping(
        "--score",
        type=click.Choice(["auto", "sigma", "density"]),
        default="auto",
        help="Order by σ or by σ²/(m+n); auto: density for energy, keep, params and size.",
    ),
    _shaping("--min-rank", metavar="R", type=int, default=0, help="No module goes below this rank."),
    _shaping("--max-rank", metavar="R", type=int, help="No module goes above this rank."),
    _shaping("--multiple-of", metavar="Q", type=int, default=1, help="Ranks are multiples of Q."),
    _shaping("--allowed-ranks", metavar="R,R,…", help="Ranks are among these, or 0."),
    _shaping("--uniform", type=click.Choice(["all", "type"]), help="One rank for all modules, or per type."),
)
"""What `para_ext.plan.plan` takes."""

target = _reader("--target", type=click.Choice(TARGETS), required=True, help="Who will read OUT.")
targets = _reader(
    "--target",
    type=click.Choice(TARGETS),
    multiple=True,
    help="Who will read OUT; by default whoever reads ADAPTER's format. May be repeated.",
)
base = _reader(
    "--base",
    type=click.Path(),
    metavar="MODEL",
    help="The base model's folder or id, for gguf and merged; also tells uniform and mlx of layers that ADAPTER lacks.",
)
dtype = _output("--dtype", type=click.Choice(_DTYPES), default="same", help="Of the new factors.  [as they are]")
balance = _output(
    "--balance",
    type=click.Choice(["even", "A", "B"]),
    default="even",
    help="√σ on both factors, or all of σ on one, the other orthonormal.  [even]",
)
dry_run = _output("--dry-run", is_flag=True, help="Plan and report; write no adapter.")
report = _output(
    "--report", type=click.Path(dir_okay=False), metavar="FILE", help="Also write there what --json would print."
)
overwrite = _output("--overwrite", is_flag=True, help="Replace what para-ext wrote at OUT, if unchanged since.")
device = _work("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to work.  [auto]")
backend = _work(
    "--backend",
    type=click.Choice(["cpu", "cuda", "torch"]),
    help="Native core, CUDA kernels or plain PyTorch; by default the native one where the factors are.",
)
threads = _work(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to use; all CPUs, or OMP_NUM_THREADS, by default.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")

rewriting = together(
    plan_options, targets, base, dtype, dry_run, balance, report, overwrite, device, backend, threads, as_json
)
"""What `compress_adapter` and `merge_adapters` take, all but adapters and output."""


def part(text: str) -> float:
    """A part of a whole, 0.95 or 95%."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise click.BadParameter(f"'{text}' is not a part from 0 to 1: give one like 0.95 or 95%")
    return value


def weighted(adapters: tuple[str, ...]) -> dict[str | Path, float]:
    """What ADAPTER=WEIGHT … says, each adapter once."""
    weights: dict[str | Path, float] = {}
    for text in adapters:
        path, sign, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            sign = ""
        if not sign or not path:
            raise click.UsageError(f"'{text}' is not ADAPTER=WEIGHT: write it like style/=0.6")
        if path in weights:
            raise click.UsageError(f"'{path}' is given twice: add its weights up")
        weights[path] = value
    return weights


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """A command's options, as far as it has these, as arguments of ``compress_adapter``, ``plan`` and their like."""
    options = dict(options)
    method, parameter = options.pop("dynamic_method", None), options.pop("dynamic_param", None)
    if (method is None) != (parameter is None):
        raise click.UsageError("--dynamic-method and --dynamic-param go together: give both")
    if method is not None:
        options[method] = _number(parameter)
    for name, value in options.items():
        if isinstance(value, tuple):
            options[name] = list(value) if len(value) > 1 else value[0] if value else None
    if options.get("allowed_ranks") is not None:
        options["allowed_ranks"] = _ranks(options["allowed_ranks"])
    if options.get("dtype") == "same":
        options["dtype"] = None
    return options


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a percentage


def _ranks(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ParaError(f"allowed_ranks={text!r} is not a list of whole numbers: give one like 4,8,16") from None
