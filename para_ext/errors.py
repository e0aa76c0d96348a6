"""The one error that para_ext raises on purpose: a sentence that says what, where, and what to do."""

from __future__ import annotations


class ParaError(ValueError):
    """A request or an input that para_ext refuses; the message is one sentence that names the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names of files and modules are in it


def printable(text: str) -> str:
    """Text of one line that can't steer a terminal: line ends, escapes and the like as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value for a message: its repr, cut where it is long."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # an int of more digits than Python prints
        return "a number of thousands of digits"


def first_line(error: Exception) -> str:
    """Of another library's error, what fits into a sentence."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
