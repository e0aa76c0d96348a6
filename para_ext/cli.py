"""The command line. Help and usage errors need neither numpy nor a tensor: commands import what they use."""

from __future__ import annotations

import gc
import io
import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from . import SCHEMA, __version__, options
from .errors import ParaError, printable
from .options import ADAPTER, arguments
from .progress import bars, waiting
from .whole_file import check_new, write_text


@click.group(cls=options.Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="para-ext")
def cli() -> None:
    """Compress trained LoRA adapters after training, without data.

    ADAPTER is a folder, a file, or an id on the Hugging Face Hub: user/adapter, user/adapter@revision.

    \b
    Examples:
      para-ext inspect adapter/
      para-ext compress adapter/ small/               keep 95 % of the energy
      para-ext compress adapter/ small/ --keep 25%    a quarter of the parameters
      para-ext verify adapter/ small/ --min-energy 0.9

    Exit codes: 0 done, 1 refused or a bound violated, 2 wrong usage, 130 and 143 interrupted.
    """


@cli.command()
@click.argument("adapter", type=ADAPTER)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw spectra, size and error, and ranks (.png, .svg or .pdf).",
)
@click.option("--spectra", type=click.Path(dir_okay=False), metavar="FILE", help="Save what `plan` needs (JSON).")
@options.backend
@options.threads
@options.as_json
def inspect(
    adapter: str, plot: str | None, spectra: str | None, backend: str | None, threads: int | None, as_json: bool
) -> None:
    """Show how compressible ADAPTER is, and what budgets would keep.

    \b
    Examples:
      para-ext inspect adapter/
      para-ext inspect user/adapter --spectra spectra.json --plot spectra.png
    """
    wanted = {"spectra=": spectra, "plot=": plot}
    for name, file in wanted.items():
        if file is not None:
            check_new(Path(file), [Path(adapter)], name, overwrite=True)
    with waiting("starting"):
        from . import inspection
        from .compress import decompose
    with bars() as progress:
        decomposition = decompose(adapter, backend=backend, threads=threads, progress=progress)
    if spectra is not None:
        decomposition.spectra.save(spectra)
    if plot is not None:
        from .plot import plot_spectra

        plot_spectra(decomposition.spectra, Path(plot), title=Path(adapter).name)
    summary = inspection.inspect(decomposition.spectra)
    if as_json:
        _print_json(_document(source=adapter, **summary.to_dict()))
    else:
        from .tables import inspection_tables

        inspection_tables(summary)
        _say_written(*wanted.values())


@cli.command()
@click.argument("adapter", type=ADAPTER)
@click.argument("out", type=click.Path())
@options.rewriting
def compress(adapter: str, out: str, report: str | None, as_json: bool, **given: Any) -> None:
    """Compress ADAPTER into the new folder or file OUT.

    Without a budget 95 % of the energy, Σσ², is kept; where only a shape of the ranks is given, all that it allows.
    Several --keep or --target values make OUT/keep-0.25, OUT/gguf … from one decomposition.

    \b
    Examples:
      para-ext compress adapter/ small/ --keep 25%
      para-ext compress style.safetensors small.safetensors --size 32MiB
      para-ext compress user/adapter@v1 small/ --energy 0.9 --target vllm
      para-ext compress adapter/ ladder/ --keep 50% --keep 25% --dry-run
    """
    _check_report(report, [adapter, out], given)
    with waiting("starting"):
        from .compress import compress_adapter
    with bars() as progress:
        result: Any = compress_adapter(adapter, out, progress=progress, **arguments(given))
    _print_reports(result, as_json, report)


