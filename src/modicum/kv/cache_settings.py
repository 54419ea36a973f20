"""CacheSettings: how a model's cache is made where a call does not say it."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from modicum.errors import InputError
from modicum.kv.policy import Policy
from modicum.kv.unwrap import unwrap


@dataclass(frozen=True)
class CacheSettings:
    """Of a model; a folder that `modicum fit` writes has its own.

    Attributes:
        policy: as `BudgetCache` takes it.
        budget: likewise; bytes as a size, "4096 B".
        store: likewise.
    """

    policy: str | Policy = "auto"
    budget: int | str = 2048
    store: str = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str | Policy) or not isinstance(self.store, str):
            raise InputError(f"cache settings are {self!r}: policy and store are names")


_settings: WeakKeyDictionary[PreTrainedModel, CacheSettings] = WeakKeyDictionary()


def cache_settings_of(model: PreTrainedModel) -> CacheSettings:
    """The model's own, or the defaults."""
    plain = unwrap(model)
    # Whatever else is given is refused later, with the reason.
    return _settings.get(plain, CacheSettings()) if isinstance(plain, PreTrainedModel) else CacheSettings()


def use_cache_settings(model: PreTrainedModel, settings: CacheSettings) -> None:
    """Let calls that do not say otherwise make this model's caches so."""
    plain: PreTrainedModel = unwrap(model)
    _settings[plain] = settings
