"""Tasks from text and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from modicum.errors import InputError
from modicum.tasks import KINDS, METRICS, parse_task
from modicum.tasks.chains import Chains
from modicum.tasks.named import settings_of
from modicum.tasks.needle import NIAH, Needle
from modicum.tasks.running import Recall
from tests.tasks.counting import only


def test_settings_and_tasks_are_told_apart() -> None:
    first, second, third = parse_task(" vt:hops=2, chains=3 ,cwe, niah_multikey_1:keys=8,depth=0.5")
    assert first == Chains(hops=2, chains=3)
    assert second.name == "cwe"
    assert third == Needle(kind="niah_multikey_1", keys=8, depth=0.5)


def test_a_groups_settings_hold_for_each() -> None:
    tasks: list[Any] = list(parse_task("niah:depth=0.25,max_new_tokens=16,vt"))
    assert len(tasks) == 9
    assert all(task.depth == 0.25 and task.max_new_tokens == 16 for task in tasks[:8])
    assert tasks[7].queries == 4


@pytest.mark.parametrize(
    "text",
    [
        "niah_single_1",
        "niah_multikey_1:keys=8",
        "niah_multikey_3:hay=essay,key=words",
        "niah_single_2:depth=spread,haystack=a/b c.txt",
        'niah_single_2:haystack="a,b.txt"',
        "niah_single_2:haystack='a\"b'",
        "vt:chains=2,hops=1,shots=0",
        "cwe:repeats=5",
        "fwe:alpha=1.5,vocabulary=30",
        "ruler-file:path=x.jsonl,max_new_tokens=9",
        "ruler-file:dataset=some/ruler,config=4096,task=vt",
        "longbench:task=qasper",
        "longbench-e:path=x.jsonl",
        "longbench-v2:size=short",
        "gsm8k:shots=100",
        "text:stride=5",
        "recall:passage=30,cue=4,depth=0.1",
    ],
)
def test_a_name_is_read_back_as_the_same_task(text: str) -> None:
    task = only(text)
    assert only(task.name) == task
    assert len(task.name) == len(text)  # the settings that were given, no more


def test_defaults_given_are_left_out_of_the_name() -> None:
    assert only("niah_multikey_1:keys=4,depth=none").name == "niah_multikey_1"
    assert only("niah_multikey_1:keys=1").name == "niah_multikey_1:keys=1"
    assert only("recall").name == "recall"
    assert only("recall:depth=0") == Recall(depth=0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("niah_singel_1", "did you mean niah_single_1"),
        ("rular", "did you mean ruler"),
        ("zzzz", "known are ruler, niah, niah_single_1"),
        ("", "a task is a name"),
        (" , ", "a task is a name"),
        ("vt:hop=2", "no setting 'hop'; did you mean hops"),
        ("vt:zzz=2", "it has max_new_tokens, chains"),
        ("vt:kind=cwe", "no setting 'kind'"),
        ("vt:hops=two", "hops='two' is not a whole number"),
        ("vt:hops=2.5", "is not a whole number"),
        ("vt:hops=0", "hops=0 is out of range; give at least 1"),
        ("vt:hops=2,hops=3", "set twice"),
        ("vt:hops", "should be setting=value"),
        ("hops=2", "should be setting=value"),
        (":hops=2", "no name"),
        ("vt:shots=2", "give 0 to 1"),
        ("vt:hay=needle", "give one of noise, essay"),
        ("niah_single_1:depth=1.5", "depth=1.5 is out of range; give 0 to 1"),
        ("niah_single_1:depth=nan", "out of range"),
        ("niah_single_1:depth=deep", "give 0 to 1, or spread"),
        ("niah_single_1:key=letters", "give one of words, numbers, uuids"),
        ("fwe:alpha=1", "alpha=1.0 is out of range"),
        ("recall:cue=64", "give 1 to 63"),
        ("text:stride=0", "at least 1"),
        ("ruler-file", "give either path"),
        ("ruler-file:path=a,dataset=b", "give either path"),
        ("longbench:task=qasparr", "give one of narrativeqa"),
        ("longbench-e:task=musique", "give one of qasper"),
    ],
)
def test_what_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_task(text)


def test_all_of_longbench() -> None:
    assert len(parse_task("longbench")) == 21
    assert [task.name for task in parse_task("longbench-e")][:2] == [
        "longbench-e:task=qasper",
        "longbench-e:task=multifieldqa_en",
    ]
    assert len(parse_task("longbench-e")) == 13


def test_every_kind_documents_its_settings() -> None:
    for cls in set(KINDS.values()):
        assert cls.__doc__
        assert "(" not in cls.__doc__.split("\n")[0][:20]  # not the signature that dataclass writes


def test_the_page_lists_every_task_setting_and_metric() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    shared = {"path", "dataset", "config", "split", "max_new_tokens"}
    assert all(f"`{name}" in page for name in shared)
    tables, metrics = page[page.index("## Generated") :].split("## Metrics")
    assert re.findall(r"^\| `([a-z0-9_-]+)` \|", tables, re.MULTILINE) == list(KINDS)
    for kind, cls in KINDS.items():
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", tables, re.MULTILINE)
        told = dict(re.findall(r"`(\w+)=([^`\s]+)`", row))
        known = settings_of(cls)
        assert set(told) <= set(known), kind
        if kind not in NIAH:
            assert set(known) - shared <= set(told) | {"path"}, kind
        needed = {"path": "x.jsonl"} if kind == "ruler-file" else {}
        for key, value in told.items():
            default = getattr(_first(kind, needed), key)
            assert (value == "none") if default is None else (value == str(default).lower()), (kind, key)
    names = [name for line in metrics.splitlines() for name in line.split("|")[1:2]]
    assert set(re.findall(r"`(\w+)`", " ".join(names))) == set(METRICS)


def _first(kind: str, given: dict[str, str]) -> Any:
    """A task of a kind with its defaults."""
    cls: Any = KINDS[kind]
    return cls(kind=kind, **given, **NIAH.get(kind, {}))
