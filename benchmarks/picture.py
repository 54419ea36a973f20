"""Picture: a figure in the report's colours, written as a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modicum.report.style import LIGHT


def paint(path: Path, draw: Callable[[], Any]) -> None:
    """Draw a figure of matplotlib's and write it as a PNG of few colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    with matplotlib.rc_context(LIGHT.settings):
        figure = draw()
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=110)
        plt.close(figure)
    image = Image.open(raw).convert("RGB")
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
