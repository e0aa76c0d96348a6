"""The command line. Help and usage errors need neither numpy nor a tensor: commands import what they use."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from . import __version__
from .errors import ParaError
from .whole_file import check_new, write_text

Command = TypeVar("Command", bound=Callable[..., Any])


def part(text: str) -> float:
    """A part of a whole, 0.95 or 95%."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise click.BadParameter(f"'{text}' is not a part from 0 to 1: give one like 0.95 or 95%")
    return value


_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_THREADS = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads to use; all CPUs, or OMP_NUM_THREADS, by default."
)
_BACKEND = click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "torch"]),
    help="Native core, CUDA kernels or plain PyTorch; by default the native one where the factors are.",
)
TARGETS = ["peft", "vllm", "uniform", "gguf", "trtllm", "mlx", "diffusers", "kohya", "merged"]
_TARGETS = click.option(
    "--target",
    type=click.Choice(TARGETS),
    multiple=True,
    help="Who will read OUT; by default whoever reads ADAPTER's format. May be repeated.",
)
_BASE = click.option(
    "--base", type=click.Path(path_type=Path), metavar="MODEL", help="The base model's folder, for gguf and merged."
)
_BALANCE = click.option(
    "--balance",
    type=click.Choice(["even", "A", "B"]),
    default="even",
    help="√σ on both factors, or σ on one of them, the other orthonormal.  [even]",
)
_DTYPES = ["same", "fp32", "fp16", "bf16", "float32", "float16", "bfloat16"]


def _budget_options(command: Command) -> Command:
    """The options that `para_ext.plan.plan` takes, grouped as it documents them."""
    options = [
        click.option(
            "--energy",
            metavar="E",
            help="Smallest global selection that keeps this part of Σσ². 0.95 without any budget or shaping.",
        ),
        click.option(
            "--keep", metavar="F", multiple=True, help="Part of the LoRA parameters: 0.25 or 25%. May be repeated."
        ),
        click.option("--params", metavar="N", type=int, help="Number of LoRA parameters."),
        click.option("--size", metavar="S", help="Bytes of the written file, all included: 32MiB, 500kB, 1000000."),
        click.option("--total-rank", metavar="K", type=int, help="Number of rank-1 components in all."),
        click.option("--threshold", metavar="T", type=float, help="Keep every singular value ≥ T."),
        click.option("--rank", metavar="R", type=int, help="Uniform truncation: every module keeps its own top R."),
        click.option(
            "--auto",
            type=click.Choice(["knee", "dtype"]),
            help="A budget that follows from the adapter: the knee of its curve, or what storage rounding hides.",
        ),
        click.option(
            "--dynamic-method",
            type=click.Choice(["sv_ratio", "sv_cumulative", "sv_fro"]),
            help="kohya's rules, each module by itself: σ > σ₁/X; Σσ ≥ X of its Σσ; √Σσ² ≥ X of its √Σσ² (0.9: 81 % "
            "of the energy).",
        ),
        click.option("--dynamic-param", metavar="X", help="X of --dynamic-method."),
        click.option(
            "--layer-energy", metavar="E", help="PEFT's rule: every module keeps the fewest with E of its own Σσ²."
        ),
        click.option(
            "--score",
            type=click.Choice(["auto", "sigma", "density"]),
            default="auto",
            help="Order by σ or by σ²/(m+n); auto: density for energy, keep, params and size.",
        ),
        click.option("--min-rank", metavar="R", type=int, default=0, help="No module goes below this rank."),
        click.option("--max-rank", metavar="R", type=int, help="No module goes above this rank."),
        click.option("--multiple-of", metavar="Q", type=int, default=1, help="Ranks are multiples of Q."),
        click.option("--allowed-ranks", metavar="R,R,…", help="Ranks are among these, or 0."),
        click.option("--uniform", type=click.Choice(["all", "type"]), help="One rank for all modules, or per type."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="para-ext")
def cli() -> None:
    """Compress trained LoRA adapters after training, without data.

    \b
    Examples:
      para-ext inspect adapter/
      para-ext compress adapter/ small/                    keep 95 % of the energy
      para-ext compress adapter/ small/ --keep 25%         a quarter of the parameters
      para-ext verify adapter/ small/ --min-energy 0.9
    """


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw spectra and size-error curve (PNG)."
)
@click.option("--spectra", type=click.Path(path_type=Path, dir_okay=False), help="Save what `plan` needs (JSON).")
@_BACKEND
@_THREADS
@_JSON
def inspect(
    adapter: Path, plot: Path | None, spectra: Path | None, backend: str | None, threads: int | None, as_json: bool
) -> None:
    """How compressible is ADAPTER? Spectra, and what each budget would keep; nothing is written."""
    from . import inspection

    with _progress(as_json) as say:
        say("starting")
        from .compress import decompose

        say("decomposing")
        decomposition = decompose(adapter, backend=backend, threads=threads)
    if spectra is not None:
        decomposition.spectra.save(spectra)
    if plot is not None:
        from .plot import plot_spectra

        plot_spectra(decomposition.spectra, plot, title=adapter.name)
    summary = inspection.inspect(decomposition.spectra)
    if as_json:
        _print_json({"adapter": str(adapter), **summary.to_dict()})
    else:
        from .tables import inspection_tables

        inspection_tables(summary)


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_budget_options
@_TARGETS
@_BASE
@click.option("--dtype", type=click.Choice(_DTYPES), default="same", help="Of the new factors.  [same]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to work.  [auto]")
@click.option("--dry-run", is_flag=True, help="Plan and report; write no adapter.")
@_BALANCE
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter at OUT.")
@_BACKEND
@_THREADS
@_JSON
def compress(
    adapter: Path,
    out: Path,
    dtype: str,
    report: Path | None,
    as_json: bool,
    keep: tuple[str, ...],
    target: tuple[str, ...],
    allowed_ranks: str | None,
    **options: Any,
) -> None:
    """Compress ADAPTER, a folder or file, into the new folder or file OUT.

    At most one budget of --energy, --keep, --params, --size, --total-rank, --threshold, --rank, --auto,
    --dynamic-method, --layer-energy. Several --keep or --target values make OUT/keep-0.25, OUT/gguf … from one
    decomposition.
    """
    if report is not None:
        check_new(report, (adapter, out), "--report", overwrite=options["overwrite"])
    options = _familiar(options)
    with _progress(as_json) as say:
        say("starting")
        from .compress import compress_adapter

        result: Any = compress_adapter(
            adapter,
            out,
            keep=_one_or_all(keep),
            target=_one_or_all(target),
            allowed_ranks=_ranks(allowed_ranks),
            dtype=None if dtype == "same" else dtype,
            progress=say,
            **options,
        )
    _print_reports(result, as_json, report)


