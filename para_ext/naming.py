"""Module names: their natural order, and the type of a module."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> list[int | str]:
    """Sort key that puts ``layers.2`` before ``layers.10``; it decides ties between equal scores."""
    parts: list[int | str] = [*_DIGITS.split(name)]  # text and digits in turn, so that like meets like
    parts[1::2] = map(int, parts[1::2])
    return parts


def module_type(name: str) -> str:
    """The shortest tail of a dotted name that does not start with a number: ``q_proj``, ``to_out.0``; ``unet`` of
    ``unet.17``, where modules have numbers for names."""
    parts = name.split(".")
    if len(parts) == 2 and parts[1].isdecimal():
        return parts[0]
    start = len(parts) - 1
    while start > 0 and parts[start].isdecimal():
        start -= 1
    return ".".join(parts[start:])
