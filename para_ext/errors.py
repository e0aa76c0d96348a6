"""The one error that para_ext raises on purpose: a sentence that says what, where, and what to do."""

from __future__ import annotations


class ParaError(ValueError):
    """A request or an input that para_ext refuses; the message is one sentence that names the remedy."""


def shown(value: object) -> str:
    """A value for a message: its repr, cut where it is long."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # an int of more digits than Python prints
        return "a number of thousands of digits"
