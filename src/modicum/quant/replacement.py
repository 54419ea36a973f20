"""Replacement: a model's Conv1d layers become quantised ones, and those become integer ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from modicum.errors import InputError
from modicum.quant.calibration import quantized_layers
from modicum.quant.conv import QuantConv1d, RangeSettings
from modicum.quant.convolution import ConvSettings
from modicum.quant.schemes import SCHEMES, DirectInt8, Scheme, WinogradScheme
from modicum.quant.transform import KERNEL_TILE, TILES


@dataclass(frozen=True)
class QuantSettings:
    """How a model is quantised.

    Attributes:
        scheme: direct, exact, tapwise, limited or rsq.
        outputs: m of F(m, r), where the layer has r taps: 2, 4 or 6. None: 2, and without a `choose` only for
            layers of 3 taps, as other tiles have no kernel and are noisier than direct int8.
        options: more settings of the scheme, such as {"alpha": 2.0} of rsq.
        ranges: how ranges are found.

    Raises:
        InputError: the scheme, its tile or one of its options is not known.
    """

    scheme: str = "rsq"
    outputs: int | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    ranges: RangeSettings = field(default_factory=RangeSettings)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(f"the scheme is {self.scheme!r}: choose one of {', '.join(SCHEMES)}")
        tiles = sorted({outputs for outputs, _ in TILES})
        if self.outputs is not None and self.outputs not in tiles:
            raise InputError(f"a tile has {self.outputs} outputs: choose one of {', '.join(map(str, tiles))}")
        known = [x.name for x in fields(SCHEMES[self.scheme]) if x.name not in ("outputs", "taps")]
        unknown = [name for name in self.options if name not in known]
        if unknown:
            raise InputError(
                f"{self.scheme} cannot be set up with {dict(self.options)}: {unknown[0]!r} is not one of its "
                f"options {', '.join(known)}"
            )
        try:
            self.scheme_of(ConvSettings(3))
        except TypeError as error:
            raise InputError(f"{self.scheme} cannot be set up with {dict(self.options)}: {error}") from error

    def scheme_of(self, conv: ConvSettings) -> Scheme | None:
        """The scheme of a layer; None where the transform cannot compute it."""
        kind = SCHEMES[self.scheme]
        if not issubclass(kind, WinogradScheme):
            return kind(**self.options)  # type: ignore[arg-type]  # which options there are is the scheme's
        outputs = KERNEL_TILE[0] if self.outputs is None else self.outputs
        if not conv.is_plain or (outputs, conv.taps) not in TILES:
            return None
        return kind(outputs=outputs, taps=conv.taps, **self.options)  # type: ignore[arg-type]  # as above

    def is_slow(self, scheme: Scheme) -> bool:
        """Whether nobody asked for this tile, and there is no kernel for it."""
        return (
            self.outputs is None
            and isinstance(scheme, WinogradScheme)
            and (scheme.outputs, scheme.taps) != KERNEL_TILE
        )


def quantize_model(
    model: nn.Module,
    settings: QuantSettings | None = None,
    choose: Callable[[str, nn.Conv1d, Scheme], Scheme] | None = None,
) -> nn.Module:
    """Replace a model's Conv1d layers by quantised ones, in place.

    Layers that the transform cannot compute (strides, dilations, groups, other numbers of taps) are quantised
    with the direct scheme; so are, without `choose` and with `outputs` left open, layers of other than 3
    taps, as there is a kernel for F(2, 3) only. One warning names them all. Layers that stay as they are:
    those that pad with anything but zeros; subclasses of Conv1d (parametrised ones are such), layers with
    hooks, and layers with a forward of their own, which a quantised layer would lose. The warning names them,
    too. Calibrate afterwards.

    Args:
        choose: decides for each layer that the scheme can compute: given its name, the layer and the scheme,
            it returns that or another one. `modicum.quant.choice.fastest` asks the latency oracle.

    Returns:
        The model; a new layer where the model itself is a Conv1d.

    Raises:
        InputError: there is no Conv1d layer, or the scheme cannot compute one (the model stays as it was).
    """
    settings = settings or QuantSettings()
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    if not convs:
        raise InputError("the model has no Conv1d layer, and no other layer can be quantised here")
    told, layers = _Told(settings), []
    with torch.inference_mode(False):  # or the new tensors could not be used outside of it
        for name, conv in convs.items():
            if conv.padding_mode != "zeros":
                told.padded.append(name)
            elif type(conv) is not nn.Conv1d or has_hooks(conv):
                told.special.append(name)
            else:
                scheme = settings.scheme_of(ConvSettings.of(conv))
                if scheme is None or (choose is None and settings.is_slow(scheme)):
                    scheme = DirectInt8()
                    told.direct.append(name)
                elif choose is not None:
                    scheme = choose(name, conv, scheme)
                layer = QuantConv1d.of(conv, scheme, settings.ranges, name or "the layer")
                layers.append((conv, layer.train(conv.training)))
    for conv, layer in layers:
        model = _replace(model, conv, layer)
    told.warn()
    return model


def convert_model(model: nn.Module) -> nn.Module:
    """Replace a model's quantised layers by integer ones for inference, in place.

    Raises:
        InputError: there is none, one has no range yet, or one has hooks, which would be lost. The model
            stays as it was.
    """
    found = quantized_layers(model)
    hooked = [name for name, layer in found.items() if has_hooks(layer)]
    if hooked:
        raise InputError(
            f"{', '.join(hooked) or 'the layer'}: hooks of these layers would be lost, remove them first"
        )
    layers = [(layer, layer.convert()) for layer in found.values()]
    for layer, integer in layers:
        model = _replace(model, layer, integer)
    return model


def has_hooks(layer: nn.Module) -> bool:
    """Whether a layer has hooks of its own, or a forward that replaces its class's."""
    return "forward" in vars(layer) or any(
        bool(value) for name, value in vars(layer).items() if name.endswith("_hooks")
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """In all places that hold it: a layer may be shared. Gives the model, which may be the layer itself."""
    if model is old:
        return new
    for module in list(model.modules()):
        for child, found in list(module._modules.items()):
            if found is old:
                setattr(module, child, new)
    return model


@dataclass
class _Told:
    """What the warning says: names of layers, by what became of them."""

    settings: QuantSettings
    direct: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def warn(self) -> None:
        """Once, if there is anything to say."""
        told = []
        if self.direct:
            told.append(f"direct int8 is used for {_listed(self.direct)}: {self._limits()}")
        if self.padded:
            told.append(f"{_listed(self.padded)} stay in floating point, as they do not pad with zeros")
        if self.special:
            told.append(
                f"{_listed(self.special)} stay in floating point, as they are subclasses of Conv1d, "
                "parametrised, or have hooks or a forward of their own"
            )
        if told:
            warnings.warn("; ".join(told), stacklevel=3)

    def _limits(self) -> str:
        """What the scheme takes."""
        scheme, outputs = self.settings.scheme, self.settings.outputs
        plain = "takes stride, dilation and groups of 1 and"
        if outputs is None:
            return f"{scheme} {plain} {KERNEL_TILE[1]} taps (give outputs to use it with other taps)"
        known = " or ".join(str(taps) for number, taps in TILES if number == outputs)
        return f"{scheme} with {outputs} outputs {plain} {known} taps"


def _listed(names: list[str]) -> str:
    return ", ".join(name or "the layer" for name in names)
