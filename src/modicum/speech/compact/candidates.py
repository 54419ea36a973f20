"""Candidates: the ways in which a recognizer may fit into a number of bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from modicum.errors import InputError
from modicum.kv.budget import format_size
from modicum.speech.acoustic_model import ModelSettings
from modicum.speech.compact.byte_count import file_nbytes, planned_sections
from modicum.speech.compact.compressed import matrices
from modicum.speech.compact.packed_file import recognizer_metadata
from modicum.speech.compact.pruning import is_prunable
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.conv_ctc import ConvCtcSettings
from modicum.speech.dfsmn import DfsmnCtcSettings
from modicum.speech.recognizer import Recognizer

SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Of the given model's."""
_ABOUT_NBYTES = 512
"""Set aside for what the header says of the training, which is not known before."""


@dataclass(frozen=True)
class Candidate:
    """A model, and how its weights are stored.

    Attributes:
        label: for people, and for the files of its trial.
        model: sizes.
        is_new: whether it is trained from nothing, taught by the given model.
        bits: of a weight.
        sparsity: of each large matrix.
        block: weights that are pruned together.
        nbytes: of its file, at most.
    """

    label: str
    model: ModelSettings
    is_new: bool
    bits: int
    sparsity: float
    block: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"model": self.model.to_dict()}


def fitting_candidates(recognizer: Recognizer, budget: int) -> list[Candidate]:
    """At most one of each family, the largest that fits, in this order:

    - the given model in 8 bits, sparse only as far as it must be;
    - the given model in 4 bits, likewise;
    - a narrower model, dense, 8 bits;
    - a narrower model of half the zeros, 8 bits;
    - for SAN-M models, half the layers' weight sets, used in a cycle: dense and with half the zeros.

    Raises:
        InputError: nothing fits; the smallest that there can be is named.
    """
    everything = [one for family in _families(recognizer) for one in family]
    smallest = min(everything, key=lambda one: one.nbytes)
    found: list[Candidate] = []
    for family in _families(recognizer):
        fitting = [one for one in family if one.nbytes <= budget]
        if fitting:
            best = max(fitting, key=lambda one: one.nbytes)
            if all((best.model, best.bits, best.sparsity) != (x.model, x.bits, x.sparsity) for x in found):
                found.append(best)
    if not found:
        raise InputError(
            f"nothing fits into {format_size(budget)}: the smallest is {smallest.label} in "
            f"{format_size(smallest.nbytes)}; give a larger budget, or a smaller model"
        )
    return found


def _families(recognizer: Recognizer) -> list[list[Candidate]]:
    given = recognizer.model.settings
    narrow = [one for share in WIDTHS[1:] if (one := _narrower(given, share)) is not None]
    families = [[_candidate(recognizer, given, bits, sparsity) for sparsity in SPARSITIES] for bits in (8, 4)]
    families += [[_candidate(recognizer, one, 8, sparsity) for one in narrow] for sparsity in (0.0, 0.5)]
    if isinstance(given, SanmSettings) and given.sharing == "none" and given.num_layers > 1:
        cycle = replace(given, sharing="cycle", num_sets=-(-given.num_layers // 2))
        shared = [one for share in WIDTHS if (one := _narrower(cycle, share)) is not None]
        families += [[_candidate(recognizer, one, 8, sparsity) for one in shared] for sparsity in (0.0, 0.5)]
    return families


def _candidate(recognizer: Recognizer, model: ModelSettings, bits: int, sparsity: float) -> Candidate:
    built = model.build(recognizer.features.num_mels, recognizer.tokens.num_classes)
    # A model with zeros may get masks that are not planned: their names are longer than what they save.
    sparse = [name for name, one in matrices(built).items() if is_prunable(one)]
    metadata = recognizer_metadata(replace(recognizer, model=built, about={}), bits, 1, sparse)
    nbytes = file_nbytes(planned_sections(built, bits, sparsity, 1), metadata) + _ABOUT_NBYTES
    is_new = model != recognizer.model.settings
    kind = "given" if not is_new else ("shared" if getattr(model, "sharing", "none") != "none" else "narrow")
    width = getattr(model, "width", None) or getattr(model, "hidden", 0)
    label = f"{kind}-{width}-{bits}bit" + (f"-{sparsity:.0%}zeros" if sparsity else "")
    return Candidate(label.replace("%", ""), model, is_new, bits, sparsity, 1, nbytes)


def _narrower(model: ModelSettings, share: float) -> ModelSettings | None:
    """The same with a share of its width; None where no such width is left."""
    if isinstance(model, SanmSettings):
        width = _multiple(model.width * share, model.num_heads)
        hidden = _multiple(model.hidden * share, 4)
        return replace(model, width=width, hidden=hidden) if width >= model.num_heads else None
    if isinstance(model, ConvCtcSettings):
        return replace(model, width=_multiple(model.width * share, 4))
    if isinstance(model, DfsmnCtcSettings):
        hidden, projection = (_multiple(x * share, 4) for x in (model.hidden, model.projection))
        return replace(model, hidden=hidden, projection=projection)
    return None


def _multiple(size: float, of: int) -> int:
    return max(of, int(size) // of * of)