@cli.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER=WEIGHT…")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder or file.")
@_budget_options
@_TARGETS
@_BASE
@click.option("--dtype", type=click.Choice(_DTYPES), default="same", help="Of the new factors.  [the widest]")
@click.option("--dry-run", is_flag=True, help="Plan and report; write no adapter.")
@_BALANCE
@click.option("--overwrite", is_flag=True, help="Replace an adapter at OUT.")
@_BACKEND
@_THREADS
@_JSON
def merge(
    adapters: tuple[str, ...],
    out: Path,
    dtype: str,
    as_json: bool,
    keep: tuple[str, ...],
    target: tuple[str, ...],
    allowed_ranks: str | None,
    **options: Any,
) -> None:
    """Write a weighted sum of adapters as one, exact, or truncated where a budget is given.

    \b
    Example:
      para-ext merge style/=0.6 detail/=-0.4 -o both/ --keep 25%
    """
    options = _familiar(options)
    with _progress(as_json) as say:
        say("starting")
        from .compress import merge_adapters

        result = merge_adapters(
            _weights(adapters),
            out,
            keep=_one_or_all(keep),
            target=_one_or_all(target),
            allowed_ranks=_ranks(allowed_ranks),
            dtype=None if dtype == "same" else dtype,
            progress=say,
            **options,
        )
    _print_reports(result, as_json)


