"""Export: a grammar as files that other programs run: pocketsphinx, and sherpa-onnx's keyword spotter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from modicum.errors import InputError
from modicum.speech.grammar.command_model import Form
from modicum.speech.grammar.grammar_file import Grammar
from modicum.speech.grammar.letter_to_sound import letter_to_sound
from modicum.speech.grammar.sphinx_model import SphinxModel
from modicum.whole_file import write_whole

JSGF, DICTIONARY, KEYWORDS = "grammar.jsgf", "grammar.dict", "keywords.txt"

_VARIANT = re.compile(r"__\d+$")
_SPACE = "▁"
"""The space among the tokens that `modicum speech export` writes."""


@dataclass(frozen=True)
class Exported:
    """The files that were written."""

    jsgf: Path
    dictionary: Path
    keywords: Path | None
    """None where the model writes no letters."""


def export_grammar(grammar: Grammar, folder: str | Path) -> Exported:
    """Write `grammar.jsgf` and `grammar.dict` for pocketsphinx and, for letters, `keywords.txt`.

    The JSGF has a rule for each command, with its expressions as alternatives. A form of a word that is not
    its usual one is a word of its own there, such as `alexa__2`: `command_of` makes the command's words of
    it.
    Phones are ARPAbet. Forms in letters get the phones of pocketsphinx's dictionary where it has them, else a
    guess by rules (`letter_to_sound`): they are errors of another model, so search with "pocketsphinx" for
    alternatives that fit pocketsphinx.

    Raises:
        InputError: the grammar is in phones of another alphabet, a form has no phones, pocketsphinx is not
            installed, or a file cannot be written.
    """
    if grammar.units == "phones":
        raise InputError(
            f"the grammar is in phones of {grammar.model}, and pocketsphinx has others: search with a "
            "recognizer of letters, or with pocketsphinx"
        )
    folder = Path(folder)
    words = _Words(SphinxModel() if grammar.units == "graphemes" else None)
    rules, names = [], []
    for index, command in enumerate(grammar.commands):
        said = command.split()
        lines = dict.fromkeys(
            " ".join(words.name(word, form) for word, form in zip(said, one.forms, strict=True))
            for one in grammar.of(index)
        )
        names.append(f"<command_{index + 1}>")
        rules.append(f"// {command}\n{names[-1]} = {' | '.join(lines)};\n")
    jsgf = "#JSGF V1.0 UTF-8 en;\n\ngrammar commands;\n\n" + f"public <command> = {' | '.join(names)};\n\n"
    jsgf += "\n".join(rules)
    dictionary = "".join(f"{name} {phones}\n" for name, phones in sorted(words.phones.items()))
    _write(folder / JSGF, jsgf)
    _write(folder / DICTIONARY, dictionary)
    keywords = None
    if grammar.units == "graphemes":
        keywords = folder / KEYWORDS
        names = [command.replace(" ", "_") for command in grammar.commands]
        spotted = dict.fromkeys(f"{_tokens(one.text)} @{names[one.command]}" for one in grammar.expressions)
        _write(keywords, "\n".join(spotted) + "\n")
    return Exported(folder / JSGF, folder / DICTIONARY, keywords)


def command_of(hypothesis: str) -> str:
    """The command's words of what pocketsphinx wrote with an exported grammar."""
    return " ".join(_VARIANT.sub("", word) for word in hypothesis.split())


class _Words:
    """Words of the JSGF, each with its phones."""

    def __init__(self, sphinx: SphinxModel | None) -> None:
        self._sphinx = sphinx
        self._names: dict[tuple[str, str], str] = {}
        self.phones: dict[str, str] = {}

    def name(self, word: str, form: Form) -> str:
        """The name of a form of a word; of forms that sound alike the same."""
        phones = self._phones(form)
        if (word, phones) not in self._names:
            count = sum(known == word for known, _ in self._names)
            if not re.fullmatch(r"[\w'.-]+", word):
                raise InputError(f"{word!r} cannot be a word of a JSGF grammar: spell it with letters only")
            self._names[word, phones] = word if not count else f"{word}__{count + 1}"
            self.phones[self._names[word, phones]] = phones
        return self._names[word, phones]

    def _phones(self, form: Form) -> str:
        if self._sphinx is None:
            return form
        parts = []
        for spelling in form.split():
            known = self._sphinx.pronunciations(spelling)
            parts.append(known[0] if known else " ".join(letter_to_sound(spelling)))
        phones = " ".join(part for part in parts if part)
        if not phones:
            raise InputError(f"no letter of {form!r} has an English sound: leave this expression out")
        return phones


def _tokens(text: str) -> str:
    return " ".join(_SPACE if letter == " " else letter for letter in text)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another folder") from error
