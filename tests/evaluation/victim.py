"""An evaluation in a process of its own, to be killed: python -m tests.evaluation.victim FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from modicum.evaluation.evaluate import evaluate
from modicum.evaluation.grid import Grid
from modicum.evaluation.row import Row
from tests.evaluation.colours import METRICS, Colours, Continued
from tests.tiny_model import TINY_MODEL

GRID = Grid(
    models=(str(TINY_MODEL),),
    policies=("full", "keydiff"),
    budgets=("48", "64"),
    tasks=("colours", "continued"),
    lengths=(120,),
    questions=("hidden", "seen"),
    limit=4,
    chunk=64,
    recent=8,
)


def work(folder: Path) -> list[Row]:
    """Run (or go on with) the grid."""
    return evaluate(GRID, folder, tasks=[Colours(metric="steps"), Continued()], metrics=METRICS)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
