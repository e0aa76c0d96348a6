"""The one way to compile sources against the emulator: plain, or with a sanitizer; a program, or a Python module.

Objects and what is linked of them stay under build/emulator, named by the content of all they could be made of.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"

FLAGS = (
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",  # shared memory holds now one type and now another, which nvcc lets pass
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # nvcc knows `#pragma unroll`
    "-DPARA_EMULATED",
    f"-I{CSRC}",
    f"-I{HERE}",
)
# What a mode adds for kernels and tests, and for the scheduler, which speaks to the sanitizers itself.
MODES = {
    "plain": (("-O2",), ("-O2",)),
    "address": (
        ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-O2", "-DPARA_EMULATOR_ADDRESS"),
    ),
    "thread": (("-O1", "-fsanitize=thread"), ("-O2", "-DPARA_EMULATOR_THREAD")),
}


class BuildError(Exception):
    """What the compiler says."""


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """$CXX, or the first compiler that is there, as the start of a command."""
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["c++", "g++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if shutil.which(command[0]):
            return command
    return None


def program(
    name: str, sources: Sequence[Path], mode: str = "plain", defines: Sequence[str] = (), flags: Sequence[str] = ()
) -> Path:
    """An executable of the sources and the emulator; ``defines`` such as ``"PARA_BUG_NO_SYNC"``."""
    objects = _objects(sources, mode, (*flags, *(f"-D{define}" for define in defines)))
    return _linked(objects, name, (*MODES[mode][0], "-rdynamic"))


def module(name: str, sources: Sequence[Path], defines: Sequence[str] = ()) -> Path:
    """A shared library with the Python module ``name`` of the sources and with ``emulation`` (emulation.cpp), plain."""
    import pybind11

    flags = (
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
        "-Wno-attributes",  # pybind11 is hidden, and what has it in it would have to be; but kernels must be visible
        *(f"-D{define}" for define in defines),
    )
    objects = _objects((*sources, HERE / "emulation.cpp"), "plain", flags)
    shared = ("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared", "-Wl,-Bsymbolic")
    return _linked(objects, f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", shared)


def load(path: Path, name: str) -> ModuleType:
    """The Python module ``name`` of a library that ``module`` made."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run(path: Path, mode: str, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs a program; stdout and stderr together. The first finding of a sanitizer ends it."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    }
    return subprocess.run(
        [*(_fixed_addresses() if mode == "thread" else ()), str(path), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """Older versions of TSan do not run where kernels place programs too randomly."""
    command = ("setarch", "-R")
    works = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else ()


def _objects(sources: Sequence[Path], mode: str, flags: Sequence[str]) -> list[Path]:
    code, scheduler = MODES[mode]
    return [_compiled(HERE / "scheduler.cpp", scheduler)] + [_compiled(source, (*code, *flags)) for source in sources]


def _compiled(source: Path, flags: Sequence[str]) -> Path:
    werror = ("-Werror",) if os.environ.get("PARA_EXT_WERROR") == "ON" else ()
    command = (*_command(), *FLAGS, *flags, *werror, "-c", "-x", "c++", str(source.resolve()))
    return _made(command, source.read_bytes() + _headers(), f"{source.stem}.o")


def _linked(objects: Sequence[Path], name: str, flags: Sequence[str]) -> Path:
    return _made((*_command(), *flags, *map(str, objects), "-ldl"), b"", name)


def _made(command: Sequence[str], content: bytes, name: str) -> Path:
    """What the command writes, made only if it isn't there; whole or absent, whoever else makes it at the same time."""
    key = hashlib.sha256("\0".join((*command, _version())).encode() + content).hexdigest()[:16]
    path = BUILD / key / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{os.getpid()}-{name}")
        done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
        temporary.replace(path)
    return path


def _command() -> tuple[str, ...]:
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found")
    return command


@functools.cache
def _version() -> str:
    return subprocess.run([*_command(), "--version"], capture_output=True, text=True, check=True).stdout


def _headers() -> bytes:
    """Of all that a source could include."""
    digest = hashlib.sha256()
    for folder in (CSRC, CSRC / "cuda", HERE):
        for path in sorted(folder.glob("*.*h")) + sorted(folder.glob("*.cu")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()
