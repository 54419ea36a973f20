"""Expression: tasks from text: "niah_multikey_1:keys=8,vt:hops=2,chains=2", "ruler"."""

from __future__ import annotations

import difflib
import re
from typing import Any

from modicum.errors import InputError
from modicum.tasks.chains import Chains
from modicum.tasks.frequent import CommonWords, FrequentWords
from modicum.tasks.gsm8k import Gsm8k
from modicum.tasks.longbench import LongBench, LongBench2
from modicum.tasks.named import Named, read_value, settings_of
from modicum.tasks.needle import NIAH, Needle
from modicum.tasks.rulerfile import RulerFile
from modicum.tasks.running import Recall, Text
from modicum.tasks.sample import Task

KINDS: dict[str, type[Named]] = {
    **dict.fromkeys(NIAH, Needle),
    "vt": Chains,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "ruler-file": RulerFile,
    "longbench": LongBench,
    "longbench-e": LongBench,
    "longbench-v2": LongBench2,
    "gsm8k": Gsm8k,
    "text": Text,
    "recall": Recall,
}
"""Every kind of task, in the order of documentation."""
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": (*NIAH, "vt", "cwe", "fwe"),
    "niah": tuple(NIAH),
}

_PARTS = re.compile(r"""(?:[^,"']|"[^"]*"|'[^']*')+""")
_SETTING = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)


def parse_task(text: str) -> list[Task]:
    """The tasks that a text names, in its order.

    Commas stand between tasks and between settings: "vt:hops=2,chains=2,cwe" is two tasks. A group such as
    "ruler" is all of its kinds; settings after it hold for each. A value with a comma is put in quotes.

    Raises:
        InputError: an unknown task or setting (with near ones), or a bad value.
    """
    tasks: list[Task] = []
    for name, settings in _split(text):
        for kind in GROUPS.get(name, (name,)):
            tasks += _make(kind, settings)
    return tasks


def _split(text: str) -> list[tuple[str, dict[str, str]]]:
    if not isinstance(text, str) or not text.strip(" ,"):
        raise InputError(f"a task is a name such as 'niah_single_1' or 'ruler', not {text!r}")
    found: list[tuple[str, dict[str, str]]] = []
    for part in _PARTS.findall(text):
        setting = part
        if not (match := _SETTING.fullmatch(part)):
            name, _, setting = part.partition(":")
            if not name.strip():
                raise InputError(f"cannot read the tasks {text!r}: {part!r} has no name before it")
            found.append((name.strip(), {}))
            if not setting.strip():
                continue
            match = _SETTING.fullmatch(setting)
        if not match or not found:
            raise InputError(
                f"cannot read the tasks {text!r}: {setting.strip()!r} should be setting=value, after a "
                "task's name and a colon"
            )
        key, value = match[1], match[2].strip()
        if key in found[-1][1]:
            raise InputError(f"cannot read the tasks {text!r}: {key} is set twice")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        found[-1][1][key] = value[1:-1] if quoted else value
    return found


def _make(kind: str, given: dict[str, str]) -> list[Task]:
    cls = KINDS.get(kind)
    if cls is None:
        near = difflib.get_close_matches(kind.lower(), [*KINDS, *GROUPS], n=3, cutoff=0.5)
        raise InputError(
            f"there is no task {kind!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join([*GROUPS, *KINDS])}")
        )
    known = settings_of(cls)
    typed: dict[str, Any] = {"kind": kind}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            raise InputError(
                f"{kind} has no setting {key!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}")
            )
        typed[key] = read_value(kind, key, known[key], value)
    made: Any = cls(**{**(NIAH[kind] if cls is Needle else {}), **typed})
    return list(made.expanded()) if isinstance(made, LongBench) else [made]
