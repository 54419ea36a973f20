"""Tables of block times: measured, gone on with, exported, imported, refused."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modicum.errors import InputError, ModelError
from modicum.measure.block_table import (
    EMPTY,
    BlockTable,
    TimedBlock,
    device_name,
    export_blocks,
    import_times,
    measure_blocks,
    runtime_name,
)
from modicum.measure.runtimes import RUNTIMES, Runtime
from modicum.measure.timing import Spread, TimingSettings

QUICK = TimingSettings(3, 1e-4)


class Waits(nn.Module):
    """Takes a known share of the processor's time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        return inputs


def blocks() -> list[TimedBlock]:
    return [
        TimedBlock("1x2x2/short", lambda: Waits(0.002), (1, 2, 2)),
        TimedBlock("1x2x2/long", lambda: Waits(0.006), (1, 2, 2)),
    ]


def test_times_are_measured_and_add_up(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = measure_blocks(blocks(), Runtime(), path, QUICK)
    assert set(table.seconds) == {EMPTY, "1x2x2/short", "1x2x2/long"}
    # A wait ends no earlier, and what a call costs by itself is taken off.
    assert table.seconds["1x2x2/short"].low >= 0.002
    assert table["1x2x2/long"] > table["1x2x2/short"] > 0
    assert table.total(["1x2x2/short", "1x2x2/long"]) == pytest.approx(
        table.seconds[EMPTY].median + table["1x2x2/short"] + table["1x2x2/long"]
    )
    assert BlockTable.load(path) == table
    assert (table.device, table.runtime) == (device_name(Runtime()), "torch, 1 thread, batch 1")


def test_a_stopped_measurement_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first = measure_blocks(blocks()[:1], Runtime(), path, QUICK)
    made: list[str] = []

    def built(block: TimedBlock) -> TimedBlock:
        return TimedBlock(block.key, lambda: made.append(block.key) or block.build(), block.shape)  # type: ignore[func-returns-value]

    found = measure_blocks([built(b) for b in blocks()], Runtime(), path, QUICK)
    assert made == ["1x2x2/long"]
    assert found.seconds["1x2x2/short"] == first.seconds["1x2x2/short"]
    with pytest.raises(InputError, match="give another file"):
        measure_blocks(blocks(), Runtime(threads=2), path, QUICK)


def test_a_block_that_the_table_lacks_is_named(tmp_path: Path) -> None:
    table = BlockTable("phone", "none", {"a": Spread(1.0, 1.0, 1.0)})
    with pytest.raises(InputError, match=r"table of phone has no time for the block 'b' .*modicum measure"):
        table.total(["a", "b"])
    assert table.missing(["a", "b", "b"]) == ["b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no table of block times"),
        ('{"format": 9}', "has the format 9"),
        ('{"format": 1, "device": "d", "runtime": "r", "seconds": {"a": {"median": 1}}}', "is no table"),
        (
            '{"format": 1, "device": "d", "runtime": "r", "seconds": '
            '{"a": {"median": -1, "low": 1, "high": 1}}}',
            "the time of 'a' is -1",
        ),
        (
            '{"format": 1, "device": "d", "runtime": "r", "seconds": '
            '{"a": {"median": 1, "low": "x", "high": 1}}}',
            "the time of 'a' is x",
        ),
        ("[" * 100_000, "is no table of block times"),
    ],
)
def test_damaged_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        BlockTable.load(path)
    with pytest.raises(InputError, match="is no table"):
        BlockTable.load(tmp_path / "none.json")


def test_blocks_go_to_a_device_and_times_come_back(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime")
    pytest.importorskip("onnx", reason="needs onnx and onnxruntime")
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    path = export_blocks([TimedBlock("2x5x5-3x3x3/conv", lambda: conv, (2, 5, 5))], tmp_path / "blocks")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [EMPTY, "2x5x5-3x3x3/conv"]
    session = onnxruntime.InferenceSession(str(tmp_path / "blocks" / rows[1]["file"]))
    inputs = torch.randn(1, 2, 5, 5)
    (found,) = session.run(None, {"x": inputs.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), conv(inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="has no times"):
        import_times(path, "phone")
    path.write_text("key,file,milliseconds\nempty,0.onnx,0.5\na,1.onnx,2.5\nb,2.onnx,\n")
    table = import_times(path, "phone")
    assert table["a"] == pytest.approx(0.002)
    assert table.missing(["a", "b"]) == ["b"]
    table.save(tmp_path / "phone.json")
    assert BlockTable.load(tmp_path / "phone.json") == table
    for text, message in (
        ("key,milliseconds\na,fast\n", "time of 'a' is nan"),
        ("key,milliseconds\na,0\n", "time of 'a' is 0"),
        ("block,time\na,1\n", "no columns key and milliseconds"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            import_times(path, "phone")
    with pytest.raises(InputError, match="cannot be read"):
        import_times(tmp_path / "none.csv", "phone")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        table.save(tmp_path / "folder.json")
    assert not list(tmp_path.glob(".*"))  # nothing half-written


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_runs_a_block(name: str) -> None:
    if name != "torch":
        pytest.importorskip("onnx", reason="needs onnx and onnxruntime")
        pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime")
    runtime = Runtime(name, batch=2)  # type: ignore[arg-type]
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    run = runtime.prepare(block, (8, 6, 6))
    assert run() is not None
    assert runtime_name(runtime) == f"{name}, 1 thread, batch 2"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch, onnxruntime, onnxruntime-int8"):
        Runtime("tensorrt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threads is 0: give 1 or more"):
        Runtime(threads=0)
    pytest.importorskip("onnx", reason="needs onnx")

    class Odd(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        export_blocks([TimedBlock("odd", Odd, (1, 1, 1))], tmp_path)
