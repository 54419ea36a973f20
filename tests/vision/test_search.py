"""The whole way from a folder of images to networks, and its commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError
from modicum.measure.block_table import BlockTable
from modicum.measure.runtimes import Runtime
from modicum.search.batchnorm import reset_statistics
from modicum.search.blockwise import BlockwiseSettings
from modicum.search.latency import block_key, check_latency, ends_keys, network_seconds, timed_blocks
from modicum.search.library import BlockLibrary
from modicum.vision.recipe import ImageRecipe
from modicum.vision.reference import ReferenceSettings
from modicum.vision.saved import VisionNetwork
from modicum.vision.search import VisionSearch, evenly_spaced, search
from modicum.vision.search_images import SearchImages
from modicum.vision.settings import VisionSearchSettings
from modicum.vision.training import accuracy, statistics_batches
from tests.vision.pictures import encoded, image_set, pixels, write_folder

pytest.importorskip("scipy", reason="needs scipy: pip install 'modicum[search]'")
pytest.importorskip("PIL", reason="needs pillow: pip install 'modicum[vision]'")

REFERENCE = ReferenceSettings("residual", (16, 16), (2, 2), depth=1, stem_channels=8, size=16)
SETTINGS = VisionSearchSettings(
    reference=REFERENCE,
    recipe=ImageRecipe(epochs=4, batch=16, learning_rate=1e-2, shift=2),
    space="tiny",
    blockwise=BlockwiseSettings(epochs=2, batch=16),
    samples=6,
    sample_epochs=1,
    winners=2,
    winner_epochs=1,
)


def pictures() -> SearchImages:
    return SearchImages(image_set(96), image_set(48, seed=1), image_set(48, seed=2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("search")
    search(pictures(), out, SETTINGS)
    return out


def test_a_search_gives_a_front_and_saved_networks(found: Path) -> None:
    told = json.loads((found / "search.json").read_text())
    assert told["num_networks"] == 5**2
    assert told["images"] == [96, 48, 48]
    front = told["front"]
    times, predicted = ([one[key] for one in front] for key in ("milliseconds", "predicted"))
    assert times == sorted(set(times))
    assert predicted == sorted(set(predicted))
    assert len(told["samples"]) == 6
    saved = [one for one in front if one["folder"]]
    assert len(saved) == min(2, len(front))
    for one in saved:
        network = VisionNetwork.load(found / one["folder"])
        assert one["test"] == accuracy(network.network, pictures().test)
        assert one["parameters"] == sum(p.numel() for p in network.network.parameters())
        assert [variant.name for variant in network.blocks] == one["variants"]
    assert told["reference"]["predicted"] >= max(predicted) - 1e-9 or told["kendall_tau"] is not None
    assert (found / "front.png").stat().st_size > 5_000
    assert not (found / "state").exists()
    assert not list(found.rglob("*.part*"))


def test_a_second_run_trains_nothing_and_finds_the_same(found: Path) -> None:
    before = json.loads((found / "search.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in found.rglob("*.safetensors")}
    told: set[str] = set()
    report = search(pictures(), found, SETTINGS, progress=lambda doing, done, total: told.add(doing))
    again = json.loads(json.dumps(report.to_dict()))
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }
    assert {path: path.stat().st_mtime_ns for path in found.rglob("*.safetensors")} == stamps
    assert not any(doing.startswith("training the") for doing in told)


def test_the_time_of_a_step_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = VisionSearch(pictures(), tmp_path, SETTINGS)
    clock = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("modicum.vision.search.time.perf_counter", lambda: next(clock))
    with run._timed("winners"), run._timed("library"):
        pass
    with run._timed("library"):
        pass
    assert run.seconds == {"winners": 10.0 - 2.0, "library": 2.0 + 1.0}


def test_evolution_finds_the_front_of_a_small_space(found: Path) -> None:
    exact = VisionSearch(pictures(), found, replace(SETTINGS, front_points=200)).front()
    evolved = VisionSearch(pictures(), found, replace(SETTINGS, method="nsga2")).front()
    assert [one.variants for one in evolved] == [one.variants for one in exact]


def test_other_images_or_recipes_are_refused(found: Path) -> None:
    other = replace(pictures(), train=image_set(93))
    with pytest.raises(InputError, match="other images, another reference or another recipe"):
        search(other, found, SETTINGS)
    with pytest.raises(InputError, match="another recipe"):
        search(pictures(), found, replace(SETTINGS, recipe=replace(SETTINGS.recipe, epochs=5)))


def test_a_table_of_another_device_changes_the_front_or_lacks_a_block(found: Path, tmp_path: Path) -> None:
    run = VisionSearch(pictures(), found, SETTINGS)
    table = BlockTable.load(found / "table.json")
    small = next(v for v in run.space.variants[0] if v.name.startswith("k3e2d1"))
    for number in range(2):
        pick = run.space.variants[number].index(small)
        key = block_key(run.space, number, pick)
        # A device on which the smallest variant is slow.
        table.seconds[key] = type(table.seconds[key])(9.0, 9.0, 9.0)
    table.device = "odd"
    table.save(tmp_path / "odd.json")
    front = VisionSearch(pictures(), found, replace(SETTINGS, table=tmp_path / "odd.json")).front()
    assert all(small.name not in one.variants for one in front)
    del table.seconds[key]
    table.save(tmp_path / "odd.json")
    with pytest.raises(InputError, match="table of odd has no time for the block"):
        VisionSearch(pictures(), found, replace(SETTINGS, table=tmp_path / "odd.json")).front()


def test_sums_of_block_times_are_checked_end_to_end(found: Path) -> None:
    run = VisionSearch(pictures(), found, SETTINGS)
    keys = {block.key for block in timed_blocks(run.space)}
    assert len(keys) == 2 + 5 + 5
    assert set(ends_keys(run.space)) <= keys
    check = check_latency(run.space, run.table, Runtime(), [(0, 0), (1, 2), (4, 4)])
    assert check.predicted[0] == network_seconds(run.space, run.table, (0, 0))
    assert min(check.measured) > 0
    assert -1 <= check.kendall_tau <= 1


def test_an_assembled_network_has_the_statistics_of_its_own_blocks(found: Path) -> None:
    run = VisionSearch(pictures(), found, SETTINGS)
    picks = (1, 2)
    network = run.assembled(picks)
    expected = run.space.assemble(picks, run.library.weights(picks))
    reset_statistics(expected, statistics_batches(run.images.train, SETTINGS.recipe.batch))
    raw = run.space.assemble(picks, run.library.weights(picks)).state_dict()
    moved = 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
        moved += "running_var" in name and not torch.equal(value, raw[name])
    assert moved > 0


@pytest.mark.parametrize("kind", ["mobilenetv2", "vit"])
def test_every_kind_of_reference_is_searched(kind: str, tmp_path: Path) -> None:
    reference = ReferenceSettings(kind, (16, 16), (1, 1), depth=2, stem_channels=8, stem_stride=4, size=16)
    short = replace(
        SETTINGS,
        reference=reference,
        recipe=replace(SETTINGS.recipe, epochs=1),
        blockwise=replace(SETTINGS.blockwise, epochs=1),
        samples=4,
        winners=1,
    )
    report = search(pictures(), tmp_path, short)
    winner = next(one for one in report.to_dict()["front"] if one["folder"])
    network = VisionNetwork.load(tmp_path / winner["folder"])
    assert winner["test"] == accuracy(network.network, pictures().test)
    assert [variant.name for variant in network.blocks] == list(winner["variants"])


def test_untrained_variants_are_predicted_and_trained_when_they_win(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        space="small",
        variants_per_block=6,
        blockwise=BlockwiseSettings(batch=16),
        with_reference_blocks=False,
    )
    report = search(pictures(), tmp_path, settings)
    assert report.num_networks == 16**2
    assert report.reference.milliseconds is None
    run = VisionSearch(pictures(), tmp_path, settings)
    assert [len(own) for own in run.errors] == [16, 16]
    trained = {(number, name) for number, name in run.library.entries}
    assert len(trained) == 12
    everything = BlockLibrary.open(tmp_path / "library", run.space).entries
    for one in report.front:
        if one.folder:
            assert set(enumerate(one.variants)) <= set(everything)
    # What winners added does not change what a second run finds.
    assert run.front() == [replace(one, validation=None, test=None, folder=None) for one in report.front]


def test_a_predicted_variant_that_fails_in_training_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(
        SETTINGS, space="small", variants_per_block=6, winners=2, with_reference_blocks=False, samples=5
    )
    run = VisionSearch(pictures(), tmp_path, settings)
    known = run.library.entries.keys()
    trained = tuple(
        next(v.name for v in own if (n, v.name) in known) for n, own in enumerate(run.space.variants)
    )
    predicted = next(v.name for v in run.space.variants[0] if (0, v.name) not in known)
    assert predicted in run.errors[0]

    def diverges(block: object, features: object, settings: object) -> bool:
        return False

    monkeypatch.setattr("modicum.search.library.train_block", diverges)  # of all that is trained from now on
    assert not run._failing([trained])
    assert run._failing([trained, (predicted, trained[1])])
    assert predicted not in run.errors[0]
    front = run._with_winners()
    assert all(one.variants[0] != predicted for one in front)
    assert all(set(enumerate(one.variants)) <= known for one in front if one.folder)
    assert f"0/{predicted}" in run.report(front).failed_variants
    # A second run finds the failure in the folder.
    again = VisionSearch(pictures(), tmp_path, settings)
    assert again._failing([(predicted, trained[1])])


def test_a_few_variants_are_few_without_the_references_own(tmp_path: Path) -> None:
    chosen = [
        VisionSearch(
            pictures(), tmp_path, replace(SETTINGS, space="small", variants_per_block=4, seed=seed)
        )._wanted()
        for seed in range(4)
    ]
    for wanted in chosen:
        for names in wanted.values():
            assert names[0] == "reference"
            assert len(set(names)) == 5


@pytest.mark.parametrize(
    ("options", "package"),
    [({"runtime": Runtime("onnxruntime")}, "onnxruntime"), ({}, "scipy")],
)
def test_a_missing_package_is_told_before_anything_is_trained(
    options: dict[str, object], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"needs the package {package}\b"):
        search(pictures(), tmp_path / "out", replace(SETTINGS, **options))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_evolution_needs_no_package(found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["pymoo", "scipy", *(name for name in sys.modules if name.startswith(("pymoo.", "scipy.")))]:
        monkeypatch.setitem(sys.modules, name, None)
    settings = replace(SETTINGS, method="nsga2")
    VisionSearch(pictures(), tmp_path / "out", settings)._check()
    assert VisionSearch(pictures(), found, settings).front()


@pytest.mark.parametrize("num", range(1, 9))
def test_winners_are_spread_over_the_front(num: int) -> None:
    assert evenly_spaced(num, 1) == [num - 1]
    for count in range(2, 10):
        found = evenly_spaced(num, count)
        assert found == sorted(set(found))
        assert len(found) == min(num, count)
        assert {0, num - 1} >= {found[0], found[-1]}


def test_images_are_normalised_by_those_that_are_learnt_from(tmp_path: Path) -> None:
    folder, test = write_folder(tmp_path / "images", 60), write_folder(tmp_path / "test", 30, seed=1)
    for images in (SearchImages.load(folder, SETTINGS), SearchImages.load(folder, SETTINGS, test)):
        scaled = images.train.pixels.double() / 255
        for one in (images.train, images.validation, images.test):
            torch.testing.assert_close(one.mean.double(), scaled.mean((0, 2, 3)), rtol=1e-5, atol=0)
            deviation = scaled.var((0, 2, 3), unbiased=False).sqrt()
            torch.testing.assert_close(one.deviation.double(), deviation, rtol=1e-4, atol=0)


def test_the_commands(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 60)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    space = ["--channels", "16,16", "--strides", "2,2", "--size", "16", "--space", "tiny"]
    runner = CliRunner()
    table = tmp_path / "table.json"
    measured = runner.invoke(
        app, ["measure", "-o", str(table), "--classes", "3", "--check", "3", "--json", *space]
    )
    assert measured.exit_code == 0, measured.output
    told = json.loads(measured.stdout)
    assert len(told["milliseconds"]) == 1 + 2 + 5 + 5
    assert len(told["check"]["measured_ms"]) == 3
    short = [
        "--epochs",
        "1",
        "--samples",
        "4",
        "--sample-epochs",
        "1",
        "--winners",
        "1",
        "--winner-epochs",
        "1",
    ]
    line = ["search", str(folder), "-o", str(tmp_path / "out"), "--table", str(table), *space, *short]
    found = runner.invoke(app, line)
    assert found.exit_code == 0, found.output
    assert "red/broken.png is left out" in found.stderr
    assert "predictor: Kendall's tau" in found.stdout
    again = runner.invoke(app, [*line, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["device"] == told["device"]
    network = VisionNetwork.load(tmp_path / "out" / "reference")
    one = tmp_path / "one.png"
    one.write_bytes(encoded(pixels(1)[0][0]))
    assert set(network.classify(one).probabilities) == {"blue", "green", "red"}


def test_what_cannot_be_used_is_found_before_training(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 60)
    space = ["--channels", "16,16", "--strides", "2,2", "--size", "16", "--space", "tiny"]
    (tmp_path / "file").write_text("kept")
    (tmp_path / "table.json").write_text('{"format": 1, "device": "d", "runtime": "r", "seconds": {}}')
    for words, told in (
        (["-o", str(tmp_path / "file")], "is a file: give a folder"),
        (["-o", str(tmp_path / "file" / "deeper"), "--epochs", "1"], "cannot write to"),
        (["-o", str(tmp_path / "out"), "--table", str(tmp_path / "table.json")], "has no time for the block"),
    ):
        found = CliRunner().invoke(app, ["search", str(folder), *space, *words])
        assert found.exit_code == 2
        assert told in found.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_a_check_of_a_single_network_is_json(tmp_path: Path) -> None:
    space = ["--channels", "8", "--strides", "2", "--size", "8", "--space", "tiny"]
    line = ["measure", "-o", str(tmp_path / "t.json"), "--check", "1", "--json", *space]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout, parse_constant=pytest.fail)["check"]["kendall_tau"] is None


def test_times_of_another_device_by_command(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs onnx")
    space = ["--channels", "8", "--strides", "2", "--size", "8", "--space", "tiny"]
    runner = CliRunner()
    out = tmp_path / "blocks"
    found = runner.invoke(app, ["measure", "--onnx", "-o", str(out), "--json", *space])
    assert found.exit_code == 0, found.output
    path = Path(json.loads(found.stdout)["list"])
    again = runner.invoke(app, ["measure", "--onnx", "-o", str(out), *space])
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "may have been filled in" in again.stderr
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line + "1.5" for line in lines[1:])]) + "\n")
    made = runner.invoke(
        app, ["measure", "--times", str(path), "--device", "phone", "-o", str(tmp_path / "t.json")]
    )
    assert made.exit_code == 0, made.output
    table = BlockTable.load(tmp_path / "t.json")
    assert table.device == "phone"
    assert len(table.seconds) == len(lines) - 1
    other = runner.invoke(
        app, ["measure", "--times", str(path), "--device", "tablet", "-o", str(tmp_path / "t.json")]
    )
    assert other.exit_code == 2
    assert "has times of phone (measured elsewhere): give another --out" in other.stderr
    assert BlockTable.load(tmp_path / "t.json") == table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["search", "nowhere", "-o", "out"], "there is no nowhere"),
        (["search", "x", "-o", "out", "--space", "huge"], "space is 'huge'"),
        (["search", "x", "-o", "out", "--channels", "a,b"], "whole numbers with commas"),
        (["search", "x", "-o", "out", "--samples", "2"], "2 samples: give at least 4"),
        (["search", "x", "-o", "out", "--method", "luck"], "milp or nsga2"),
        (["search", "x", "-o", "out", "--winners", "0"], "error: --winners is 0: give 1 or more"),
        (["search", "x", "-o", "out", "--variants", "2"], "error: --variants is 2: give at least 4"),
        (["search", "x", "-o", "out", "--size", "0"], "error: size is 0: give a whole number from 1"),
        (["search", "x", "-o", "out", "--strides", "1,0,1,1"], "error: strides are [1, 0, 1, 1]: give"),
        (["search", "x", "-o", "out", "--threads", "0"], "error: threads is 0: give 1 or more"),
        (["search", "x", "-o", "out", "--seed", "9" * 30], "error: seed is 9999"),
        (["search", "x", "-o", "out", "--runtime", "tpu"], "the runtime is 'tpu'"),
        (["measure", "-o", "out", "--onnx", "--times", "x"], "give one of them"),
        (["measure", "-o", "out", "--classes", "1"], "give 2 or more"),
    ],
)
def test_bad_input_is_a_line_on_stderr(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, options)
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
