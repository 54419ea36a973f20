"""Library: each option of each part of a model, pruned in isolation, with its errors; kept on disk.

A part is pruned on the inputs that the reference gives it and put into the reference alone (DONNA's block
library, arXiv 2012.08859; one block replaced at a time, Puzzle, arXiv 2411.19146). What it does to the
block's output and to the model's predictions are its errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import InputError, ModelError
from modicum.fit.lower_layers import LowerLayers
from modicum.fit.part import Part, held_nbytes, is_held_packed, itemsize_of, parts_of
from modicum.fit.probe import Errors, Probes
from modicum.fit.settings import FitSettings
from modicum.fit.weight_option import DENSE
from modicum.search.noise import ErrorSums
from modicum.weights.blocks import Block, Matrix, Passes, blocks_of
from modicum.weights.packed import pack, unpack
from modicum.weights.pattern import Pattern
from modicum.weights.plan import Plan
from modicum.weights.progress import Progress
from modicum.weights.statistics import Statistics
from modicum.weights.walk import gather, prune_matrix
from modicum.whole_file import whole_file, write_whole

FORMAT = 1
_RUN, _CACHE, _SAMPLES = "library.json", "cache.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Variant:
    """One option of a part.

    Attributes:
        part, option: their names.
        nbytes: in memory, as a run of the saved model holds it.
        errors: against the reference, with this part alone replaced.
    """

    part: str
    option: str
    nbytes: int
    errors: Errors


class Library:
    """A folder with the variants of a reference model.

    Args:
        folder: where they are kept; made if it is not there.
        model: the reference, its weights dense. It is the same before and after each call.
        ids: [n, T] calibration tokens.
        about: what all that is kept depends on.
        heads: digest of what the policy reads of the model's heads, on which errors of caches and of
            assembled models depend, and the variants do not. Rows of other heads are not read.

    Raises:
        InputError: the folder holds the library of another reference, text or settings, or cannot be
            written.
        ModelError: the model cannot be pruned.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        ids: Tensor,
        settings: FitSettings,
        about: Mapping[str, Any],
        heads: str = "",
    ) -> None:
        self.folder, self.model, self.ids, self.settings = folder, model, ids, settings
        self.heads = heads
        self.blocks: list[Block] = blocks_of(model)
        self.parts: list[Part] = parts_of(self.blocks)
        self.options = settings.options()
        self._check_patterns()
        _claim(folder, {"format": FORMAT, **about})
        self.variants: dict[tuple[str, str], Variant] = {}

    def build(self, probes: Probes, progress: Progress | None = None) -> None:
        """Make the variants that the folder does not have, layer by layer.

        Raises:
            InputError: the inputs of a layer are not finite (by its name).
            ModelError: a file cannot be written.
        """
        tell = progress or (lambda *_: None)
        passes: Passes | None = None
        lower = LowerLayers(self.model, [block.module for block in self.blocks], probes)
        at = 0
        for number in range(len(self.blocks)):
            tell("pruning each layer alone", number, len(self.blocks))
            if not self._load(number):
                if passes is None:
                    passes, at = Passes(self.model, self.blocks, self.ids), 0
                while at < number:
                    passes.hidden, at = passes.through(at), at + 1
                lower.keep(number)
                self._make(number, passes, probes, lower)
        tell("pruning each layer alone", len(self.blocks), len(self.blocks))

    @property
    def left_out(self) -> list[str]:
        """Options of parts whose errors were not numbers, once the library is built."""
        return [
            f"{part.name} at {option.name}"
            for part in self.parts
            for option in self.options
            if (part.name, option.name) not in self.variants
        ]

    @contextmanager
    def assembled(self, options: Mapping[str, str]) -> Iterator[PreTrainedModel]:
        """The model with an option's library weights for each part, dense in memory; undone at the end."""
        changed = [part for part in self.parts if options[part.name] != DENSE]
        kept = {m.name: m.weight.clone() for part in changed for m in part.matrices}
        try:
            for part in changed:
                self.put(part, options[part.name])
            yield self.model
        finally:
            for part in changed:
                for matrix in part.matrices:
                    matrix.weight.copy_(kept[matrix.name])

    @torch.no_grad()
    def put(self, part: Part, option: str) -> dict[str, Tensor]:
        """Write a variant's weights into the model; their masks, by the weights' names."""
        masks = {}
        with safe_open(self._path(part.layer), framework="pt") as file:
            for index, matrix in enumerate(part.matrices):
                key = f"{part.name}/{option}/{index}"
                mask = unpack(file.get_tensor(f"{key}.mask"), matrix.weight.shape[1])
                values = file.get_tensor(f"{key}.values")
                dense = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
                matrix.weight.copy_(dense)
                masks[matrix.name] = mask
        return masks

    def plan_of(self, option: str) -> Plan:
        """How an option is pruned."""
        chosen = next(x for x in self.options if x.name == option)
        found = self.settings.pruning(chosen)
        assert isinstance(found, Plan)
        return found

    def rows(self, kind: str) -> dict[str, Errors]:
        """Errors of caches, or of assembled models, that were measured with these heads, by their names.

        Raises:
            InputError: the file cannot be read.
        """
        path = self.folder / {"cache": _CACHE, "samples": _SAMPLES}[kind]
        found = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove it to measure anew") from error
        for line in lines:
            try:
                row = json.loads(line)
                name, heads = row.pop("name"), row.pop("heads", "")
                errors = Errors(**row)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut by a kill, or damaged: measured again
            if heads == self.heads:
                found[name] = errors
        return found

    def keep(self, kind: str, name: str, errors: Errors) -> None:
        """Add a row.

        Raises:
            ModelError: it cannot be written.
        """
        path = self.folder / {"cache": _CACHE, "samples": _SAMPLES}[kind]
        line = json.dumps({"name": name, "heads": self.heads, **errors.to_dict()}) + "\n"
        try:
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                line = "\n" + line  # behind one that was cut by a kill
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise ModelError(
                f"cannot write {path}: {error.strerror or error}; make room and run the same again"
            ) from error

    def _check_patterns(self) -> None:
        shapes = {m.name: (m.weight.shape[0], m.weight.shape[1]) for p in self.parts for m in p.matrices}
        for option in self.options:
            if not option.is_dense:
                self.plan_of(option.name).pattern.check(shapes)

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:04}.safetensors"

    def _load(self, number: int) -> bool:
        path = self._path(number)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                rows = json.loads(file.metadata()["variants"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return False  # damaged: made again
        for row in rows:
            variant = Variant(row["part"], row["option"], row["nbytes"], Errors(**row["errors"]))
            self.variants[variant.part, variant.option] = variant
        return True

    @torch.no_grad()
    def _make(self, number: int, passes: Passes, probes: Probes, lower: LowerLayers) -> None:
        block = self.blocks[number]
        plans = {x.name: self.plan_of(x.name) for x in self.options if not x.is_dense}
        found = gather(passes, number, block, next(iter(plans.values()))) if plans else {}
        dense_out = passes.through(number)
        tensors: dict[str, Tensor] = {}
        variants = []
        for part in (part for part in self.parts if part.layer == number):
            whole = [matrix.weight.clone() for matrix in part.matrices]
            zero = Errors(0.0, 0.0, 1.0, 0.0)
            dense_nbytes = sum(weight.nbytes for weight in whole)
            variants.append(Variant(part.name, DENSE, dense_nbytes, zero))
            for option, how in plans.items():
                made, nbytes = {}, 0
                try:
                    for index, matrix in enumerate(part.matrices):
                        mask = self._prune(matrix, found[matrix.name], how, how.pattern, number)
                        values = matrix.weight[mask].cpu()
                        made[f"{part.name}/{option}/{index}.mask"] = pack(mask.cpu())
                        made[f"{part.name}/{option}/{index}.values"] = values
                        nbytes += self._nbytes(matrix, values)
                    ratio = noise_to_signal(dense_out, passes.through(number))
                    with lower.skipped():
                        errors = probes.measure(self.model)
                finally:  # an error or Ctrl-C leaves the caller's model as it was, too
                    for matrix, weight in zip(part.matrices, whole, strict=True):
                        matrix.weight.copy_(weight)
                if not errors.is_finite or not math.isfinite(ratio):
                    continue  # `left_out` names it
                tensors |= made
                told = Errors(errors.text, errors.answers, errors.kept, ratio)
                variants.append(Variant(part.name, option, nbytes, told))
        self._write(number, tensors, variants)
        self.variants |= {(v.part, v.option): v for v in variants}

    @staticmethod
    def _prune(matrix: Matrix, inputs: Statistics, how: Plan, pattern: Pattern, number: int) -> Tensor:
        return prune_matrix(matrix, inputs, how, pattern, number)[1]

    def _nbytes(self, matrix: Matrix, values: Tensor) -> int:
        rows, width = matrix.weight.shape
        if not is_held_packed(self.model, matrix):
            return matrix.weight.nbytes
        return held_nbytes(rows, width, len(values), itemsize_of(values))

    def _write(self, number: int, tensors: dict[str, Tensor], variants: list[Variant]) -> None:
        path = self._path(number)
        rows = [
            {"part": v.part, "option": v.option, "nbytes": v.nbytes, "errors": v.errors.to_dict()}
            for v in variants
        ]
        try:
            with whole_file(path) as part:
                save_file(tensors, part, metadata={"variants": json.dumps(rows)})
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot write {path}: {error}; make room and run the same again, which goes on from the "
                f"{number} layers that are done"
            ) from error


def noise_to_signal(reference: list[Tensor], changed: list[Tensor]) -> float:
    """The distance of blocks that DONNA has, in float64; NaN if an output is not finite.

    Args:
        reference, changed: of each sequence, [1, T, C]. Channels that hardly vary are left out.
    """
    sums = ErrorSums(reference[0].shape[-1])
    for expected, found in zip(reference, changed, strict=True):
        sums.add(expected, found)
    return sums.value


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder this library's, or raise where it is another's."""
    text = json.dumps(about, sort_keys=True, default=str)
    path = folder / _RUN
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        other = {} if not isinstance(known, dict) else known
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use the library {folder}: {error}; give another --library") from error
    own = json.loads(text)
    differing = [name for name in own if own[name] != other.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{folder} is the library of another run: its {name} is {other.get(name)}, here it is "
            f"{own[name]}; give another --library, or remove that one"
        )
