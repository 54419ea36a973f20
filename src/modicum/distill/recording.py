"""Recording: what an ensemble says of sequences, written down once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from modicum.distill.ensemble import Ensemble
from modicum.distill.writer import TargetsWriter

_GROUP_NBYTES = 2**28
"""Of the probabilities that are in memory at a time."""
_FLOAT_NBYTES = 4


def record(
    ensemble: Ensemble,
    ids: Tensor,
    writer: TargetsWriter,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Record targets for each token but the first of each sequence, and finish the writer's folder.

    Sequences whose targets an earlier run recorded are not read again. Members of an ensemble that are loaded
    one after another are loaded once for each 256 MiB of probabilities; a single member takes a sequence at a
    time.

    Args:
        ids: [n, T] int64; the folder gets n·(T - 1) frames.
        progress: called with sequences done, and in all.

    Raises:
        ModelError, InputError: as `Ensemble.probabilities`, `TargetsWriter.append`.
        TargetsError: the disk is full; what was recorded stays.
    """
    num, frames = len(ids), ids.shape[1] - 1
    tell = progress or (lambda *_: None)
    done = writer.num_frames // frames
    tell(done, num)
    if writer.is_complete:
        return
    size = max(1, _GROUP_NBYTES // (_FLOAT_NBYTES * frames * writer.header.num_classes))
    size = 1 if len(ensemble.loaders) == 1 else size
    while done < num:
        group = ids[done : done + size]
        for probabilities in ensemble.probabilities([row[None] for row in group]):
            writer.append(probabilities.flatten(0, 1))
            done += 1
            tell(done, num)
    writer.finish()
