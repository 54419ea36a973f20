"""Pictures of disparities and errors, and one HTML page of them."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.stereo.disparity_file import png

MAX_ERROR = 4.0
"""Pixels of the darkest red in an error map."""

_STYLE = """body{font-family:system-ui,sans-serif;margin:1.5rem;background:#fafafa;color:#111}
section{margin-bottom:2rem}div{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0}
img{max-width:100%;height:auto;image-rendering:auto;display:block}figcaption{font-size:.85rem;margin-top:.2rem}
@media(prefers-color-scheme:dark){body{background:#151515;color:#eee}}"""


@dataclass(frozen=True)
class Figure:
    """A picture of a page.

    Attributes:
        values: uint8 or uint16 [H, W], or colours uint8 [H, W, 3].
        caption: below it.
    """

    values: NDArray[Any]
    caption: str


def disparity_picture(pixels: NDArray[np.float32], largest: float) -> NDArray[np.uint8]:
    """Colours uint8 [H, W, 3]: blue is far, red is near, black is no disparity.

    Args:
        pixels: disparities [H, W]; NaN where there is none.
        largest: the disparity of the last colour.
    """
    return _coloured(pixels / max(largest, 1e-6), "turbo", np.isfinite(pixels))


def error_picture(found: NDArray[np.float32], truth: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colours uint8 [H, W, 3]: white for no error, dark red for 4 pixels or more, black for unknown."""
    error = np.abs(found - truth)
    return _coloured(error / MAX_ERROR, "Reds", np.isfinite(error))


def page(title: str, sections: Sequence[tuple[str, Sequence[Figure]]]) -> str:
    """An HTML page that needs no other file: a heading and pictures side by side for each section."""
    parts = []
    for heading, figures in sections:
        shown = "".join(
            f'<figure><img alt="{html.escape(one.caption)}" '
            f'src="data:image/png;base64,{base64.b64encode(png(_eight_bits(one.values))).decode()}">'
            f"<figcaption>{html.escape(one.caption)}</figcaption></figure>"
            for one in figures
        )
        parts.append(f"<section><h2>{html.escape(heading)}</h2><div>{shown}</div></section>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def _coloured(shares: NDArray[Any], name: str, is_known: NDArray[np.bool_]) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    colours = colormaps[name](np.clip(np.nan_to_num(shares), 0, 1))[..., :3]
    colours[~is_known] = 0
    result: NDArray[np.uint8] = np.rint(255 * colours).astype(np.uint8)
    return result


def _eight_bits(values: NDArray[Any]) -> NDArray[Any]:
    return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
