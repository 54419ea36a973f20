"""Score table: the scores of all recordings and expressions, computed once and kept."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from modicum.cache_folder import cache_folder
from modicum.errors import InputError
from modicum.speech.faults import listed
from modicum.speech.grammar.candidates import Expression
from modicum.speech.grammar.command_model import CommandModel
from modicum.speech.grammar.recordings import Recording
from modicum.whole_file import write_whole

_FORMAT = 1

_BLOCK = 256
"""Recordings whose scores are kept together: what a run that is stopped may lose."""

Progress = Callable[[str, int, int], object]
"""Called with what is done, recordings done, and in all."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores of recordings and expressions.

    Attributes:
        scores: [recordings, expressions] float32 log-scores of whole recordings.
        reference: [recordings] float32, of the free decode.
    """

    scores: np.ndarray
    reference: np.ndarray

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.reference.shape != self.scores.shape[:1]:
            raise InputError(
                f"scores are {self.scores.shape} and references {self.reference.shape}: give [recordings, "
                "expressions] and [recordings]"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def confidence(self) -> np.ndarray:
        """Scores above that of the free decode: [recordings, expressions] float32."""
        found: np.ndarray = self.scores - self.reference[:, None]
        return found

    def rows(self, chosen: Sequence[int] | np.ndarray) -> ScoreTable:
        """The table of some recordings."""
        at = np.asarray(chosen, dtype=np.int64)
        return ScoreTable(self.scores[at], self.reference[at])

    def columns(self, chosen: Sequence[int] | np.ndarray) -> ScoreTable:
        """The table of some expressions."""
        return ScoreTable(self.scores[:, np.asarray(chosen, dtype=np.int64)], self.reference)


def readable(
    model: CommandModel, recordings: Sequence[Recording], progress: Progress | None = None
) -> list[Recording]:
    """Those that hold sound; the others are named in a warning.

    Raises:
        InputError: none is left.
    """
    kept, faults = [], []
    for done, one in enumerate(recordings):
        if progress is not None:
            progress("reading recordings", done, len(recordings))
        try:
            one.load(model.sample_rate)
        except InputError as error:
            faults.append(str(error))
            continue
        kept.append(one)
    if not kept:
        raise InputError(f"none of {len(recordings):,} recordings can be used: {listed(faults)}")
    if faults:
        warnings.warn(
            f"{len(faults):,} of {len(recordings):,} recordings left out: {listed(faults)}", stacklevel=2
        )
    return kept


def compute_scores(
    model: CommandModel,
    recordings: Sequence[Recording],
    expressions: Sequence[Expression],
    *,
    keep: bool = True,
    progress: Progress | None = None,
) -> ScoreTable:
    """Score every recording with every expression, or read what the same call has computed before.

    Scores are kept in modicum's cache folder, by a fingerprint of the model, of the audio's bytes and of
    the expressions. The model runs once for each recording.

    Raises:
        InputError: a recording cannot be read or is silent.
    """
    tell = progress or (lambda *_: None)
    forms = [one.forms for one in expressions]
    scores = np.empty((len(recordings), len(expressions)), dtype=np.float32)
    reference = np.empty(len(recordings), dtype=np.float32)
    for start in range(0, len(recordings), _BLOCK):
        block = recordings[start : start + _BLOCK]
        rows = slice(start, start + len(block))
        path = cache_folder() / "grammar" / f"{fingerprint(model, block, expressions)}.npz"
        known = _read(path, len(block), len(expressions)) if keep else None
        if known is not None:
            scores[rows], reference[rows] = known.scores, known.reference
            continue
        for row, recording in enumerate(block, start):
            tell("scoring recordings", row, len(recordings))
            samples = recording.load(model.sample_rate)
            try:
                scores[row], reference[row] = model.score(samples, forms)
            except InputError as error:  # too short for the model
                raise InputError(f"{recording.audio}: {error}") from error
        if keep:
            _write(path, ScoreTable(scores[rows], reference[rows]))
    tell("scoring recordings", len(recordings), len(recordings))
    return ScoreTable(scores, reference)


def fingerprint(
    model: CommandModel, recordings: Sequence[Recording], expressions: Sequence[Expression]
) -> str:
    """32 hex digits that stand for all that a table depends on.

    Raises:
        InputError: a file cannot be read.
    """
    sha = hashlib.sha256(repr((_FORMAT, model.units, model.symbols, model.digest)).encode())
    sha.update(repr([one.forms for one in expressions]).encode())
    known: dict[Path, str] = {}
    for one in recordings:
        if one.audio not in known:
            try:
                known[one.audio] = hashlib.sha256(one.audio.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(
                    f"cannot read {one.audio}: {error.strerror or error}; leave it out"
                ) from error
        sha.update(repr((known[one.audio], one.start, one.end)).encode())
    return sha.hexdigest()[:32]


def _read(path: Path, num_recordings: int, num_expressions: int) -> ScoreTable | None:
    """What is kept; None where it is not there or damaged, so that it is computed again."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            scores, reference = saved["scores"], saved["reference"]
        table = ScoreTable(scores, reference)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None
    return table if table.scores.shape == (num_recordings, num_expressions) else None


def _write(path: Path, table: ScoreTable) -> None:
    """Whole or not at all; a folder that cannot be written costs time in the next run and nothing else."""
    data = io.BytesIO()
    np.savez(data, scores=table.scores, reference=table.reference)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data.getbuffer())
    except OSError as error:
        warnings.warn(f"the scores are not kept in {path.parent}: {error.strerror or error}", stacklevel=3)
