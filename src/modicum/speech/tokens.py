"""Tokens: the classes that a model tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from modicum.errors import InputError
from modicum.speech.manifest import PhoneInterval, check_order

Kind = Literal["graphemes", "phones", "thirds"]
"""Letters, or phones, both with a blank for CTC; or the thirds of phones, one for each frame."""

SILENCE = "SIL"
"""The phone of frames in which none is spoken."""

BLANK = 0
"""The class of CTC's blank."""

_UNKNOWN = -1

ENGLISH = ("'", " ", *"abcdefghijklmnopqrstuvwxyz")
"""Apostrophe, space and letters."""


@dataclass(frozen=True)
class TokenSet:
    """The classes of a model.

    "graphemes" and "phones" are for CTC: class 0 is the blank, symbol i has class i + 1. "thirds" is for
    frame-labelled models: the first, second and last third of symbol i have the classes 3i, 3i + 1, 3i + 2;
    there is no blank, and the first symbol is silence.

    Attributes:
        kind: see `Kind`.
        symbols: graphemes or phones, each once.

    Raises:
        InputError: there is no symbol, one is there twice, or a phone's name has a space.
    """

    kind: Kind
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"tokens are {self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if not self.symbols:
            raise InputError("a token set has no symbols: give at least one")
        twice = next((x for x in self.symbols if self.symbols.count(x) > 1), None)
        if twice is not None:
            raise InputError(f"{twice!r} is twice among the symbols: give each once")
        bad = next((x for x in self.symbols if not self._is_symbol(x)), None)
        if bad is not None:
            raise InputError(f"{bad!r} is no symbol of {self.kind}: give a letter, or a phone without spaces")
        if self.kind == "thirds" and self.symbols[0] != SILENCE:
            raise InputError(f"the first symbol is {self.symbols[0]!r}: give {SILENCE} first")

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> TokenSet:
        """The graphemes of texts: the English ones, and what else the texts have."""
        others = set().union(*(normalize_text(text) for text in texts)) - set(ENGLISH)
        return cls("graphemes", ENGLISH + tuple(sorted(others)))

    @classmethod
    def of_phones(cls, utterances: Iterable[Sequence[PhoneInterval]], thirds: bool = False) -> TokenSet:
        """The phones of utterances, sorted; for frame labels (thirds) with silence first.

        Raises:
            InputError: there is none.
        """
        phones = {interval.phone for intervals in utterances for interval in intervals} - {SILENCE}
        if not phones:
            raise InputError('no utterance has phones: give a manifest with "phones", or use graphemes')
        if thirds:
            return cls("thirds", (SILENCE, *sorted(phones)))
        return cls("phones", tuple(sorted(phones)))

    @property
    def num_classes(self) -> int:
        """Of a model's output."""
        return 3 * len(self.symbols) if self.kind == "thirds" else len(self.symbols) + 1

    def encode(self, text: str) -> list[int]:
        """The classes of a text: of its letters in lower case, or of phones with spaces between.

        Raises:
            InputError: it has a letter or phone that is not among the symbols, or the classes are thirds of
                phones, which only `frame_labels` gives.
        """
        if self.kind == "thirds":
            raise InputError("a text has no thirds of phones: use frame_labels, with the times of the phones")
        units = normalize_text(text) if self.kind == "graphemes" else text.split()
        try:
            return [self._index[unit] + 1 for unit in units if unit != SILENCE]
        except KeyError as error:
            raise InputError(
                f"{error} in {text!r} is not among the {len(self.symbols)} {self.kind}: leave it out, or "
                "make the token set from all texts"
            ) from error

    def decode(self, classes: Iterable[int]) -> str:
        """The text of classes; blanks are left out, and phones have a space between.

        Graphemes and phones: each class is one symbol, so repeats must have been merged before. Thirds: one
        class for each frame; a phone is said again where its thirds go back, and silence is left out.

        Raises:
            InputError: a class is out of range.
        """
        found = list(classes)
        for one in found:
            if not 0 <= one < self.num_classes:
                raise InputError(
                    f"class {one} is not among the {self.num_classes}: use the model's token set"
                )
        if self.kind == "thirds":
            return " ".join(self._spoken(found))
        joint = "" if self.kind == "graphemes" else " "
        return joint.join(self.symbols[one - 1] for one in found if one != BLANK)

    def frame_labels(
        self,
        phones: Sequence[PhoneInterval],
        num_frames: int,
        frame_shift: float,
        unknown_label: int | None = None,
    ) -> Tensor:
        """The class of each frame: the phone that is spoken at its centre, and its third; else silence.

        Args:
            phones: in the order of time.
            num_frames: N.
            frame_shift: seconds from frame to frame; frame t is centred at (t + 1/2) · frame_shift.
            unknown_label: of frames whose phone is not among the symbols; None to refuse such phones.

        Returns:
            [N] int64. Silence, given or not, has the thirds of the stretch between its neighbours.

        Raises:
            InputError: a phone is not among the symbols and has no label, phones are not in the order of
                time, or the classes are not thirds.
        """
        if self.kind != "thirds":
            raise InputError(f"frames are labelled by thirds of phones, and the classes are {self.kind}")
        check_order(phones)
        intervals = self._filled(phones, num_frames * frame_shift)
        unknown = next((phone for phone, _, _ in intervals if phone not in self._index), None)
        if unknown is not None and unknown_label is None:
            raise InputError(
                f"phone {unknown} is not among the {len(self.symbols)} known: make the token set from all "
                "utterances"
            )
        index = torch.tensor([self._index.get(phone, _UNKNOWN) for phone, _, _ in intervals])
        start, end = torch.tensor([times for _, *times in intervals], dtype=torch.float64).T
        centre = (torch.arange(num_frames, dtype=torch.float64) + 0.5) * frame_shift
        at = torch.searchsorted(start.contiguous(), centre, right=True) - 1
        third = (3 * (centre - start[at]) / (end[at] - start[at])).long().clamp_max(2)
        # Silence where an interval that begins last has ended, as it may if phones overlap.
        labels: Tensor = torch.where(centre < end[at], 3 * index[at] + third, 0)
        return labels if unknown_label is None else labels.masked_fill(labels < 0, unknown_label)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"kind": self.kind, "symbols": list(self.symbols)}

    @classmethod
    def from_json(cls, value: Any) -> TokenSet:
        """As `to_json` gave it.

        Raises:
            InputError: it is something else.
        """
        try:
            return cls(value["kind"], tuple(str(symbol) for symbol in value["symbols"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"{value!r} is no token set: give one written by this version") from error

    @cached_property
    def _index(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def _is_symbol(self, symbol: str) -> bool:
        # Half of a surrogate pair cannot be written to a file.
        is_text = not any("\ud800" <= letter <= "\udfff" for letter in symbol)
        return is_text and (len(symbol) == 1 if self.kind == "graphemes" else len(symbol.split()) == 1)

    def _spoken(self, classes: Sequence[int]) -> list[str]:
        spoken: list[str] = []
        before = -1
        for one in classes:
            is_new = before < 0 or one // 3 != before // 3 or one % 3 < before % 3
            if is_new and self.symbols[one // 3] != SILENCE:
                spoken.append(self.symbols[one // 3])
            before = one
        return spoken

    @staticmethod
    def _filled(phones: Sequence[PhoneInterval], duration: float) -> list[tuple[str, float, float]]:
        """Phones, and silence where there is none."""
        filled: list[tuple[str, float, float]] = []
        at = 0.0
        for interval in phones:
            if interval.start > at:
                filled.append((SILENCE, at, interval.start))
            filled.append((interval.phone, interval.start, interval.end))
            at = max(at, interval.end)
        if at < duration:
            filled.append((SILENCE, at, duration))
        return filled


def normalize_text(text: str) -> str:
    """In lower case, with single spaces."""
    return " ".join(text.lower().replace("’", "'").split())