@cli.command()
@click.argument("adapters", nargs=-1, required=True, type=ADAPTER, metavar="ADAPTER=WEIGHT…")
@click.option("-o", "--out", type=click.Path(), required=True, help="The new folder or file.")
@options.rewriting
def merge(adapters: tuple[str, ...], out: str, report: str | None, as_json: bool, **given: Any) -> None:
    """Write a weighted sum of adapters as one.

    It is exact, and truncated only where a budget or a shape of the ranks is given.

    \b
    Examples:
      para-ext merge style/=0.6 detail/=-0.4 -o both/
      para-ext merge style/=0.6 user/detail=-0.4 -o both/ --keep 25%
    """
    weights = options.weighted(adapters)
    _check_report(report, [*weights, out], given)
    with waiting("starting"):
        from .compress import merge_adapters
    with bars() as progress:
        result = merge_adapters(weights, out, progress=progress, **arguments(given))
    _print_reports(result, as_json, report)


@cli.command()
@click.argument("spectra", type=click.Path())
@options.plan_options
@options.as_json
def plan(spectra: str, as_json: bool, keep: tuple[str, ...], **given: Any) -> None:
    """Say what `compress --dry-run` would, from SPECTRA alone.

    SPECTRA is a file that `inspect --spectra` wrote.

    \b
    Examples:
      para-ext plan spectra.json --keep 10%
      para-ext plan spectra.json --energy 0.9 --max-rank 16
    """
    from .compress import predict
    from .spectra import Spectra

    loaded = Spectra.load(spectra)
    reports = [predict(loaded, spectra, **arguments(given), keep=k) for k in keep or (None,)]
    _print_reports(reports if len(keep) > 1 else reports[0], as_json)


@cli.command()
@click.argument("adapter", type=ADAPTER)
@click.argument("compressed", type=ADAPTER, nargs=-1, metavar="[COMPRESSED]…")
@click.option("-o", "--out", type=click.Path(dir_okay=False), required=True, help="The new file, of HTML.")
@click.option("--title", help="Of the page.  [ADAPTER's name]")
@click.option("--overwrite", is_flag=True, help="Replace the file at OUT.")
@options.backend
@options.threads
@options.as_json
def report(out: str, as_json: bool, **given: Any) -> None:
    """Write one HTML page on ADAPTER and what was made of it.

    It shows spectra, ranks, size and error at any budget, and certificates, in any browser, offline.

    ADAPTER may also be a file (.json) that `inspect --spectra` wrote. COMPRESSED are adapters made of it; one without a
    para_ext.json of its own is measured.

    \b
    Examples:
      para-ext report adapter/ small/ -o report.html
      para-ext report spectra.json -o report.html --title "My adapter"
    """
    with waiting("starting"):
        from .page import write_page
    with bars() as progress:
        write_page(out, progress=progress, **given)
    size = Path(out).stat().st_size
    if as_json:
        _print_json(_document(output=out, bytes=size))
    else:
        click.echo(f"{out}: {size / 1e6:.1f} MB, for any browser")


@cli.command()
@click.argument("adapter", type=ADAPTER)
@click.argument("out", type=click.Path())
@options.target
@options.base
@options.dtype
@options.report
@options.overwrite
@options.threads
@options.as_json
def convert(adapter: str, out: str, report: str | None, as_json: bool, **given: Any) -> None:
    """Write ADAPTER for another reader, without truncation.

    \b
    Examples:
      para-ext convert style.safetensors style-diffusers/ --target diffusers
      para-ext convert adapter/ adapter.gguf --target gguf --base Llama-3-8B/
    """
    _check_report(report, [adapter, out], given)
    with waiting("starting"):
        from .compress import convert_adapter
    with bars() as progress:
        result = convert_adapter(adapter, out, progress=progress, **arguments(given))
    _print_reports(result, as_json, report)


