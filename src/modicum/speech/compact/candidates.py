"""Candidates: the ways in which a recognizer may fit into a number of bytes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from functools import cache
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
WIDTHS = tuple(step / 32 for step in range(32, 0, -1))
"""Of the given model's; close together, so that a narrower model takes the bytes that there are."""
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
    largest, smallest = zip(
        *(_largest_and_smallest(recognizer, family, budget) for family in _families(recognizer)), strict=True
    )
    found: list[Candidate] = []
    for one in largest:
        if one is not None and all(_plan(one) != _plan(other) for other in found):
            found.append(one)
    if not found:
        least = min(smallest, key=lambda one: one.nbytes)
        raise InputError(
            f"nothing fits into {format_size(budget)}: the smallest is {least.label} in "
            f"{format_size(least.nbytes)}; give a larger budget, or a smaller model"
        )
    return found


_Plan = tuple[ModelSettings, int, float]
"""Sizes, bits and sparsity."""


def _largest_and_smallest(
    recognizer: Recognizer, family: list[_Plan], budget: int
) -> tuple[Candidate | None, Candidate]:
    """The largest candidate of a family that fits, and its smallest."""
    made = cache(lambda plan: _candidate(recognizer, *plan))
    # Bytes fall along a family, so a few of its members tell where it begins to fit.
    first = bisect_left(family, True, key=lambda plan: made(plan).nbytes <= budget)
    return made(family[first]) if first < len(family) else None, made(family[-1])


def _plan(candidate: Candidate) -> _Plan:
    return candidate.model, candidate.bits, candidate.sparsity


def _families(recognizer: Recognizer) -> list[list[_Plan]]:
    """Each from the most bytes to the fewest."""
    given = recognizer.model.settings
    families: list[list[_Plan]] = [[(given, bits, sparsity) for sparsity in SPARSITIES] for bits in (8, 4)]
    kinds = [[one for one in _narrower_ones(given) if one != given]]
    if isinstance(given, SanmSettings) and given.sharing == "none" and given.num_layers > 1:
        kinds.append(_narrower_ones(replace(given, sharing="cycle", num_sets=-(-given.num_layers // 2))))
    families += [[(one, 8, sparsity) for one in kind] for kind in kinds for sparsity in (0.0, 0.5)]
    return [family for family in families if family]


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


def _narrower_ones(model: ModelSettings) -> list[ModelSettings]:
    """The same in each width that there is, the widest first."""
    found = [_narrower(model, share) for share in WIDTHS]
    return list(dict.fromkeys(one for one in found if one is not None))


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
