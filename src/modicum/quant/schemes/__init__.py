"""Schemes of quantised convolution."""

from __future__ import annotations

from modicum.quant.schemes.base import Scheme, WinogradScheme
from modicum.quant.schemes.direct import DirectInt8
from modicum.quant.schemes.exact import ExactWinograd
from modicum.quant.schemes.limited import RangeLimitedWinograd, RSQWinograd
from modicum.quant.schemes.tapwise import TapwiseWinograd

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (DirectInt8, ExactWinograd, TapwiseWinograd, RangeLimitedWinograd, RSQWinograd)
}

__all__ = [
    "SCHEMES",
    "DirectInt8",
    "ExactWinograd",
    "RSQWinograd",
    "RangeLimitedWinograd",
    "Scheme",
    "TapwiseWinograd",
    "WinogradScheme",
]
