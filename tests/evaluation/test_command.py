"""`modicum eval`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from modicum.cli import Commands
from modicum.cli.eval import duration, evaluate, numbers, split
from modicum.errors import InputError
from modicum.evaluation.store import read_rows
from modicum.evaluation.summary import summarise
from tests.tiny_model import TINY_MODEL

TASK = "niah_single_1:max_new_tokens=8"
SMALL = f"--model {TINY_MODEL} -p keydiff -b 48 -t {TASK} -l 330 -n 2 --recent 8".split()

app = typer.Typer(cls=Commands)
app.command("eval")(evaluate)
app.callback()(lambda: None)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "200"})


def test_rows_a_table_and_json(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    shown = call(*SMALL, "-o", out)
    assert shown.exit_code == 0, shown.output
    rows = read_rows(tmp_path / "out")
    assert [row.index for row in rows] == [0, 1]
    for text in (
        f"task {TASK}",
        "length 330",
        "policy keydiff",
        "budget 48",
        "chunk 512",
        "95 %",
        "peak",
        "0.0% (0.0 to 65.8)",
    ):
        assert text in " ".join(shown.stdout.split())
    told = call(*SMALL, "-o", out, "--json")
    assert told.stderr == ""
    value = json.loads(told.stdout)
    assert (value["out"], value["rows"]) == (out, 2)
    expected = json.loads(json.dumps([summary.to_dict() for summary in summarise(rows)]))
    assert value["cells"] == expected
    assert read_rows(tmp_path / "out") == rows


def test_values_between_commas_are_combined(tmp_path: Path) -> None:
    arguments = ["-p", "keydiff,snapkv(window=8,floor=True)", "-b", "48,50%,full", "-q", "hidden,seen"]
    tasks = f"{TASK},niah_single_2:max_new_tokens=4,keys=2"
    result = call(*SMALL, *arguments, "-t", tasks, "-l", "400,450", "-n", "1", "-o", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)["cells"]
    assert len(cells) == 2 * 2 * 2 * (2 * 2 + 1)
    assert {cell["length"] for cell in cells} == {400, 450}
    assert len({cell["task"] for cell in cells}) == 2
    assert {cell["policy"] for cell in cells} == {"full", "keydiff", "snapkv(window=8, floor=True)"}


def test_all_at_once(tmp_path: Path) -> None:
    result = call(*SMALL, "--chunk", "all", "-o", str(tmp_path))
    assert "chunk all" in " ".join(result.stdout.split())
    assert {row.cell.chunk for row in read_rows(tmp_path)} == {None}


def test_needles_are_hidden_in_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("The moon is made of green cheese. " * 50)
    hay = ["--haystack", str(tmp_path / "hay.txt"), "-n", "1"]
    result = call(*SMALL, *hay, "-t", "niah_single_2:max_new_tokens=8", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "hay.txt") in read_rows(tmp_path / "out")[0].cell.task
    assert "leave it out" in call(*SMALL, *hay, "-o", str(tmp_path / "other")).stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-t", "niah_singel_2"], "niah_single_2"),
        (["-p", "keydif"], "keydiff"),
        (["-b", "10"], "at least"),
        (["-b", "lots"], "25%"),
        (["-l", "4096"], "512 positions"),
        (["-l", "long"], "--length"),
        (["--chunk", "1,2"], "--chunk"),
        (["--question", "both"], "'hidden' or 'seen'"),
        (["--model", "referense"], "reference"),
        (["-n", "0"], "limit"),
        (["--haystack", "/nowhere", "-t", "niah_single_2"], "/nowhere"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_2(tmp_path: Path, more: list[str], says: str) -> None:
    result = call(*SMALL, *more, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    assert call(*SMALL, "-o", str(tmp_path)).exit_code == 0
    result = call(*SMALL, "--stop-at-newline", "-o", str(tmp_path))
    assert (result.exit_code, "another --out" in result.stderr) == (2, True)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = [*SMALL, "-n", "400", "-o", str(tmp_path)]
    code = (
        f"from tests.evaluation.test_command import app; app(['eval', *{arguments!r}], prog_name='modicum')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    path, end = tmp_path / "rows.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stdout == ""
    assert f"what was done is in {tmp_path}: run the same command again" in stderr
    assert "Traceback" not in stderr
    assert 0 < len(read_rows(tmp_path)) < 400


def test_values_are_split_at_commas_that_stand_between_them() -> None:
    cases: dict[str, list[str]] = {
        "a,b": ["a", "b"],
        " a , b ,": ["a", "b"],
        "snapkv(window=8,over=max),h2o": ["snapkv(window=8,over=max)", "h2o"],
        "caote(snapkv(window=8), rows=window),h2o": ["caote(snapkv(window=8), rows=window)", "h2o"],
        "vt:hops=2,chains=1,fwe": ["vt:hops=2,chains=1", "fwe"],
        'razor(heads="a,b"),x': ['razor(heads="a,b")', "x"],
        "": [],
    }
    for text, values in cases.items():
        assert split(text) == values


def test_numbers_and_durations() -> None:
    assert numbers("length", "1024, 2048") == [1024, 2048]
    for bad in ("", "1.5", "1,x"):
        with pytest.raises(InputError, match="--length"):
            numbers("length", bad)
    told: Any = [duration(seconds) for seconds in (3.4, 300, 7200)]
    assert told == ["3 s", "5 min", "2.0 h"]
