"""Signals and progress, on real processes, most with an adapter of 134 MB: nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adapters import write_adapter
from safetensors.numpy import save_file

import para_ext
from para_ext.formats import read_adapter

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and terminals as POSIX has them")

MODULES, RANK, WIDTH = 64, 128, 4096


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second or so of every stage, on one thread."""
    folder = tmp_path_factory.mktemp("big") / "adapter"
    folder.mkdir()
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((WIDTH, RANK), np.float32), rng.standard_normal((RANK, WIDTH), np.float32)
    pairs = {
        f"base_model.model.layers.{i}.up.lora_{side}.weight": (x * (1 + i)).astype(np.float16)
        for i in range(MODULES)
        for side, x in (("A", A), ("B", B))
    }
    save_file(pairs, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class OnTerminal:
    """The command line in a process whose stderr is a terminal."""

    def __init__(self, *arguments: object) -> None:
        import pty

        ours, theirs = pty.openpty()
        # A job in the background of a script ignores SIGINT, and its children do.
        start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        start += "from para_ext import cli, decomposition\n"
        start += "decomposition._FIRST_STEP = 1 << 24; cli.main()"  # several steps, as of an adapter of gigabytes
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        self.terminal, self.shown = ours, ""

    def _read(self) -> bool:
        try:
            text = os.read(self.terminal, 1 << 16)
        except OSError:  # the other end is closed
            text = b""
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode(errors="replace")).replace("\r", "\n")
        return bool(text)

    def wait_for(self, words: str) -> None:
        while words not in self.shown:
            assert self._read(), f"'{words}' never came: {self.shown}"

    def wait_until(self, there: Callable[[], bool]) -> None:
        while not there():
            assert self.process.poll() is None, self.shown
            time.sleep(0.001)

    def ended(self) -> int:
        while self._read():
            pass
        os.close(self.terminal)
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait()


@pytest.fixture
def compressing(big: Path, tmp_path: Path) -> Iterator[OnTerminal]:
    started = OnTerminal("compress", big, tmp_path / "deep" / "small", "--keep", "0.9", "--threads", "1")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGTERM, "decomposing 64 modules")]
    + [(signal.SIGINT, words) for words in ("starting", "decomposing 64 modules", "truncating for", "writing")],
    ids=str,
)
def test_a_signal_leaves_nothing_behind(compressing: OnTerminal, tmp_path: Path, words: str, number: int) -> None:
    compressing.wait_for(words)
    compressing.process.send_signal(number)
    sent = time.perf_counter()
    assert compressing.ended() == 128 + number
    assert time.perf_counter() - sent < 10  # a step of half a second, on a busy machine
    assert compressing.shown.rstrip().endswith("para-ext: interrupted; nothing was left half-written")
    assert "Traceback" not in compressing.shown
    left = list(tmp_path.rglob("*"))
    if (
        words == "writing" and tmp_path / "deep" / "small" in left
    ):  # a terminal shows what was so a tenth of a second ago
        assert read_adapter(tmp_path / "deep" / "small").slots
        left = [path for path in left if not path.is_relative_to(tmp_path / "deep" / "small")][1:]
    assert left == []  # not even the folder that was made for the output


def compress_after(tmp_path: Path, lines: str) -> subprocess.CompletedProcess[str]:
    """In a process that runs these lines first; a signal comes when what was written is flushed."""
    adapter = write_adapter(tmp_path / "adapter")
    code = (
        f"import os, shutil, signal, sys\n{lines}"
        "from para_ext import cli\n"
        "from para_ext.formats import output\n"
        "output._flush = lambda folder: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.argv = ['para-ext', 'compress', {str(adapter)!r}, {str(tmp_path / 'small')!r}]\n"
        "cli.main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_second_one_does_not_disturb_the_cleaning_up(tmp_path: Path) -> None:
    """It comes while what was written is removed."""
    done = compress_after(
        tmp_path,
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
        "def again(*arguments, remove=shutil.rmtree, **more):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    remove(*arguments, **more)\n"
        "shutil.rmtree = again\n",
    )
    assert done.returncode == 130
    assert done.stderr == "para-ext: interrupted; nothing was left half-written\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_it_comes_while_bytes_are_written(compressing: OnTerminal, tmp_path: Path) -> None:
    def half_written() -> bool:
        return any(path.stat().st_size > 1 << 20 for path in tmp_path.glob("deep/.small.*.new/*"))

    compressing.wait_until(half_written)
    compressing.process.send_signal(signal.SIGINT)
    assert compressing.ended() == 130
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_measuring(big: Path) -> None:
    """The pool's modules that have not begun don't begin."""
    measuring = OnTerminal("verify", big, big, "--threads", "1")
    measuring.wait_for("measuring 64 modules")
    measuring.process.send_signal(signal.SIGINT)
    assert measuring.ended() == 130
    assert "interrupted" in measuring.shown


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As that of a job in the background."""
    done = compress_after(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_shows_bytes_and_the_time_left(compressing: OnTerminal) -> None:
    assert compressing.ended() == 0
    for words in ("starting …", "decomposing 64 modules ", "truncating for ", "writing "):
        assert words in compressing.shown
    done = [(float(a), float(b)) for a, b in re.findall(r"decomposing .* ([\d.]+)/([\d.]+) MB", compressing.shown)]
    assert {total for _, total in done} == {134.2}
    assert done == sorted(done) and done[0][0] == 0 and done[-1][0] == 134.2
    assert re.search(r"decomposing .* MB \d:\d\d:\d\d", compressing.shown)


def test_progress_counts_every_byte_of_all_outputs(tmp_path: Path) -> None:
    """What the stages tell: from none to all, in order, whatever the number of outputs and targets."""
    adapter = write_adapter(tmp_path / "adapter")
    told: list[tuple[str, int, int]] = []
    reports = para_ext.compress_adapter(
        adapter, tmp_path / "out", keep=[0.5, 0.25], target=["peft"], progress=lambda *x: told.append(x)
    )
    factors = sum(f.bytes for f in para_ext.decompose(adapter).factors)
    written = sum(r.bytes_after or 0 for r in reports)
    assert {total for words, _, total in told if words == "decomposing 9 modules"} == {factors}
    assert told[-1] == (f"writing {reports[1].output}", 2 * factors + written, 2 * factors + written)
    starts = [i for i, (_, done, _) in enumerate(told) if done == 0]
    for start, end in zip(starts, [*starts[1:], len(told)], strict=True):
        assert [done for _, done, _ in told[start:end]] == sorted(done for _, done, _ in told[start:end])
    told.clear()
    para_ext.verify(adapter, tmp_path / "out" / "peft" / "keep-0.5", progress=lambda *x: told.append(x))
    assert told[0] == ("measuring 9 modules", 0, factors)
    assert told[-1] == ("measuring 9 modules", factors, factors)
    told.clear()
    para_ext.compress_adapter(adapter, tmp_path / "dry", dry_run=True, progress=lambda *x: told.append(x))
    assert [words for words, _, _ in told] == ["decomposing 9 modules"] * len(told)


def test_an_exception_of_the_callers_progress_leaves_nothing_behind(tmp_path: Path) -> None:
    """A notebook's stop button is one."""
    adapter = write_adapter(tmp_path / "adapter")

    def stop(words: str, done: int, total: int) -> None:
        if words.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        para_ext.compress_adapter(adapter, tmp_path / "small", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
