"""Speech: audio, features, models and their training. Needs the extra "speech".

The names below load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.speech.audio import load_audio, save_audio
    from modicum.speech.features import Fbank, FeatureSettings
    from modicum.speech.manifest import PhoneInterval, Utterance, read_manifest, write_manifest
    from modicum.speech.tokens import TokenSet

_HOMES = {
    "audio": ("load_audio", "save_audio"),
    "features": ("Fbank", "FeatureSettings"),
    "manifest": ("PhoneInterval", "Utterance", "read_manifest", "write_manifest"),
    "tokens": ("TokenSet",),
}
_HOME = {name: f"modicum.speech.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "load_audio",
    "save_audio",
    "Fbank",
    "FeatureSettings",
    "Utterance",
    "PhoneInterval",
    "read_manifest",
    "write_manifest",
    "TokenSet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'modicum.speech' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
