"""Dictionary: how an acoustic model hears each word, counted over speech of which the words are known."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.errors import InputError, ModelError
from modicum.speech.faults import listed
from modicum.speech.grammar.alignment import heard_words
from modicum.speech.grammar.command_model import CommandModel, Form
from modicum.speech.grammar.recordings import Recording
from modicum.speech.tokens import normalize_text
from modicum.whole_file import write_whole

_FORMAT = 1

Progress = Callable[[str, int, int], object]
"""Called with what is done, recordings done, and in all."""


@dataclass(frozen=True)
class PronunciationDictionary:
    """Counts of what a model heard for each word that was said.

    Attributes:
        model: the model's name.
        units: what forms are written in.
        symbols: all that a form may have.
        digest: the model's.
        counts: by word and form; a recording's decodes share one count.
    """

    model: str
    units: str
    symbols: tuple[str, ...]
    digest: str
    counts: Mapping[str, Mapping[Form, float]]

    def variants(self, word: str, num_variants: int | None = None) -> list[tuple[Form, float]]:
        """Forms of a word and P(form | word), the most probable first; empty if it was never said."""
        heard = self.counts.get(word, {})
        total = sum(heard.values())
        ranked = sorted(heard.items(), key=lambda item: (-item[1], item[0]))
        return [(form, count / total) for form, count in ranked[:num_variants]]

    def check(self, model: CommandModel) -> None:
        """Raise unless it was learned with this model.

        Raises:
            ModelError: it was not.
        """
        if (self.units, self.symbols) != (model.units, model.symbols):
            raise ModelError(
                f"the dictionary is of {self.model}, which writes {len(self.symbols)} {self.units}, and "
                f"{model.name} writes {len(model.symbols)} {model.units}: learn it again with {model.name}"
            )
        if self.digest != model.digest:
            raise ModelError(
                f"the dictionary is of {self.model} ({self.digest}) and not of {model.name} "
                f"({model.digest}), whose errors are others: learn it again"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        told = {"format": _FORMAT, "model": self.model, "units": self.units, "symbols": list(self.symbols)}
        counts = {word: dict(forms) for word, forms in sorted(self.counts.items())}
        write_json(Path(path), told | {"digest": self.digest, "counts": counts})

    @classmethod
    def load(cls, path: str | Path) -> PronunciationDictionary:
        """As `save` wrote it.

        Raises:
            InputError: it cannot be read, is something else, or is of a newer format.
        """
        saved = read_json(Path(path), "dictionary", _FORMAT)
        try:
            return cls(
                str(saved["model"]),
                str(saved["units"]),
                tuple(map(str, saved["symbols"])),
                str(saved["digest"]),
                {
                    str(w): {str(f): float(n) for f, n in forms.items()}
                    for w, forms in saved["counts"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no dictionary ({error!r}): learn it again") from error


@dataclass(frozen=True)
class HeardWord:
    """What was heard for a word in a recording."""

    word: str
    form: Form
    weight: float
    """Of the decode among those of its recording."""


def learn_dictionary(
    model: CommandModel, recordings: Sequence[Recording], num_best: int = 1, progress: Progress | None = None
) -> PronunciationDictionary:
    """Decode speech whose words are known, align, and count what was heard for each word.

    Our reading of the paper's statistical pronunciation dictionary: a minimum-edit path between the words'
    usual form and the decode; a word's part of the path is what was heard; empty parts are dropped. With
    num_best above 1 several decodes of a recording share its count by their probability.

    Args:
        model: whose errors are learned.
        recordings: with texts.
        num_best: decodes of each recording.
        progress: see `Progress`.

    Raises:
        InputError: there is no recording, or one cannot be read.
    """
    return count_words(model, hear_words(model, recordings, num_best, progress))


def hear_words(
    model: CommandModel, recordings: Sequence[Recording], num_best: int = 1, progress: Progress | None = None
) -> list[list[HeardWord]]:
    """What was heard for the words of each recording: see `learn_dictionary`.

    Nothing for recordings with a word that the model cannot write; they are named in a warning.
    """
    if not recordings:
        raise InputError("there is no speech to learn from: give recordings with their texts")
    tell = progress or (lambda *_: None)
    found: list[list[HeardWord]] = []
    faults: list[str] = []
    for done, recording in enumerate(recordings):
        tell("listening to general speech", done, len(recordings))
        found.append([])
        words = normalize_text(recording.text).split()
        try:
            usual = [model.split(model.forms(word)[0]) for word in words]
        except InputError as error:
            faults.append(f"{recording.audio.name}: {error}")
            continue
        samples = recording.load(model.sample_rate)
        try:
            decodes = model.hear(samples, num_best)
        except InputError as error:  # too short for the model
            raise InputError(f"{recording.audio}: {error}") from error
        for heard in decodes:
            for word, part in zip(words, heard_words(usual, heard.units, " " in model.symbols), strict=True):
                if part:
                    found[-1].append(HeardWord(word, model.join(part), heard.weight))
    tell("listening to general speech", len(recordings), len(recordings))
    if not any(found):
        raise InputError(
            f"nothing was heard in {len(recordings):,} recordings: {listed(faults) or 'give speech'}"
        )
    if faults:
        warnings.warn(
            f"{len(faults):,} of {len(recordings):,} recordings left out: {listed(faults)}", stacklevel=2
        )
    return found


def count_words(model: CommandModel, heard: Iterable[Iterable[HeardWord]]) -> PronunciationDictionary:
    """The dictionary of what was heard in recordings."""
    counts: dict[str, dict[Form, float]] = defaultdict(lambda: defaultdict(float))
    for recording in heard:
        for one in recording:
            counts[one.word][one.form] += one.weight
    plain = {word: dict(forms) for word, forms in counts.items()}
    return PronunciationDictionary(model.name, model.units, model.symbols, model.digest, plain)


def unheard(dictionary: PronunciationDictionary, commands: Iterable[str]) -> list[str]:
    """Words of commands that the dictionary has no form of, in order."""
    words = dict.fromkeys(word for command in commands for word in command.split())
    return [word for word in words if not dictionary.variants(word, 1)]


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another place") from error


def read_json(path: Path, what: str, newest: int) -> dict[str, Any]:
    """A JSON file of ours.

    Raises:
        InputError: it cannot be read, is no such file, or is of another format.
    """
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
        found = saved["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no {what} that can be read ({error!r}): give one that modicum speech grammar wrote"
        ) from error
    if found != newest:
        raise InputError(
            f"{path} has format {found}, and this modicum reads {newest}: get a newer modicum, or make "
            "it again"
        )
    return dict(saved)
