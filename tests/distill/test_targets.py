"""Targets recorded and read: what comes back, and what a kill, a full disk and damage leave."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.distill import (
    Essence,
    ProbabilityCode,
    SparseTargets,
    TargetsHeader,
    TargetsWriter,
    parse_rule,
)
from modicum.errors import InputError, TargetsError
from tests.bounds import unit_roundoff

CLASSES = 40


def posteriors(frames: int, seed: int = 0, classes: int = CLASSES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(frames, classes, generator=generator)).softmax(-1)


def header_of(rule: str = "topk=4", bits: int = 16, classes: int = CLASSES, **about: str) -> TargetsHeader:
    return TargetsHeader(classes, rule, bits, about=about)


def assert_read_back(found: Essence, expected: Essence, bits: int) -> None:
    assert torch.equal(found.counts, expected.counts)
    width = int(expected.counts.max())
    assert torch.equal(found.classes, expected.classes[:, :width])
    code, p = ProbabilityCode(bits), expected.probabilities[:, :width].double()
    bound = p.sqrt() / code.largest + 1 / (4 * code.largest**2)
    rounding = unit_roundoff(torch.float32) * found.probabilities.double()
    assert ((found.probabilities.double() - p).abs() <= bound * (1 + 1e-9) + rounding).all()


@given(
    rule=st.sampled_from(["topk=1", "topk=4", "threshold=0.05", "mass=0.9"]),
    bits=st.sampled_from([8, 16]),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shard_frames=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stretch_comes_back(
    rule: str,
    bits: int,
    sizes: list[int],
    shard_frames: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("targets")
    frames = posteriors(sum(sizes))
    with TargetsWriter(folder, header_of(rule, bits), shard_frames) as writer:
        for part in frames.split(sizes):
            writer.append(part)
        writer.finish()
    targets = SparseTargets(folder)
    targets.check_integrity()
    assert len(targets) == len(frames)
    start = data.draw(st.integers(0, len(frames) - 1))
    stop = data.draw(st.integers(start + 1, len(frames)))
    assert_read_back(targets.read(start, stop), parse_rule(rule).select(frames[start:stop]), bits)


@pytest.mark.parametrize(("classes", "index_nbytes"), [(2**16, 2), (2**16 + 1, 4)])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_frame_takes_its_indices_and_codes(
    classes: int, index_nbytes: int, bits: int, tmp_path: Path
) -> None:
    k, frames = 8, 300
    probabilities = torch.zeros(frames, classes)
    probabilities[:, -k:] = posteriors(frames, classes=k)
    with TargetsWriter(tmp_path, header_of(f"topk={k}", bits, classes)) as writer:
        writer.append(probabilities)
        writer.finish()
    targets = SparseTargets(tmp_path)
    found = targets.statistics
    overhead = 1500  # two headers
    assert 0 < found.nbytes - frames * k * (index_nbytes + bits // 8) < overhead
    assert found.nbytes == sum(f.stat().st_size for f in tmp_path.iterdir() if not f.name.startswith("."))
    assert found.dense_nbytes_per_frame == 2 * classes
    assert int(targets.read(0, frames).classes.max()) == classes - 1


def test_statistics_are_sums_over_frames(tmp_path: Path) -> None:
    frames = posteriors(50)
    with TargetsWriter(tmp_path, header_of("mass=0.9"), 7) as writer:
        for part in frames.split(5):
            writer.append(part)
        writer.finish()
    essence, found = parse_rule("mass=0.9").select(frames), SparseTargets(tmp_path).statistics
    assert found.frames == 50
    assert found.kept_classes == float(essence.counts.sum()) / 50
    assert found.captured_mass == pytest.approx(float(essence.mass.mean()), rel=1e-12)
    assert found.least_mass == float(essence.mass.min())


def test_a_recording_that_is_not_finished_is_not_read(tmp_path: Path) -> None:
    with TargetsWriter(tmp_path, header_of()) as writer:
        writer.append(posteriors(5))
    with pytest.raises(TargetsError, match="is not complete: run the command that records it again"):
        SparseTargets(tmp_path)


def test_an_interrupt_loses_nothing_and_a_second_run_goes_on(tmp_path: Path) -> None:
    frames = posteriors(30)

    def stopped() -> None:
        with TargetsWriter(tmp_path, header_of(), 8) as writer:
            for part in frames[:15].split(5):
                writer.append(part)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with TargetsWriter(tmp_path, header_of(), 8) as writer:
        assert writer.num_frames == 15
        writer.append(frames[15:])
        writer.finish()
    assert_read_back(SparseTargets(tmp_path).read(0, 30), parse_rule("topk=4").select(frames), 16)
    with TargetsWriter(tmp_path, header_of()) as writer:
        assert writer.is_complete
        with pytest.raises(InputError, match="is complete: give another folder"):
            writer.append(frames)


@pytest.mark.parametrize("rule", ["topk=4", "mass=0.9"])
def test_a_run_that_stopped_before_the_end_was_marked_has_nothing_to_add(rule: str, tmp_path: Path) -> None:
    frames, header = posteriors(12), header_of(rule)
    with TargetsWriter(tmp_path, header) as writer:
        writer.append(frames)
    with TargetsWriter(tmp_path, header) as writer:
        writer.append(frames[writer.num_frames :])
        writer.finish()
    targets = SparseTargets(tmp_path)
    assert len(targets) == 12
    assert_read_back(targets.read(0, 12), parse_rule(rule).select(frames), 16)


_ENDLESS = """
import sys
from tests.distill.test_targets import TargetsWriter, header_of, posteriors
with TargetsWriter(sys.argv[1], header_of(), 10) as writer:
    for part in posteriors(100_000).split(3):
        writer.append(part)
        print(writer.num_frames, flush=True)
