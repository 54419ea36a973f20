"""Integer model: which layers of a converted model are integer ones, as JSON takes it.

The state dict of a converted model holds its integers and scales. With what is described here, a float model
of the same structure becomes one that the state dict can be loaded into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from modicum.errors import InputError, ModelError
from modicum.quant.convolution import ConvSettings
from modicum.quant.integer_conv import IntegerConv1d
from modicum.quant.schemes import SCHEMES


def integer_layers(model: nn.Module) -> dict[str, IntegerConv1d]:
    """The integer convolutions of a model, by name; none in a float model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, IntegerConv1d)}


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The scheme of each integer convolution: {"layers.0.conv": {"scheme": "rsq", "alpha": 2.0, …}}."""
    return {
        name: {"scheme": layer.scheme.name, **asdict(layer.scheme)}
        for name, layer in integer_layers(model).items()
    }


def restore_layers(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Put integer convolutions without values in the place of a float model's, in place.

    Args:
        described: as `describe_layers` gives it.

    Raises:
        ModelError: a layer is missing or no Conv1d, or its scheme is not known or cannot compute it.
    """
    for name, fields in described.items():
        options = dict(fields)
        kind = SCHEMES.get(options.pop("scheme", ""))
        if kind is None:
            raise ModelError(f"layer {name} has the scheme {fields.get('scheme')!r}, which is not known")
        parent, _, child = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            conv = getattr(owner, child)
            scheme = kind(**options)
            if not isinstance(conv, nn.Conv1d):
                raise ModelError(f"layer {name} is a {type(conv).__name__} in the model, not a Conv1d")
            settings = ConvSettings.of(conv)
            scheme.check(settings, conv.in_channels)
        except (AttributeError, TypeError, InputError) as error:
            raise ModelError(f"layer {name} cannot be restored ({error})") from error
        scales = (
            torch.ones(scheme.input_scale_shape),
            torch.ones(scheme.weight_scale_shape(conv.out_channels)),
        )
        weights = scheme.prepare_weight(torch.zeros_like(conv.weight))
        setattr(owner, child, IntegerConv1d(scheme, settings, weights, scales, conv.bias))
