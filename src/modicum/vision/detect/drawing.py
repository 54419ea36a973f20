"""Drawing: boxes with class and score, in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.errors import InputError
from modicum.packages import import_package
from modicum.vision.detect.nms import Detections
from modicum.whole_file import whole_file

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
_JPEG = (".jpg", ".jpeg")


def drawn(image: Any, found: Detections, classes: Sequence[str]) -> Any:
    """A copy of an RGB image of Pillow with the detections, best on top."""
    draw_module, font_module = (
        import_package("PIL.ImageDraw", "detect"),
        import_package("PIL.ImageFont", "detect"),
    )
    picture = image.copy()
    pen = draw_module.Draw(picture)
    shorter = min(picture.size)
    width = max(1, round(shorter / 240))
    font = font_module.load_default(max(10, round(shorter / 32)))
    for number in reversed(range(len(found))):
        box = found.boxes[number].tolist()
        label = int(found.labels[number])
        colour = COLOURS[label % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=width)
        text = f"{classes[label]} {float(found.scores[number]):.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        high, long = bottom - top + 2 * width, right - left + 2 * width
        # Above the box where there is room, else inside it; never beyond the right border.
        x = max(0.0, min(box[0], picture.width - long))
        y = box[1] - high if box[1] >= high else box[1]
        pen.rectangle((x, y, x + long, y + high), fill=colour)
        pen.text((x + width - left, y + width - top), text, fill="white", font=font)
    return picture


def picture_path(out: Path, image: Path, root: Path) -> Path:
    """Where the picture of an image goes: its place below `root`, in `out`, with "-boxes" in its name."""
    below = image.relative_to(root) if image.is_relative_to(root) and image != root else Path(image.name)
    suffix = image.suffix if image.suffix.lower() in _JPEG else f"{image.suffix}.png"
    suffix = ".png" if image.suffix.lower() == ".png" else suffix
    return out / below.with_name(f"{image.stem}-boxes{suffix}")


def save_picture(picture: Any, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if path.suffix.lower() in _JPEG else "PNG"
        with whole_file(path) as part:
            picture.save(part, kind, **({"quality": 92} if kind == "JPEG" else {}))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another --out") from error