@cli.command()
@click.argument("spectra", type=click.Path(path_type=Path))
@_budget_options
@_JSON
def plan(spectra: Path, as_json: bool, keep: tuple[str, ...], allowed_ranks: str | None, **options: Any) -> None:
    """What `compress --dry-run` would say, from SPECTRA alone: a file that `inspect --spectra` wrote."""
    from .compress import predict
    from .spectra import Spectra

    options = {**_familiar(options), "allowed_ranks": _ranks(allowed_ranks)}
    loaded = Spectra.load(spectra)
    reports = [predict(loaded, str(spectra), **options, keep=k) for k in keep or (None,)]
    _print_reports(reports if len(keep) > 1 else reports[0], as_json)


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("compressed", type=click.Path(path_type=Path), nargs=-1, metavar="[COMPRESSED]…")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The new file, of HTML."
)
@click.option("--title", help="Of the page.  [ADAPTER's name]")
@click.option("--overwrite", is_flag=True, help="Replace the file at OUT.")
@_BACKEND
@_THREADS
@_JSON
def report(out: Path, as_json: bool, **options: Any) -> None:
    """One HTML page, for any browser, offline: spectra, ranks, size and error at any budget, and certificates.

    ADAPTER may also be a file (.json) that `inspect --spectra` wrote. COMPRESSED are adapters made of it; one without a
    para_ext.json of its own is measured.
    """
    with _progress(as_json) as say:
        say("starting")
        from .page import write_page

        write_page(out, progress=say, **options)
    if as_json:
        _print_json({"output": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, for any browser")


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), required=True, help="Who will read OUT.")
@_BASE
@click.option("--dtype", type=click.Choice(_DTYPES), default="same", help="Of the new factors.  [same]")
@click.option("--overwrite", is_flag=True, help="Replace an adapter at OUT.")
@_THREADS
@_JSON
def convert(adapter: Path, out: Path, dtype: str, as_json: bool, **options: Any) -> None:
    """Write ADAPTER for another reader, without truncation."""
    with _progress(as_json) as say:
        say("starting")
        from .compress import convert_adapter

        report = convert_adapter(adapter, out, dtype=None if dtype == "same" else dtype, progress=say, **options)
    _print_reports(report, as_json)


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("compressed", type=click.Path(path_type=Path))
@click.option(
    "--max-error", type=part, metavar="E", help="Exit 1 if ‖ΔW − ΔW'‖_F / ‖ΔW‖_F may exceed this: 0.1 or 10%."
)
@click.option(
    "--min-energy", type=part, metavar="E", help="Exit 1 if less than this part of the energy may be kept: 0.95 or 95%."
)
@_THREADS
@_JSON
def verify(
    adapter: Path,
    compressed: Path,
    max_error: float | None,
    min_energy: float | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how far COMPRESSED is from ADAPTER, on both files as they are: the factors, not heads or biases."""
    with _progress(as_json) as say:
        say("importing PyTorch")
        from .compress import verify as measure

        say("measuring")
        result = measure(adapter, compressed, threads=threads)
    if as_json:
        _print_json({"adapter": str(adapter), "compressed": str(compressed), **result.to_dict()})
    else:
        from .tables import verification_table

        verification_table(result)
    if max_error is not None and not result.relative_error <= max_error:
        raise ParaError(
            f"'{compressed}': the relative error is up to {result.relative_error:.6g}, more than --max-error "
            f"{max_error:g}; compress with a larger budget"
        )
    if min_energy is not None and not result.energy >= min_energy:
        raise ParaError(
            f"'{compressed}': the energy kept is {result.energy:.6g}, less than --min-energy {min_energy:g}; "
            "compress with a larger budget"
        )


@cli.command()
@_JSON
def info(as_json: bool) -> None:
    """Backends, ISA level, threads, and why CUDA is or is not available."""
    from .installation import installation

    facts = installation()
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name:<16}{text}")


def main() -> None:
    """Entry point: a refusal is one line on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not turn a result into a traceback
    gc.disable()  # a short life, many objects: each search for cycles among all of PyTorch takes a tenth of a second
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        _fail("interrupted; nothing was left half-written", 130)
    except click.UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (ParaError, click.ClickException) as error:
        _fail(str(error), 1)
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path and the permissions", 1)
    except MemoryError:
        _fail("not enough memory; free some, or use a machine with more", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"para-ext: {message}", err=True)
    sys.exit(code)


def _one_or_all(values: tuple[str, ...]) -> Any:
    """A list of several values, one alone, or None."""
    return list(values) if len(values) > 1 else values[0] if values else None


def _weights(adapters: tuple[str, ...]) -> dict[str | Path, float]:
    weights: dict[str | Path, float] = {}
    for text in adapters:
        path, sign, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            sign = ""
        if not sign or not path:
            raise click.UsageError(f"'{text}' is not ADAPTER=WEIGHT: write it like style/=0.6")
        if Path(path) in weights:
            raise click.UsageError(f"'{path}' is given twice: add its weights up")
        weights[Path(path)] = value
    return weights


def _print_reports(result: Any, as_json: bool, file: Path | None = None) -> None:
    """One report or a list of them: as tables or JSON, and into a file."""
    document = [r.to_dict() for r in result] if isinstance(result, list) else result.to_dict()
    if file is not None:
        write_text(file, json.dumps(document, indent=1) + "\n")
    if as_json:
        _print_json(document)
        return
    from .tables import report_table

    for r in result if isinstance(result, list) else [result]:
        report_table(r)


def _familiar(options: dict[str, Any]) -> dict[str, Any]:
    """The options with --dynamic-method and --dynamic-param as the budget that they name."""
    method, parameter = options.pop("dynamic_method"), options.pop("dynamic_param")
    if (method is None) != (parameter is None):
        raise click.UsageError("--dynamic-method and --dynamic-param go together: give both")
    return options if method is None else {**options, method: _number(parameter)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # a percentage


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ParaError(f"--allowed-ranks '{text}' is not a list of whole numbers; write it like 4,8,16") from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say on a terminal what is being done; nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("starting") as status:
        yield lambda words: status.update(Text(f"{words} …"))


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