@cli.command()
@click.argument("adapter", type=ADAPTER)
@click.argument("compressed", type=ADAPTER)
@click.option(
    "--max-error", type=options.part, metavar="E", help="Exit 1 if ‖ΔW − ΔW'‖_F / ‖ΔW‖_F may exceed this: 0.1 or 10%."
)
@click.option(
    "--min-energy",
    type=options.part,
    metavar="E",
    help="Exit 1 if less than this part of the energy may be kept: 0.95 or 95%.",
)
@options.threads
@options.as_json
def verify(
    adapter: str,
    compressed: str,
    max_error: float | None,
    min_energy: float | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how far COMPRESSED is from ADAPTER.

    Measured are the factors as they stand in both files, not heads or biases.

    \b
    Examples:
      para-ext verify adapter/ small/
      para-ext verify user/adapter small/ --min-energy 95%
    """
    with waiting("importing PyTorch"):
        from .compress import verify as measure
    with bars() as progress:
        result = measure(adapter, compressed, threads=threads, progress=progress)
    if as_json:
        _print_json(_document(source=adapter, compressed=compressed, **result.to_dict()))
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
@options.as_json
def info(as_json: bool) -> None:
    """Say what works here: backends, threads, and CUDA or why not.

    \b
    Example:
      para-ext info --json
    """
    with waiting("importing PyTorch"):
        from .installation import installation

        facts = installation()
    if as_json:
        _print_json(_document(**facts))
        return
    for name, value in {"para_ext": __version__, **facts}.items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name.replace('_', ' ') if name in facts else name:<16}{text}")


def main() -> None:
    """Entry point: a refusal is one line on stderr and exit code 1, an interrupt one line and 128 + the signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not turn a result into a traceback
    gc.disable()  # a short life, many objects: each search for cycles among all of PyTorch takes a tenth of a second
    try:
        with _stoppable():
            cli(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except _Stopped as stopped:
        _fail("interrupted; nothing was left half-written", 128 + stopped.signal)
    except click.UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (ParaError, click.ClickException) as error:
        _fail(_with_options(str(error)), 1)
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path and the permissions", 1)
    except MemoryError:
        _fail("not enough memory; free some, or use a machine with more", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"para-ext: {printable(message)}", err=True)
    sys.exit(code)


class _Stopped(BaseException):
    """SIGINT or SIGTERM came; not a KeyboardInterrupt, of which click makes a line of its own."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise _Stopped on SIGINT and SIGTERM, once: what cleans up then is not interrupted. Ignored ones stay so."""

    def stop(number: int, frame: FrameType | None) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise _Stopped(number)

    before = {n: h for n in (signal.SIGINT, signal.SIGTERM) if (h := signal.getsignal(n)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_options(message: str) -> str:
    """A message of the library with options where it names arguments: keep=0.25 is --keep 0.25, dtype= is --dtype."""
    names = {str(p.name) for command in cli.commands.values() for p in command.params if isinstance(p, click.Option)}
    value = r"True\b|'[^']*'|\[[^\]]*\]|[^\s,;:)]+"
    argument = rf"(?<![\w'/.-])({'|'.join(sorted(names))})=({value})?"  # not within quotes: that is a path or a name

    def option(found: re.Match[str]) -> str:
        value = (found[2] or "").strip("'[]").replace(", ", ",")
        return f"--{found[1].replace('_', '-')}" + (f" {value}" if value not in ("", "True") else "")

    return re.sub(argument, option, message)


def _check_report(report: str | None, adapters: Iterable[str | Path], given: dict[str, Any]) -> None:
    if report is not None:
        check_new(Path(report), map(Path, adapters), "report=", overwrite=given["overwrite"])


def _print_reports(result: Any, as_json: bool, file: str | None = None) -> None:
    """One report or a list of them: as tables or JSON, and into a file."""
    document = [r.to_dict() for r in result] if isinstance(result, list) else result.to_dict()
    if file is not None:
        write_text(Path(file), json.dumps(document, indent=1) + "\n")
    if as_json:
        _print_json(document)
        return
    from .tables import report_table

    for i, r in enumerate(result if isinstance(result, list) else [result]):
        if i:
            click.echo()
        report_table(replace(r, notes=tuple(map(_with_options, r.notes))))
    _say_written(file)


def _say_written(*files: str | None) -> None:
    for file in filter(None, files):
        click.echo(f"Written: {file}")


def _document(**fields: Any) -> dict[str, Any]:
    """A JSON document, as docs/json.md describes it."""
    return {"schema": SCHEMA, "version": __version__, **fields}


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