"""


def test_a_kill_loses_at_most_the_shard_in_hand(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = 0
    while told < 50:
        told = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    told = int(rest[-1]) if rest else told
    frames = posteriors(100_000)
    with TargetsWriter(tmp_path, header_of(), 10) as writer:
        # Each shard has 12 frames, the first multiple of 3 from 10 on.
        assert told - 12 <= writer.num_frames <= told + 3
        kept = writer.num_frames
        writer.append(frames[kept : kept + 5])
        writer.finish()
    assert_read_back(
        SparseTargets(tmp_path).read(0, kept + 5), parse_rule("topk=4").select(frames[: kept + 5]), 16
    )


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path: Path) -> None:
    frames = posteriors(3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def until_full() -> None:
        with TargetsWriter(tmp_path, header_of(), 100) as writer:
            writer.append(frames[:100])
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
            writer.append(frames[100:])

    try:
        with pytest.raises(
            TargetsError, match="make room and run the same again, which goes on from the 100"
        ):
            until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(f.name for f in tmp_path.iterdir()) == [".lock", "shard-00000.safetensors", "targets.json"]
    with TargetsWriter(tmp_path, header_of(), 100) as writer:
        assert writer.num_frames == 100
        writer.append(frames[100:])
        writer.finish()
    assert_read_back(SparseTargets(tmp_path).read(0, 3000), parse_rule("topk=4").select(frames), 16)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (header_of("topk=5", teacher="a", text="t"), "another rule of what is kept, topk=4 and not topk=5"),
        (header_of(bits=8, teacher="a", text="t"), "another bits of a probability, 16 and not 8"),
        (header_of(classes=41, teacher="a", text="t"), "another number of classes, 40 and not 41"),
        (header_of(teacher="b", text="t"), "another teacher, a and not b"),
        (header_of(teacher="a", text="u"), "another text, t and not u"),
    ],
)
def test_another_recording_is_refused(other: TargetsHeader, message: str, tmp_path: Path) -> None:
    with TargetsWriter(tmp_path, header_of(teacher="a", text="t")) as writer:
        writer.append(posteriors(5))
    with pytest.raises(TargetsError, match=message), TargetsWriter(tmp_path, other):
        pass


def test_damage_is_found(tmp_path: Path) -> None:
    with TargetsWriter(tmp_path, header_of(), 10) as writer:
        for part in posteriors(20).split(10):
            writer.append(part)
        writer.finish()
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TargetsError, match="was altered or is damaged"):
        SparseTargets(tmp_path).check_integrity()
    shard.write_bytes(whole[:-10])
    with pytest.raises(TargetsError, match="remove it and those of higher numbers"):
        SparseTargets(tmp_path)
    shard.unlink()
    with pytest.raises(TargetsError, match="shard-00001"):
        SparseTargets(tmp_path)
    shard.write_bytes(whole.replace(header_of().digest.encode(), b"0" * 16))
    with pytest.raises(TargetsError, match="is of another recording"):
        SparseTargets(tmp_path)
    shard.write_bytes(whole)
    told = json.loads((tmp_path / "targets.json").read_text())
    for change, message in (
        ({"format": 2}, "has format 2, this modicum reads 1"),
        ({"num_frames": 15}, "holds 20 frames and not 15"),
        ({"header": {}}, "cannot be read"),
    ):
        (tmp_path / "targets.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(TargetsError, match=message):
            SparseTargets(tmp_path)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TargetsError, match=r"holds no targets, as it has no targets\.json"):
        SparseTargets(tmp_path)
    with pytest.raises(InputError, match="keeps more classes than the 40"):
        TargetsWriter(tmp_path / "new", header_of("topk=41"))
    assert not (tmp_path / "new").exists()
    with TargetsWriter(tmp_path / "one", header_of()) as writer:
        with pytest.raises(InputError, match="of 39 classes, the recording of 40"):
            writer.append(posteriors(3)[:, 1:])
        with (
            pytest.raises(InputError, match="another process is recording"),
            TargetsWriter(tmp_path / "one", header_of()),
        ):
            pass
        writer.append(posteriors(3))
        writer.finish()
    targets = SparseTargets(tmp_path / "one")
    for start, stop in ((0, 4), (-1, 2), (2, 2)):
        with pytest.raises(InputError, match="not within the 3 that are recorded"):
            targets.read(start, stop)
    (tmp_path / "file.txt").write_text("some")
    with (
        pytest.raises(InputError, match=r"holds file\.txt and no recording"),
        TargetsWriter(tmp_path, header_of()),
    ):
        pass
    with pytest.raises(InputError, match="give a folder that can be written"):
        TargetsWriter(tmp_path / "file.txt", header_of()).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(InputError, match="give a folder that can be written"),
        TargetsWriter(tmp_path / "in", header_of()),
    ):
        pass
