"""Progress: how far a stage of a call is, in bytes, as the stages tell it; and what a terminal shows of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a few words on what is being done, the bytes done, and those of the whole stage.

A stage begins with 0 bytes done and ends when all are; 0 of 0: it takes as long as it takes. Stages follow each other,
each at a speed of its own.
"""


class Meter:
    """The bytes that a stage has done, told to ``progress`` whenever there are more."""

    def __init__(self, progress: Progress | None, words: str, total: int) -> None:
        self._progress, self._words, self._done, self._total = progress, words, 0, total
        self.add(0)

    def add(self, count: int, words: str = "") -> None:
        """So many bytes more; in other words where something else is being done now."""
        self._done, self._words = self._done + count, words or self._words
        if self._progress is not None:
            self._progress(self._words, self._done, self._total)


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Say on a terminal what is being waited for; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(f"{words} …")):
        yield


@contextmanager
def bars() -> Iterator[Progress | None]:
    """A Progress that draws a bar on a terminal, with the time left at the stage's own speed; None in a pipe.

    Between stages the terminal is free, for a download's own bars.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    words_column = TextColumn("{task.description}", markup=False)
    stage: tuple[Bar, int] | None = None  # what is drawn, and the stage's total
    with ExitStack() as shown:

        def draw(words: str, done: int, total: int) -> None:
            nonlocal stage
            if done == 0 or stage is None or stage[1] != total:
                shown.close()
                stage = None
                if total == 0:
                    shown.enter_context(waiting(words))
                    return
                columns = words_column, BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn()
                bar = shown.enter_context(Bar(*columns, console=Console(stderr=True), transient=True))
                bar.add_task(words, total=total)
                stage = bar, total
            stage[0].update(stage[0].task_ids[0], completed=done, description=words)
            if done == total:
                shown.close()
                stage = None

        yield draw
