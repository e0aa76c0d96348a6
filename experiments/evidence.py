"""Evidence: does PARA's claim hold on real models? Commands that train, compress, measure, and write what came out.

python experiments/evidence.py run       train and measure the grid; a second run goes on where the first stopped
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read once, with torch: threads that wait must not burn the other's core

import grid
import torch
import transformers

PRIMARY = ("rotten-tomatoes", "fashion-mnist")
PARTS = (
    grid.compressions,
    grid.energies,
    *(partial(grid.trained_low, divisor=divisor) for divisor in (4, 16, 8, 2)),
)


def run(out: Path) -> None:
    """What is quick first: compressions of all seeds, then what is trained at the small ranks, then the rest."""
    measured = grid.Grid(out)
    for part in PARTS:
        for seed in grid.SEEDS:
            for name in PRIMARY:
                for cell in part(name, seed):
                    measured.measure(name, cell)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--out", type=Path, default=Path("build/evidence"), help="work folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    run(arguments.out)


if __name__ == "__main__":
    main()
