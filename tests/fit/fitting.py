"""A tiny model, settings that are quick, and a fitter of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modicum
from modicum.fit.fitter import Fitter
from modicum.fit.settings import FitSettings, Target
from tests.tiny_model import TINY_MODEL

CONTEXT = 128
QUICK = FitSettings(
    weights=("dense", "50%", "2:4"),
    stores=("model", "int8"),
    policy="keydiff",
    tasks="",
    sequences=3,
    length=64,
    probes=2,
    probe_length=128,
    samples=5,
    candidates=3,
)


def tiny() -> tuple[Any, Any]:
    """Model and tokenizer, in float32."""
    return modicum.load(TINY_MODEL, device="cpu")


def fitter(library: Path, settings: FitSettings = QUICK, model: Any = None) -> Fitter:
    """Not built yet."""
    loaded, tokenizer = tiny()
    target = Target("100MB", CONTEXT)
    return Fitter(model or loaded, tokenizer, None, target, settings, library=library)
