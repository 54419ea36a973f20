"""Synthetic speech by espeak-ng, with the times of its phones.

The names below load when first used: the process that runs espeak-ng imports this package too, and needs
none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
