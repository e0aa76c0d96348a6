"""Module names: their natural order, the type of a module, and its place in a map of all."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")
_LAYERS = {sep: re.compile(rf"(.*{re.escape(sep)}[0-9]+|[0-9]+){re.escape(sep)}([^0-9].*)") for sep in "._"}


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


def place(name: str) -> tuple[str, str]:
    """Layer and kind, which together are the name: up to the last number that stands before other parts, and the rest.

    ``model.layers.0`` and ``self_attn.q_proj``; where there is no such number, kind is the type.
    """
    match = _LAYERS["." if "." in name else "_"].fullmatch(name)
    if match:
        return match[1], match[2]
    kind = module_type(name)
    return (name.removesuffix(kind).rstrip(".") if name.endswith(kind) else name), kind
