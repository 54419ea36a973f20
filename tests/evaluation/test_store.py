"""The folder of results: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modicum
from modicum.errors import InputError
from modicum.evaluation.row import Cell, Row
from modicum.evaluation.store import Store, read_rows

CELL = Cell("modicum", "m", "keydiff", "64", "t", 100, "hidden", 512, 0, "float32", 4, 32, 1)
MODELS, SAMPLES = {"m float32": "abc"}, {"t": "012"}
GRID, SETTINGS = {"limit": 3}, {"stop_at_newline": False}


def row(index: int, output: str = "x") -> Row:
    return Row(
        cell=CELL,
        index=index,
        score=0.5,
        metric="has",
        output=output,
        answers=["a"],
        context_tokens=90,
        new_tokens=4,
        depth=None,
        held_bytes=10,
        context_bytes=10,
        peak_bytes=12,
        full_bytes=20,
        held_tokens=(3, 4),
        prefill_seconds=0.1,
        decode_seconds=0.2,
    )


ODD = "line\nbreak\r\u2028 \x85 \ud800 “quoted” \\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rows, the last of an odd text."""
    folder = tmp_path / "deep" / "out"
    with Store(folder) as store:
        store.admit(MODELS, SAMPLES, GRID, SETTINGS)
        for index, text in enumerate(["one", "two", ODD]):
            store.add(row(index, text))
    return folder


def test_rows_come_back_as_they_were(folder: Path) -> None:
    rows = read_rows(folder)
    assert rows == [row(0, "one"), row(1, "two"), row(2, ODD)]
    assert read_rows(folder / "rows.jsonl") == rows
    with Store(folder) as store:
        assert store.rows == rows
        assert [store.has(CELL, index) for index in range(4)] == [True, True, True, False]


def test_a_line_cut_anywhere_is_cut_off_and_run_again(folder: Path) -> None:
    path = folder / "rows.jsonl"
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(data)):
        path.write_bytes(data[:end])
        assert read_rows(folder) == [row(0, "one"), row(1, "two")]
        with Store(folder) as store:
            assert not store.has(CELL, 2)
            store.add(row(2, ODD))
        assert path.read_bytes() == data


def test_reading_changes_nothing(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    read_rows(folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["no json", "{}", "[]", '{"cell": {"odd": 1}}', ""])
def test_a_broken_line_is_named(folder: Path, line: str) -> None:
    path = folder / "rows.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(InputError, match="line 2 of"):
        read_rows(folder)
    with pytest.raises(InputError, match="line 2 of"), Store(folder):
        pass
    path.write_text("\n".join(lines))
    with Store(folder) as store:  # and the lock was let go
        assert len(store.rows) == 3


def test_a_sample_that_comes_twice_is_named(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(InputError, match="lines 2 and 4 of"):
        read_rows(folder)


def test_only_one_run_writes(folder: Path) -> None:
    with Store(folder):
        with pytest.raises(InputError, match="another run is writing"), Store(folder):
            pass
        assert len(read_rows(folder)) == 3  # reading is free
    with Store(folder):
        pass


def admit(folder: Path, **changed: Any) -> None:
    given = {"models": MODELS, "samples": SAMPLES, "grid": GRID, "settings": SETTINGS} | changed
    with Store(folder) as store:
        store.admit(**given)


def test_more_of_the_same_is_admitted_and_noted(folder: Path) -> None:
    admit(folder)
    admit(folder, grid={"limit": 9}, models=MODELS | {"n float32": "def"})
    admit(folder)
    known = json.loads((folder / "grid.json").read_text())
    assert known["grids"] == [{"limit": 3}, {"limit": 9}]
    assert known["models"] == {"m float32": "abc", "n float32": "def"}
    assert known["version"] == modicum.__version__


def test_results_are_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "grid.json").read_text()
    with pytest.raises(InputError, match=r"another model named m float32.*another --out"):
        admit(folder, models={"m float32": "other"})
    with pytest.raises(InputError, match="other samples of t: its data"):
        admit(folder, samples={"t": "345"})
    with pytest.raises(InputError, match="stop_at_newline"):
        admit(folder, settings={"stop_at_newline": True})
    monkeypatch.setattr(modicum, "__version__", "1.0.0")
    with pytest.raises(InputError, match=r"of modicum .*, this is 1\.0\.0"):
        admit(folder)
    monkeypatch.undo()
    assert (folder / "grid.json").read_text() == before
    admit(folder)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("1.2.3", "1.9.0", True),
        ("1.2.3", "2.0.0", False),
        ("0.1.0", "0.1.7", True),
        ("0.1.0", "0.2.0", False),
    ],
)
def test_versions_that_may_be_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool
) -> None:
    monkeypatch.setattr(modicum, "__version__", old)
    admit(tmp_path)
    monkeypatch.setattr(modicum, "__version__", new)
    if same:
        admit(tmp_path)
    else:
        with pytest.raises(InputError, match="another --out"):
            admit(tmp_path)


def test_a_folder_whose_settings_are_lost_or_broken_is_refused(folder: Path) -> None:
    for text in ("{", "[]", '{"format": 1}', '{"format": "1"}'):
        (folder / "grid.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot read .*grid\.json"):
            admit(folder)
    (folder / "grid.json").unlink()
    with pytest.raises(InputError, match=r"no grid\.json"):
        admit(folder)


def test_a_folder_of_a_later_format_is_refused(folder: Path) -> None:
    known = json.loads((folder / "grid.json").read_text()) | {"format": 3}
    (folder / "grid.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match="format 3"):
        admit(folder)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), Store(tmp_path / "file" / "out"):
        pass
    with pytest.raises(InputError, match="cannot read"):
        read_rows(tmp_path / "nowhere")
