"""Names under which our attention is registered with transformers, and which models use it.

A model's configuration names its attention implementation ("sdpa", "flash_attention_2", a kernel of the
hub). For each such name there is one of ours, registered by transformers' public interfaces. `attach` writes
it into the configuration of the model's decoder, `detach` writes the original back. No other part of a model
(a vision tower, an encoder) is switched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from modicum.errors import ModelError
from modicum.kv.attention import attention_for, mask_for
from modicum.kv.unwrap import unwrap

PREFIX = "modicum_"


class AttentionName(str):
    """The name of our attention function that stands in for the implementation `original`.

    transformers decides by parts of a name: "flash" makes it import flash attention, and "/" makes it fetch a
    kernel from the hub. So these are escaped: "modicum_fl%61sh_attention_2". Where a name is unpickled, in a
    worker process for instance, the functions are registered again.
    """

    original: str

    def __new__(cls, original: str) -> AttentionName:
        text = quote(original, safe="").replace("flash", "fl%61sh")
        self = super().__new__(cls, PREFIX + text)
        self.original = original
        return self

    def __reduce__(self) -> tuple[Callable[[str], AttentionName], tuple[str]]:
        return attention_name, (self.original,)

    def __format__(self, spec: str) -> str:
        # What transformers prints where it refuses the name, as continuous batching does. Not by __str__,
        # which the compiler calls to look the name up.
        text = f"{self[:]} (set for modicum.BudgetCache; modicum.detach(model) puts {self.original!r} back)"
        return format(text, spec)


_names: dict[str, AttentionName] = {}
_lock = threading.RLock()
"""Held while names are registered or written into configurations, never while a model runs."""


def attention_name(original: str) -> AttentionName:
    """Our name for an implementation; its functions are registered. The same object for the same original."""
    with _lock:
        if original not in _names:
            name = AttentionName(original)
            # A plain key: the registry lives as long as the process and is printed in error messages.
            AttentionInterface.register(name[:], attention_for(original))
            AttentionMaskInterface.register(name[:], mask_for(original))
            _names[original] = name
        return _names[original]


def is_attached(config: Any) -> bool:
    """Whether this configuration names our attention."""
    name = config._attn_implementation
    return isinstance(name, str) and name.startswith(PREFIX)


@dataclass
class _Loan:
    """A decoder configuration that names our attention only while someone reads the model through it."""

    readers: int
    keep: bool
    """Whether it goes on naming our attention when the last reader has left."""


_loans: dict[int, _Loan] = {}
"""By the id of the decoder's configuration, which its readers keep alive."""


def attach(model: PreTrainedModel) -> None:
    """Switch a model to our attention function. Without a budget cache it computes what it did before.

    Calls that other threads have begun go on unchanged.

    Raises:
        ModelError: the model's attention does not go through transformers' attention interface.
    """
    model = unwrap(model)
    with _lock:
        _switch(model, "served")
        loan = _loans.get(_key(model))
        if loan is not None:
            loan.keep = True


def detach(model: PreTrainedModel) -> None:
    """Put a model back as it was before the first `BudgetCache`; its budget caches then refuse to be used."""
    model = unwrap(model)
    with _lock:
        loan = _loans.get(_key(model))
        if loan is not None:
            loan.keep = False  # the last reader puts it back
        else:
            _restore(model)


@contextmanager
def borrowed(model: PreTrainedModel, done: str) -> Iterator[None]:
    """The model attached for a while; afterwards as it was, unless it has been attached meanwhile.

    done: what is done to the model, for the error: "probed".

    Raises:
        ModelError: as `attach`.
    """
    key = _key(model)
    with _lock:
        was_attached = not _switch(model, done)
        loan = _loans.setdefault(key, _Loan(0, keep=was_attached))
        loan.readers += 1
    try:
        yield
    finally:
        with _lock:
            loan.readers -= 1
            if not loan.readers:
                del _loans[key]
                if not loan.keep:
                    _restore(model)


def _key(model: PreTrainedModel) -> int:
    return id(model.config.get_text_config(decoder=True))


def _switch(model: PreTrainedModel, done: str) -> bool:
    """Write our names into the decoder's configurations; whether any had another."""
    decoder = model.config.get_text_config(decoder=True)
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is decoder]
    if not all(part._can_set_attn_implementation() for part in parts or [model]):
        raise ModelError(
            f"{type(model).__name__} cannot be {done}: its attention does not go through transformers' "
            "attention interface"
        )
    changed = False
    for config in _decoder_configs(model.config):
        name = config._attn_implementation
        if not isinstance(name, str):
            raise ModelError(
                f"{type(model).__name__} cannot be {done}: its configuration names no attention "
                "implementation. Name one: model.set_attn_implementation('sdpa')"
            )
        if isinstance(name, AttentionName):
            continue
        if name.startswith(PREFIX):  # a plain string, as older versions pickled it with a model
            name = unquote(name.removeprefix(PREFIX))
        else:
            changed = True
        # Not by set_attn_implementation: it would switch vision towers too, and check (for kernels of the
        # hub: fetch) again what the model already runs with.
        config._attn_implementation_internal = attention_name(name)
    return changed


def _restore(model: PreTrainedModel) -> None:
    for config in _decoder_configs(model.config):
        name = config._attn_implementation
        if isinstance(name, str) and name.startswith(PREFIX):
            config._attn_implementation_internal = unquote(name.removeprefix(PREFIX))


def _decoder_configs(config: Any) -> list[Any]:
    """The configurations from a model's own down to its text decoder's; often these are one."""
    decoder = config.get_text_config(decoder=True)
    return _path(config, decoder) or [config, decoder]


def _path(config: Any, target: Any) -> list[Any]:
    if config is target:
        return [config]
    for key in config.sub_configs:
        part = getattr(config, key, None)
        below = [] if part is None else _path(part, target)
        if below:
            return [config, *below]
    return []
