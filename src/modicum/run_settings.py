"""RunSettings: how a model in a folder is to be run, written beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from modicum.errors import ModelError
from modicum.kv.cache_settings import CacheSettings, use_cache_settings
from modicum.kv.fingerprint import weights_digest
from modicum.kv.head_profile import HeadProfile
from modicum.kv.head_store import use_profile
from modicum.whole_file import write_json

FILE, PROFILE = "modicum.json", "heads.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class RunSettings:
    """Of a folder.

    Attributes:
        weights: "packed" or "dense", the form in memory.
        dtype: of the weights and what is computed.
        cache: of a call that does not say otherwise.
    """

    weights: str = "dense"
    dtype: str = "auto"
    cache: CacheSettings = field(default_factory=CacheSettings)

    @classmethod
    def read(cls, folder: Path) -> RunSettings | None:
        """Of a folder; None where it has none.

        Raises:
            ModelError: the file is damaged or newer.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ModelError(
                    f"{path} has format {found['format']}, this modicum reads {_FORMAT}: get a newer modicum"
                )
            return cls(found["weights"], found["dtype"], CacheSettings(**found["cache"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}): write the folder again, or remove it") from error

    def write(self, folder: Path) -> None:
        """Write it; the file appears whole or not at all."""
        write_json(folder / FILE, {"format": _FORMAT, **asdict(self)})

    def apply(self, model: PreTrainedModel, folder: Path) -> None:
        """Let the model's caches be made so, with the folder's head profile.

        Raises:
            SnapshotError: the profile is damaged, or of other weights.
        """
        use_cache_settings(model, self.cache)
        path = folder / PROFILE
        if path.is_file():
            profile = HeadProfile.load(path)
            profile.check(profile.heads, weights_digest(model))
            use_profile(model, profile)
