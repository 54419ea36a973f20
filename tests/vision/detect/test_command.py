"""`modicum detect` as a user calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modicum.cli import app
from modicum.vision.detect.detector_file import load_detector, save_detector
from modicum.vision.detect.drawing import drawn, picture_path
from modicum.vision.detect.evaluation import evaluate
from modicum.vision.detect.evaluation_page import mistakes
from modicum.vision.detect.loaded_images import load_test_images
from modicum.vision.detect.nms import Detections
from modicum.vision.detect.read_dataset import read_dataset
from tests.vision.detect.scenes import annotation, scene, tiny_detector, write_coco, write_voc

runner = CliRunner()
TINY = ("--model", "resnet14", "--width", "0.0625", "--size", "96x64", "--batch", "4")


def call(*words: Any, code: int = 0) -> Any:
    found = runner.invoke(app, ["detect", *map(str, words)])
    assert found.exit_code == code, found.output + found.stderr
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a detector that was trained a little."""
    folder = tmp_path_factory.mktemp("work")
    write_voc(folder / "voc")
    call("train", folder / "voc", "--out", folder / "teacher.safetensors", "--epochs", 2, *TINY)
    return folder


def test_training_pruning_evaluating_and_running(work: Path) -> None:
    small = work / "small.safetensors"
    told = json.loads(
        call(
            *("prune", work / "teacher.safetensors", work / "voc", "--out", small, "--macs", "90%"),
            *("--steps", 1, "--epochs", 1, "--batch", 4, "--branch-factor", 1, "--json"),
        ).stdout
    )
    assert told["budget"]["after"] <= told["budget"]["limit"]
    assert told["nbytes"] == small.stat().st_size
    assert not list(work.glob("*.state")) + list(work.glob("*.training"))
    told = json.loads(call("evaluate", small, work / "voc", "--split", "train", "--json").stdout)
    assert 0 <= told["map50_95"] <= told["map50"] <= 1
    assert (told["images"], told["boxes"]) == (4, 8)
    page = work / "page.html"
    assert "average precision" in call("evaluate", small, work / "voc", "--html", page).stdout
    text = page.read_text(encoding="utf-8")
    assert "Worst images" in text
    assert text.count("<img") + text.count("<picture") >= 5
    for told in ("Precision against recall", "multiply-accumulates", "network, in torch, "):
        assert told in text
    rows = json.loads(
        call(
            "run", small, work / "voc/JPEGImages", "--out", work / "pictures", "--min-score", 0, "--json"
        ).stdout
    )
    assert len(rows) == 4
    for row in rows:
        with Image.open(row["picture"]) as picture:
            assert picture.size == (100, 72)
        for found in row["detections"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 < x2 <= 100
            assert 0 <= y1 < y2 <= 72


def test_options_are_what_is_done(work: Path, tmp_path: Path) -> None:
    """Each by what it changes in the file."""
    teacher = work / "teacher.safetensors"
    short = ("--steps", 1, "--epochs", 1, "--batch", 4)
    for name, words in {
        "bytes": ("--bytes", "90%", "--score", "bn", "--no-guidance", "--no-flip-y"),
        "latency": ("--latency", "100%", "--allocator", "knapsack"),
    }.items():
        out = tmp_path / f"{name}.safetensors"
        told = json.loads(call("prune", teacher, work / "voc", "--out", out, *words, *short, "--json").stdout)
        assert told["budget"]["limit"] > 0
        assert told["budget"]["before"] == pytest.approx(
            told["budget"]["limit"] / (0.9 if name == "bytes" else 1)
        )
    how = load_detector(tmp_path / "bytes.safetensors").about["pruned"]
    assert (tmp_path / "bytes.safetensors").stat().st_size <= 0.9 * teacher.stat().st_size
    assert (how["score"], how["guidance"], how["recipe"]["augment"]["flip_y"]) == ("bn", None, False)
    how = load_detector(tmp_path / "latency.safetensors").about["pruned"]
    assert (how["allocator"], how["budget"]["resource"]) == ("knapsack", "latency")
    assert how["guidance"] is not None
    assert how["recipe"]["augment"]["flip_y"] is True
    out = tmp_path / "guided.safetensors"
    call("train", work / "voc", "--out", out, "--epochs", 1, "--teacher", teacher, *TINY)
    assert load_detector(out).about["guided"] is True


def test_images_that_do_not_open_are_named_before_training(work: Path, tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 3)
    (folder / "JPEGImages/scene1.png").write_bytes(b"no image")
    for words in (
        ("train", folder, "--out", tmp_path / "new.safetensors", "--epochs", 1, *TINY),
        ("evaluate", work / "teacher.safetensors", folder),
    ):
        told = call(*words).stderr
        assert told.count("scene1.png") == 1
        assert "1 were left out" in told


def test_the_worst_images_are_first(work: Path) -> None:
    images = load_test_images(read_dataset(work / "voc"), (64, 96))
    data = [one.annotated for one in images]
    detections = [
        Detections(one.boxes[:k], torch.full((len(one.boxes[:k]),), 0.9), one.labels[:k])
        for one, k in zip(data, (2, 0, 1, 2), strict=True)
    ]
    detections[3] = Detections(data[3].boxes, torch.tensor([0.9, 0.9]), 1 - data[3].labels)
    found = replace(evaluate(tiny_detector(), images), detections=detections)
    assert [mistakes(found, number) for number in range(4)] == [(0, 0), (2, 0), (1, 0), (2, 2)]


def test_int8_and_onnx(work: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra detect")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    call(
        "quantize", work / "teacher.safetensors", work / "voc/JPEGImages", "--out", work / "int8.safetensors"
    )
    call("export", work / "int8.safetensors", "--out", work / "int8.onnx")
    image = work / "voc/JPEGImages/scene0.png"
    for name in ("int8.safetensors", "int8.onnx"):
        (row,) = json.loads(call("run", work / name, image, "--min-score", 0.02, "--json").stdout)
        assert row["image"] == str(image)
    told = json.loads(call("evaluate", work / "int8.onnx", work / "voc", "--json").stdout)
    assert told["images"] == 4
    for name, runtime in (("int8.safetensors", "torch, which computes int8"), ("int8.onnx", "onnxruntime")):
        call("evaluate", work / name, work / "voc", "--html", work / f"{name}.html")
        text = (work / f"{name}.html").read_text(encoding="utf-8")
        assert f"with suppression, in {runtime}" in text
    told = call(
        "prune",
        work / "int8.safetensors",
        work / "voc",
        "--out",
        work / "no.safetensors",
        "--macs",
        "50%",
        code=2,
    )
    assert "int8 detector cannot be pruned" in told.stderr


def test_a_folder_with_a_bad_image_is_done_and_the_image_named(work: Path, tmp_path: Path) -> None:
    scene(0)[0].save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 broken")
    found = call("run", work / "teacher.safetensors", tmp_path, code=1)
    assert "b.jpg cannot be read as an image" in found.stderr
    assert "1 of 2 images could not be read" in found.stderr
    assert "a.png" in found.stdout
    (tmp_path / "a.png").unlink()
    call("run", work / "teacher.safetensors", tmp_path, code=2)


def test_data_with_faults_is_used_and_told_of(work: Path, tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 3)
    boxes = [("disc", -9, 2, 30, 30), ("disc", 3, 3, 3, 9), ("star", 1, 1, 9, 9)]
    (folder / "Annotations/scene0.xml").write_text(annotation("scene0.png", (72, 100), boxes))
    (folder / "JPEGImages/scene1.png").unlink()
    found = call("evaluate", work / "teacher.safetensors", folder, code=2)
    assert "class 'star'" in found.stderr
    assert "--skip-unknown" in found.stderr
    found = call("evaluate", work / "teacher.safetensors", folder, "--skip-unknown", "--json")
    faults = json.loads(found.stdout)["faults"]
    assert (faults["num_clipped"], faults["num_dropped"], faults["unknown"]) == (1, 1, {"star": 1})
    assert faults["without_image"] == ["scene1.xml"]
    assert "were cut at its border" in found.stderr
    # Told before the training, which this one does not survive.
    found = call(
        "train", folder, "--out", tmp_path / "new.safetensors", "--rate", 1e30, "--size", "64x96", code=2
    )
    assert "were cut at its border" in found.stderr
    path = write_coco(tmp_path / "coco")
    call("evaluate", work / "teacher.safetensors", path)


def test_data_without_a_box_that_counts_has_no_precision(work: Path, tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 1)
    (folder / "Annotations/scene0.xml").write_text(
        annotation("scene0.png", (72, 100), [("star", 1, 1, 9, 9)])
    )
    line = ("evaluate", work / "teacher.safetensors", folder, "--skip-unknown", "--json")
    told = json.loads(call(*line).stdout, parse_constant=pytest.fail)
    assert told["map50"] is told["map50_95"] is told["voc_map50"] is told["ap50"]["disc"] is None
    found = call(*line, "--html", tmp_path / "page.html")
    assert [x for x in found.stderr.splitlines() if x.startswith("warning")] == [
        "warning: 1 boxes of the unknown class 'star' were skipped"
    ]


def test_no_picture_takes_anothers_place(work: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name / "a.png" for name in ("one", "two")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        scene(number)[0].save(path)
    for words in (paths, [path.parent for path in paths]):
        found = call("run", work / "teacher.safetensors", *words, "--out", tmp_path / "out", code=2)
        assert "would have the same picture" in found.stderr
    assert not (tmp_path / "out").exists()
    call("run", work / "teacher.safetensors", paths[0], paths[0], "--out", tmp_path / "out")
    for out in (paths[0], paths[0] / "deeper"):
        found = call("run", work / "teacher.safetensors", paths[1], "--out", out, code=2)
        assert found.stderr.count("\n") == 1
    found = call("evaluate", work / "teacher.safetensors", work / "voc", "--html", tmp_path / "one", code=2)
    assert "it is a folder" in found.stderr
    assert not (tmp_path / "one-files").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("prune", "{w}/teacher.safetensors", "{w}/voc", "-o", "{w}/x.safetensors"), "exactly one budget"),
        (
            ("prune", "{w}/teacher.safetensors", "{w}/voc", "-o", "{w}/x.safetensors", "--macs", "1K"),
            "smallest network takes",
        ),
        (
            ("prune", "{w}/teacher.safetensors", "{w}/voc", "-o", "{w}/x.safetensors", "--bytes", "lots"),
            "give one such as 500KB",
        ),
        (
            (
                "prune",
                "{w}/teacher.safetensors",
                "{w}/voc",
                "-o",
                "{w}/x.safetensors",
                "--macs",
                "50%",
                "--max-ratio",
                2,
            ),
            "--max-ratio is 2",
        ),
        (
            ("prune", "{w}/none.safetensors", "{w}/voc", "-o", "{w}/x.safetensors", "--macs", "50%"),
            "there is no",
        ),
        (("train", "{w}/voc", "-o", "{w}/teacher.safetensors"), "exists"),
        (("train", "{w}/voc", "-o", "{w}/x"), "has no ending"),
        (("train", "{w}/voc", "-o", "{w}/x.safetensors", "--size", "big"), "--size is 'big'"),
        (("train", "{w}/voc", "-o", "{w}/x.safetensors", "--size", "100x64"), "multiple of 32"),
        (("train", "{w}/voc", "-o", "{w}/x.safetensors", "--rate", "0"), "--rate is 0"),
        (("train", "{w}/voc", "-o", "{w}/x.safetensors", "--model", "vgg"), "choose one of"),
        (("train", "{w}/none", "-o", "{w}/x.safetensors"), "there is no"),
        (("train", "{w}/voc", "-o", "{w}/x.safetensors", "--split", "val"), "no split 'val'"),
        (("run", "{w}/voc/Annotations/scene0.xml", "{w}/voc"), "cannot be read as a safetensors file"),
        (("run", "{w}/teacher.safetensors", "{w}/nothing"), "there is no"),
        (("run", "{w}/teacher.safetensors", "{w}/voc/Annotations"), "holds no image"),
        (("run", "{w}/teacher.safetensors", "{w}/voc", "--min-score", "7"), "min_score is 7"),
        (
            ("evaluate", "{w}/teacher.safetensors", "{w}/voc", "--html", "{w}/no/page.html"),
            "there is no folder",
        ),
        (("export", "{w}/teacher.safetensors", "-o", "{w}/x.tflite"), "ends in .onnx"),
    ],
)
def test_bad_input_is_one_line(work: Path, words: tuple[Any, ...], told: str) -> None:
    found = call(*(str(word).replace("{w}", str(work)) for word in words), code=2)
    lines = [line for line in found.stderr.splitlines() if line and not line.startswith("warning")]
    assert len(lines) == 1
    assert told in lines[0]
    assert not list(work.glob("x*"))


