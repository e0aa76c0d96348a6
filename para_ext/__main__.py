"""``python -m para_ext``: the command line."""

from .cli import main

main()
