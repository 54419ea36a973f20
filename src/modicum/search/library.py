"""Block library: every variant of every block, trained in isolation and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modicum.errors import InputError, ModelError
from modicum.search.blockwise import (
    BlockFeatures,
    BlockwiseSettings,
    Inputs,
    block_error,
    data_digest,
    train_block,
)
from modicum.search.costs import num_macs, num_parameters
from modicum.search.network import fingerprint
from modicum.search.space import ReferenceBlock, SearchSpace
from modicum.whole_file import whole_file, write_json

FORMAT = 2
HEADER = "library.json"
_KEY = "modicum"

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class BlockEntry:
    """A variant of a block.

    Attributes:
        block: its number.
        variant: its name.
        error: noise-to-signal ratio of its output on held-out inputs; NaN if its training failed.
        parameters: how many it has.
        macs: multiply-accumulates for one input.
        seconds: of processor time that its training took.
    """

    block: int
    variant: str
    error: float
    parameters: int
    macs: int
    seconds: float

    @property
    def is_usable(self) -> bool:
        """Whether its training went well."""
        return math.isfinite(self.error)


class BlockLibrary:
    """Trained variants of a space in a folder.

    The folder belongs to one reference, one training set and one way to train; a variant is one file, written
    whole, so that a stopped run goes on with the next one.

    Args:
        folder: of the library.
        space: whose variants are in it.
        entries: by block number and variant name.
    """

    def __init__(
        self, folder: Path, space: SearchSpace, entries: Mapping[tuple[int, str], BlockEntry]
    ) -> None:
        self.folder, self.space, self.entries = folder, space, dict(entries)

    @classmethod
    def build(
        cls,
        space: SearchSpace,
        train: Inputs,
        held_out: Inputs,
        folder: str | Path,
        settings: BlockwiseSettings | None = None,
        *,
        wanted: Mapping[int, tuple[str, ...]] | None = None,
        progress: Progress | None = None,
    ) -> BlockLibrary:
        """Train what the folder does not have yet.

        Args:
            space: reference and variants.
            train: inputs to learn from.
            held_out: inputs on which errors are measured.
            folder: made if it is missing.
            settings: how variants are trained.
            wanted: names by block number; None for all variants.
            progress: called with what is done, variants done, and in all.

        Returns:
            The library with all that the folder has of the space.

        Raises:
            InputError: the folder is a library of another reference, other inputs or other settings, there
                are no inputs, or it cannot be written.
        """
        settings, folder = settings or BlockwiseSettings(), Path(folder)
        if not len(train) or not len(held_out):
            raise InputError(
                f"there are {len(train)} inputs to learn from and {len(held_out)} held out: give both"
            )
        _claim(folder, space, train, held_out, settings)
        library = cls.open(folder, space)
        if wanted is None:
            wanted = {n: tuple(v.name for v in own) for n, own in enumerate(space.variants)}
        missing = [(n, v) for n, names in wanted.items() for v in names if (n, v) not in library.entries]
        total, tell = sum(map(len, wanted.values())), progress or (lambda *_: None)
        tell("training blocks", total - len(missing), total)
        done = total - len(missing)
        for number in sorted({n for n, _ in missing}):
            learnt = BlockFeatures(space.reference, number, train, settings.cache_nbytes)
            tested = BlockFeatures(space.reference, number, held_out, settings.cache_nbytes)
            for name in (v for n, v in missing if n == number):
                library._train(number, name, learnt, tested, settings)
                done += 1
                tell("training blocks", done, total)
        return library

    @classmethod
    def open(cls, folder: str | Path, space: SearchSpace) -> BlockLibrary:
        """What a folder has of a space; nothing is trained.

        Raises:
            InputError: it is no library, or one of another reference.
        """
        folder = Path(folder)
        header = _header(folder)
        found = fingerprint(space.reference)
        if header is None:
            raise InputError(f"{folder} has no {HEADER}: give the folder of a library, or build one")
        if header["reference"] != found:
            raise InputError(
                f"{folder} is a library of the reference {header['reference']}, and this one is {found}: "
                "give the reference that it was built with, or another folder"
            )
        entries = {}
        for number, own in enumerate(space.variants):
            for variant in own:
                path = _path(folder, number, variant.name)
                if path.exists() and (entry := _read_entry(path)) is not None:
                    entries[number, variant.name] = entry
        return cls(folder, space, entries)

    @property
    def failed(self) -> list[BlockEntry]:
        """Variants that were dropped, as their training gave numbers that are not finite."""
        return [entry for entry in self.entries.values() if not entry.is_usable]

    @property
    def seconds(self) -> float:
        """Processor time of all trainings."""
        return math.fsum(entry.seconds for entry in self.entries.values())

    def usable(self) -> list[list[int]]:
        """For each block the numbers of the variants that are trained.

        Raises:
            InputError: a block has none.
        """
        found = [
            [
                p
                for p, v in enumerate(own)
                if (n, v.name) in self.entries and self.entries[n, v.name].is_usable
            ]
            for n, own in enumerate(self.space.variants)
        ]
        for number, own in enumerate(found):
            if not own:
                raise InputError(
                    f"no variant of block {number} is trained, or all failed: build the library, or give a "
                    "lower learning rate"
                )
        return found

    def entry(self, number: int, pick: int) -> BlockEntry:
        """The entry of a variant by its number in the block.

        Raises:
            InputError: it is not in the library.
        """
        name = self.space.variants[number][pick].name
        if (number, name) not in self.entries:
            raise InputError(f"the library has no variant {name!r} of block {number}: build it first")
        return self.entries[number, name]

    def weights(self, picks: tuple[int, ...]) -> dict[tuple[int, str], dict[str, Tensor]]:
        """State dicts of a network's blocks, for `SearchSpace.assemble`.

        Raises:
            InputError: a variant is not in the library, or failed.
        """
        found = {}
        for number, pick in enumerate(picks):
            entry = self.entry(number, pick)
            if not entry.is_usable:
                raise InputError(
                    f"the variant {entry.variant!r} of block {number} failed: choose another one"
                )
            with safe_open(_path(self.folder, number, entry.variant), framework="pt") as file:
                found[number, entry.variant] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return found

    def _train(
        self,
        number: int,
        name: str,
        learnt: BlockFeatures,
        tested: BlockFeatures,
        settings: BlockwiseSettings,
    ) -> None:
        variant = next(v for v in self.space.variants[number] if v.name == name)
        started = time.process_time()
        seed = int(hashlib.sha256(f"{settings.seed} {number} {name}".encode()).hexdigest()[:15], 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            block = self.space.block(number, variant)
            is_reference = isinstance(variant, ReferenceBlock)
            went_well = is_reference or train_block(block, learnt, settings)
        error = block_error(block, tested, settings.batch * 4) if went_well else math.nan
        site = self.space.sites[number]
        entry = BlockEntry(
            block=number,
            variant=name,
            error=error if math.isfinite(error) else math.nan,
            parameters=num_parameters(block),
            macs=num_macs(block, torch.zeros(1, *site.input_shape)),
            seconds=time.process_time() - started,
        )
        _write_entry(_path(self.folder, number, name), entry, block.state_dict() if entry.is_usable else {})
        self.entries[number, name] = entry


def _path(folder: Path, number: int, name: str) -> Path:
    return folder / f"block{number}" / f"{name}.safetensors"


def _header(folder: Path) -> dict[str, Any] | None:
    path = folder / HEADER
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT or not header["reference"]:
            raise InputError(
                f"{path} has the format {header['format']}, and this version reads {FORMAT}: give another "
                "folder, or remove this one to build it anew"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error}): remove the folder to build it anew") from error
    return dict(header)


def _claim(
    folder: Path, space: SearchSpace, train: Inputs, held_out: Inputs, settings: BlockwiseSettings
) -> None:
    """Write the header, or check that it is the same."""
    told = {
        "format": FORMAT,
        "reference": fingerprint(space.reference),
        "train": data_digest(train),
        "held_out": data_digest(held_out),
        # How features are kept changes no result.
        "settings": {key: value for key, value in asdict(settings).items() if key != "cache_nbytes"},
        "sites": [site.key for site in space.sites],
    }
    header = _header(folder)
    if header is not None:
        other = [key for key, value in told.items() if header.get(key) != value]
        if other:
            raise InputError(
                f"{folder} is a library with another {' and '.join(other)} (it has "
                f"{header.get(other[0])}, and this run {told[other[0]]}): repeat those, or give "
                "another folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HEADER, told)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; give another folder"
        ) from error


def _write_entry(path: Path, entry: BlockEntry, weights: Mapping[str, Tensor]) -> None:
    told = asdict(entry) | {"error": entry.error if entry.is_usable else None}
    tensors = {name: value.contiguous() for name, value in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            save_file(tensors, part, metadata={_KEY: json.dumps(told)})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {path}: {error}; make room and run the same again") from error


def _read_entry(path: Path) -> BlockEntry | None:
    """None if the file is damaged: it is trained again."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()[_KEY])
        return BlockEntry(**(told | {"error": math.nan if told["error"] is None else told["error"]}))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
