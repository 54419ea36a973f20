"""Sphinx definition: which states of which hidden Markov model a phone has in its context.

Reads a model folder of pocketsphinx: the binary `mdef` (as pocketsphinx's bin_mdef.c writes it) and
`transition_matrices` (Sphinx-3 format).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modicum.errors import ModelError

SILENCE = "SIL"

_ORDER = 0x11223344
_HEADER = 10
"""Counts in an mdef's header."""
_POSITIONS = ("i", "b", "e", "s")
"""Of a phone in its word, in mdef's order: inside, begin, end, single."""


@dataclass(frozen=True)
class SphinxDefinition:
    """The hidden Markov models of phones, three states each, from left to right.

    Attributes:
        phones: names of the context-independent ones, fillers among them.
        states: [models, 3] int64 senones of each phone in context; the first ones are context-independent.
        matrix: [models] int64, which transition matrix each has.
        transitions: [matrices, 3, 4] float64 log-probabilities from a state to a state or out.
        fillers: indices of phones that are no speech.
    """

    phones: tuple[str, ...]
    states: np.ndarray
    matrix: np.ndarray
    transitions: np.ndarray
    fillers: tuple[int, ...]
    contexts: dict[tuple[int, int, int, int], int]
    """(phone, left, right, position) -> model."""

    @classmethod
    def read(cls, folder: Path) -> SphinxDefinition:
        """Of a model folder.

        Raises:
            ModelError: a file is missing or not as pocketsphinx's.
        """
        try:
            return _read(folder)
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise ModelError(
                f"the model in {folder} cannot be read ({error}): install pocketsphinx again, with its "
                "US-English model"
            ) from error

    def models(self, words: Sequence[Sequence[str]]) -> list[int]:
        """The model of each phone of words spoken one after another, with silence before and after."""
        index = {name: at for at, name in enumerate(self.phones)}
        silence = index[SILENCE]
        phones = [index[phone] for word in words for phone in word]
        positions = [_position(at, len(word)) for word in words for at in range(len(word))]
        found = []
        for at, phone in enumerate(phones):
            left = phones[at - 1] if at else silence
            right = phones[at + 1] if at + 1 < len(phones) else silence
            found.append(self._model(phone, left, right, positions[at]))
        return found

    def _model(self, phone: int, left: int, right: int, position: int) -> int:
        """As pocketsphinx's bin_mdef_phone_id_nearest: the same context elsewhere in a word, then without."""
        others = [position, *(one for one in range(len(_POSITIONS)) if one != position)]
        for place in others:
            if (model := self.contexts.get((phone, left, right, place))) is not None:
                return model
        return phone


def _position(at: int, size: int) -> int:
    if size == 1:
        return _POSITIONS.index("s")
    if at == 0:
        return _POSITIONS.index("b")
    return _POSITIONS.index("e" if at == size - 1 else "i")


def _read(folder: Path) -> SphinxDefinition:
    data = (folder / "mdef").read_bytes()
    if data[:4] not in (b"BMDF", b"FDMB"):
        raise ValueError("mdef is not binary")
    order = "<" if struct.unpack("<i", data[4:8])[0] < 2**16 else ">"
    (size,) = struct.unpack(f"{order}i", data[8:12])
    at = 12 + size
    counts = struct.unpack(f"{order}{_HEADER}i", data[at : at + 4 * _HEADER])
    num_phones, num_models, num_states, _, _, _, num_sequences, _, num_nodes, _ = counts
    if num_states != 3:
        raise ValueError(f"its phones have {num_states} states and not 3")
    at += 4 * _HEADER
    names, start = [], at
    for _ in range(num_phones):
        end = data.index(b"\0", at)
        names.append(data[at:end].decode())
        at = end + 1
    at = start + -(-(at - start) // 4) * 4
    at += 8 * num_nodes  # a tree over the contexts, which the table of models has, too
    entry = np.dtype([("sequence", f"{order}i4"), ("matrix", f"{order}i4"), ("context", "u1", 4)])
    table = np.frombuffer(data, entry, num_models, at)
    at += entry.itemsize * num_models + 4
    sequences = np.frombuffer(data, f"{order}u2", 3 * num_sequences, at).reshape(num_sequences, 3)
    contexts = {
        (int(phone), int(left), int(right), int(position)): num_phones + row
        for row, (position, phone, left, right) in enumerate(table["context"][num_phones:])
    }
    return SphinxDefinition(
        tuple(names),
        sequences[table["sequence"]].astype(np.int64),
        table["matrix"].astype(np.int64),
        _transitions(folder / "transition_matrices"),
        tuple(row for row in range(num_phones) if table["context"][row][0]),
        contexts,
    )


def _transitions(path: Path) -> np.ndarray:
    data = path.read_bytes()
    at = data.index(b"endhdr\n") + len(b"endhdr\n")
    order = "<" if struct.unpack("<I", data[at : at + 4])[0] == _ORDER else ">"
    num, rows, columns, total = struct.unpack(f"{order}4i", data[at + 4 : at + 20])
    if (rows, columns) != (3, 4) or total != num * 12:
        raise ValueError(f"its transitions are {rows} × {columns} and not 3 × 4")
    values = np.frombuffer(data, f"{order}f4", total, at + 20).reshape(num, 3, 4).astype(np.float64)
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(values / values.sum(-1, keepdims=True))
    return found