def test_a_picture_has_its_boxes(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 160), (255, 255, 255))
    found = Detections(torch.tensor([[50.0, 60, 120, 110]]), torch.tensor([0.9]), torch.tensor([0]))
    picture = drawn(image, found, ("cell",))
    red, green, _ = picture.getpixel((50, 90))
    assert red > 150 > green  # the left side, in the first colour
    assert picture.getpixel((85, 90)) == (255, 255, 255)
    assert image.getpixel((50, 90)) == (255, 255, 255)
    assert picture_path(Path("out"), Path("in/sub/a.JPG"), Path("in")) == Path("out/sub/a-boxes.JPG")
    assert picture_path(Path("out"), Path("a.tif"), Path("a.tif")) == Path("out/a-boxes.tif.png")
    assert picture_path(Path("out"), Path("a.png"), Path("a.png")) == Path("out/a-boxes.png")


def test_a_detector_of_few_classes_loads_anywhere(tmp_path: Path) -> None:
    save_detector(tiny_detector(), tmp_path / "one.safetensors")
    detector = load_detector(tmp_path / "one.safetensors")
    image = scene(1)[0].resize((40, 300))  # tall, and of another size than any before
    found = detector.detect(image)
    assert float(found.boxes[:, 2].max()) <= 40
    assert float(found.boxes[:, 3].max()) <= 300
