"""Grammar file: commands with their expressions and threshold, as JSON."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.errors import InputError, ModelError
from modicum.speech.grammar.candidates import Expression
from modicum.speech.grammar.command_model import CommandModel
from modicum.speech.grammar.dictionary import read_json, write_json

_FORMAT = 1


@dataclass(frozen=True)
class Grammar:
    """What a device listens for.

    Attributes:
        model: name of the acoustic model.
        units: what forms are written in.
        symbols: all that a form may have.
        digest: the model's.
        commands: texts.
        expressions: the original ones first.
        num_original: how many those are.
        threshold: of the confidence.
        original_threshold: that of the original grammar at the same rate of false alarms.
        about: how it was made, as JSON takes it.
    """

    model: str
    units: str
    symbols: tuple[str, ...]
    digest: str
    commands: tuple[str, ...]
    expressions: tuple[Expression, ...]
    num_original: int
    threshold: float
    original_threshold: float
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def owners(self) -> list[int]:
        """The command of each expression."""
        return [one.command for one in self.expressions]

    def of(self, command: int) -> list[Expression]:
        """The expressions of a command, the original ones first."""
        return [one for one in self.expressions if one.command == command]

    def check(self, model: CommandModel) -> None:
        """Raise unless the model writes the same units; warn if it is another one.

        Raises:
            ModelError: it does not.
        """
        if (self.units, self.symbols) != (model.units, model.symbols):
            raise ModelError(
                f"the grammar is for {self.model}, which writes {len(self.symbols)} {self.units}, and "
                f"{model.name} writes {len(model.symbols)} {model.units}: give the model that it was made "
                "with, or search again"
            )
        if self.digest != model.digest:
            warnings.warn(
                f"the grammar was made with {self.model} ({self.digest}) and not with {model.name} "
                f"({model.digest}): its expressions and threshold are those of another model's errors",
                stacklevel=2,
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        expressions = [
            {"command": one.command, "forms": list(one.forms), "probability": one.probability}
            for one in self.expressions
        ]
        write_json(
            Path(path),
            {
                "format": _FORMAT,
                "model": self.model,
                "units": self.units,
                "symbols": list(self.symbols),
                "digest": self.digest,
                "commands": list(self.commands),
                "expressions": expressions,
                "num_original": self.num_original,
                "threshold": self.threshold,
                "original_threshold": self.original_threshold,
                "about": dict(self.about),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Grammar:
        """As `save` wrote it.

        Raises:
            InputError: it cannot be read, is something else, or is of a newer format.
        """
        saved = read_json(Path(path), "grammar", _FORMAT)
        try:
            commands = tuple(map(str, saved["commands"]))
            expressions = tuple(
                Expression(int(one["command"]), tuple(map(str, one["forms"])), float(one["probability"]))
                for one in saved["expressions"]
            )
            if not all(0 <= one.command < len(commands) for one in expressions):
                raise ValueError("an expression is of no command")
            num_original = int(saved["num_original"])
            if not 0 < num_original <= len(expressions):
                raise ValueError(f"{num_original} of {len(expressions)} expressions are original")
            return cls(
                str(saved["model"]),
                str(saved["units"]),
                tuple(map(str, saved["symbols"])),
                str(saved["digest"]),
                commands,
                expressions,
                num_original,
                float(saved["threshold"]),
                float(saved["original_threshold"]),
                dict(saved["about"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no grammar ({error!r}): search again") from error
