"""Synthetic speech by espeak-ng, with the times of its phones.

The names below load when first used: the process that runs espeak-ng imports this package too, and needs
none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.speech.synthesis.folder import SplitReport, SynthesisSettings, synthesize
    from modicum.speech.synthesis.sentences import DOMAINS, sentence
    from modicum.speech.synthesis.synthesizer import Speech, Synthesizer
    from modicum.speech.synthesis.voice import ACCENTS, Voice, VoiceSplit, split_voices

_HOMES = {
    "folder": ("SplitReport", "SynthesisSettings", "synthesize"),
    "sentences": ("DOMAINS", "sentence"),
    "synthesizer": ("Speech", "Synthesizer"),
    "voice": ("ACCENTS", "Voice", "VoiceSplit", "split_voices"),
}
_HOME = {name: f"modicum.speech.synthesis.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "synthesize",
    "SynthesisSettings",
    "SplitReport",
    "Synthesizer",
    "Speech",
    "Voice",
    "VoiceSplit",
    "split_voices",
    "ACCENTS",
    "sentence",
    "DOMAINS",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'modicum.speech.synthesis' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
