"""Synthetic speech by espeak-ng, with the times of its phones."""

from __future__ import annotations

from modicum.speech.synthesis.folder import SplitReport, SynthesisSettings, synthesize
from modicum.speech.synthesis.sentences import DOMAINS, sentence
from modicum.speech.synthesis.synthesizer import Speech, Synthesizer
from modicum.speech.synthesis.voice import ACCENTS, Voice, VoiceSplit, split_voices

__all__ = [
    "ACCENTS",
    "DOMAINS",
    "Speech",
    "SplitReport",
    "SynthesisSettings",
    "Synthesizer",
    "Voice",
    "VoiceSplit",
    "sentence",
    "split_voices",
    "synthesize",
]
