"""Named: a task as its expression, "kind:setting=value,setting=value", and back from text."""

from __future__ import annotations

import types
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from modicum.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Named:
    """A frozen dataclass whose fields are the settings of a kind of task."""

    kind: str

    @property
    def name(self) -> str:
        """The expression: the kind and the settings that are not its defaults."""
        presets = self.presets()
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "kind" and value != presets.get(field.name, field.default):
                given.append(f"{field.name}={_quoted(value)}")
        return self.kind + (":" + ",".join(given) if given else "")

    def presets(self) -> dict[str, Any]:
        """The defaults of this kind that are not the class's."""
        return {}

    def check(self, name: str, least: float, most: float | None = None) -> None:
        """Refuse a number out of its range; None passes."""
        value = getattr(self, name)
        if isinstance(value, str) or value is None:
            return
        if not (value >= least and (most is None or value <= most)):
            limit = f"at least {least}" if most is None else f"{least} to {most}"
            raise InputError(f"{self.kind}: {name}={value} is out of range; give {limit}")

    def among(self, name: str, known: tuple[str, ...]) -> None:
        """Refuse a word that is not known."""
        value = getattr(self, name)
        if value not in known:
            raise InputError(f"{self.kind}: {name}={value!r} is unknown; give one of {', '.join(known)}")


def settings_of(cls: type[Named]) -> dict[str, Any]:
    """The names of a class's settings with their types."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.name != "kind"}


def read_value(kind: str, name: str, hint: Any, text: str) -> Any:
    """A setting's value from text, by the field's type.

    Raises:
        InputError: the text is no such value.
    """
    wanted = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if text.lower() == "none" and type(None) in wanted:
        return None
    if bool in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        if number in wanted:
            try:
                return number(text)
            except ValueError:
                pass
    if str in wanted:
        return text
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    what = " or ".join(names.get(one, "none") for one in wanted)
    raise InputError(f"{kind}: {name}={text!r} is not {what}")


def _quoted(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not any(mark in text for mark in ",\"'"):
        return text
    mark = "'" if '"' in text else '"'
    return f"{mark}{text}{mark}"
