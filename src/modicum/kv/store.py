"""Store: in what form keys and values lie in the slots: as the model gives them, or in 8 or 4 bits.

Each store is a codec for keys and one for values (`kv/codec.py`). In 4 bits keys and values are rotated
(`kv/hadamard.py`) and stay so: the layer rotates its queries and its output, and policies score in the
rotated space, where dot products, norms and distances are those of the model's. Keys under
positions="renumbered" are rotated back when they are read, since the rotary embedding comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from modicum.errors import InputError, ModelError, PolicyError
from modicum.kv.codec import Codec
from modicum.kv.layer_shape import LayerShape
from modicum.kv.policy import Policy

_CODECS = {
    "model": ("model", "model"),
    "int8": ("int8", "int8"),
    "fp8": ("fp8", "fp8"),
    "k8v4": ("int8", "int4"),
    "int4": ("int4", "int4"),
}
STORES = tuple(_CODECS)
"""The names there are."""


@dataclass(frozen=True)
class Store:
    """A form of keys and values in their slots.

    Attributes:
        name: "model", "int8", "fp8", "k8v4" (keys in int8, values in int4) or "int4".
        is_renumbered: whether keys are turned to their ranks when they are read.
        latent_dim: if not 0, values are the first so many numbers of keys (latent attention).
        keys, values: the form of each.
    """

    name: str = "model"
    is_renumbered: bool = False
    latent_dim: int = 0
    keys: Codec = field(init=False, repr=False)
    values: Codec = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in STORES:
            raise InputError(f"store is {self.name!r}: choose one of {', '.join(STORES)}")
        key, value = _CODECS[self.name]
        object.__setattr__(self, "keys", Codec(key, self.latent_dim, self.is_renumbered))
        object.__setattr__(self, "values", Codec(value))

    @property
    def is_coded(self) -> bool:
        """Whether vectors lie in another form than the model's."""
        return self.name != "model"

    @property
    def has_kernel(self) -> bool:
        """Whether the decode kernel reads such slots."""
        return self.name in ("model", "int8", "fp8")

    @property
    def is_rotated(self) -> bool:
        """Whether keys or values are read in the rotated space."""
        return self.keys.is_rotated or self.has_rotated_values

    @property
    def has_rotated_values(self) -> bool:
        """Whether values are read in the rotated space, and attention's output is to be rotated back."""
        return self.keys.is_rotated if self.latent_dim else self.values.is_rotated

    def of_layer(self, shape: LayerShape) -> Store:
        """The same in one layer."""
        return replace(self, latent_dim=shape.value_dim if shape.is_latent else 0)

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of the entries of slots, for keys and values alike."""
        return self.keys.dtype(model)

    def check(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        """Check that the layers under the budget can have such slots on a device.

        Raises:
            ModelError: they cannot, with the reason.
        """
        for shape in layers:
            self.of_layer(shape)._check_sizes(shape)
        try:
            for codec in (self.keys, self.values):
                codec.decode(codec.encode(torch.zeros(1, 2, device=device)), torch.float32)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"{device} cannot hold slots in {self.name} ({error}): choose another store"
            ) from error

    def check_policy(self, policy: Policy) -> None:
        """Check that a policy can score what these slots are read as.

        Raises:
            PolicyError: it may not score rotated keys and values as it does the model's own.
        """
        if self.is_rotated and not policy.is_rotation_invariant:
            raise PolicyError(
                f"store is {self.name!r}, which rotates keys and values, and {policy} does not say that its "
                "scores stay the same: choose store='int8', or, if it reads "
                "them by dot products, norms and distances only, give the policy a property "
                "is_rotation_invariant that is True"
            )

    def _check_sizes(self, shape: LayerShape) -> None:
        if self.name == "k8v4" and shape.is_latent:
            raise ModelError(
                "store is 'k8v4', and this model keeps one latent for keys and values, which has one form: "
                "choose store='int8' or 'int4'"
            )
        sizes = [(self.keys, shape.key_dim), (self.values, shape.stored_value_dim)]
        for size in (part for codec, dim in sizes if codec.is_packed for part in codec.parts(dim)):
            if size % 2:
                raise ModelError(
                    f"store is {self.name!r}, and this model has heads of {size} numbers: 4 bits pack two "
                    "numbers to a byte, so head sizes must be even. Choose store='int8'"
                )


PLAIN = Store()
