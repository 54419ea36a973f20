"""Replacement: a model's Conv1d layers become quantised ones, and those become integer ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from modicum.errors import InputError
from modicum.quant.calibration import quantized_layers
from modicum.quant.conv import QuantConv1d, RangeSettings
from modicum.quant.convolution import ConvSettings
from modicum.quant.schemes import SCHEMES, DirectInt8, Scheme, WinogradScheme
from modicum.quant.transform import TILES


@dataclass(frozen=True)
class QuantSettings:
    """How a model is quantised.

    Attributes:
        scheme: direct, exact, tapwise, limited or rsq.
        outputs: m of F(m, r), where the layer has r taps.
        options: more settings of the scheme, such as {"alpha": 2.0} of rsq.
        ranges: how ranges are found.

    Raises:
        InputError: the scheme or one of its options is not known.
    """

    scheme: str = "rsq"
    outputs: int = 2
    options: Mapping[str, float] = field(default_factory=dict)
    ranges: RangeSettings = field(default_factory=RangeSettings)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"the scheme is {self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        try:
            self.scheme_of(ConvSettings(3))
        except TypeError as error:
            raise InputError(f"{self.scheme} cannot be set up with {dict(self.options)}: {error}") from error

    def scheme_of(self, conv: ConvSettings) -> Scheme | None:
        """The scheme of a layer; None where the transform cannot compute it."""
        kind = SCHEMES[self.scheme]
        if not issubclass(kind, WinogradScheme):
            return kind(**self.options)  # type: ignore[arg-type]  # which options there are is the scheme's
        if not conv.is_plain or (self.outputs, conv.taps) not in TILES:
            return None
        return kind(outputs=self.outputs, taps=conv.taps, **self.options)  # type: ignore[arg-type]  # as above


def quantize_model(
    model: nn.Module,
    settings: QuantSettings | None = None,
    choose: Callable[[str, nn.Conv1d, Scheme], Scheme] | None = None,
) -> nn.Module:
    """Replace a model's Conv1d layers by quantised ones, in place.

    Layers that the transform cannot compute (strides, dilations, groups, other numbers of taps) are quantised
    with the direct scheme; one warning names them all. Layers that pad with anything but zeros stay as they
    are, and the warning says so. Calibrate afterwards.

    Args:
        choose: decides for each layer that the scheme can compute: given its name, the layer and the scheme,
            it returns that or another one. `modicum.quant.choice.fastest` asks the latency oracle.

    Returns:
        The model; a new layer where the model itself is a Conv1d.

    Raises:
        InputError: there is no Conv1d layer.
    """
    settings = settings or QuantSettings()
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    if not convs:
        raise InputError("the model has no Conv1d layer, and no other layer can be quantised here")
    direct, kept = [], []
    for name, conv in convs.items():
        if conv.padding_mode != "zeros":
            kept.append(name)
            continue
        scheme = settings.scheme_of(ConvSettings.of(conv))
        if scheme is None:
            scheme = DirectInt8()
            direct.append(name)
        elif choose is not None:
            scheme = choose(name, conv, scheme)
        layer = QuantConv1d.of(conv, scheme, settings.ranges, name or "the layer")
        layer.train(conv.training)
        if not name:
            model = layer
        else:
            _replace(model, conv, layer)
    _warn(settings, direct, kept)
    return model


def convert_model(model: nn.Module) -> nn.Module:
    """Replace a model's quantised layers by integer ones for inference, in place.

    Raises:
        InputError: there is none, or one has no range yet.
    """
    for name, layer in quantized_layers(model).items():
        integer = layer.convert()
        if not name:
            return integer
        _replace(model, layer, integer)
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In all places that hold it: a layer may be shared."""
    for module in list(model.modules()):
        for child, found in list(module._modules.items()):
            if found is old:
                setattr(module, child, new)


def _warn(settings: QuantSettings, direct: list[str], kept: list[str]) -> None:
    told = []
    if direct:
        told.append(
            f"direct int8 is used for {', '.join(direct)}: {settings.scheme} with {settings.outputs} outputs "
            "takes stride, dilation and groups of 1 and "
            + " or ".join(str(taps) for outputs, taps in TILES if outputs == settings.outputs)
            + " taps"
        )
    if kept:
        told.append(f"{', '.join(kept)} stay in floating point, as they do not pad with zeros")
    if told:
        warnings.warn("; ".join(told), stacklevel=3)
