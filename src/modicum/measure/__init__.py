"""Measurements on this machine: which implementation is the fastest for a shape.

It knows no kernel: an operation gives its candidates as callables, and a shape is any dataclass.
"""

from modicum.measure.oracle import Latency, LatencyOracle, Operation
from modicum.measure.processor import processor_name
from modicum.measure.timing import Spread, TimingSettings, interleaved

__all__ = [
    "Latency",
    "LatencyOracle",
    "Operation",
    "Spread",
    "TimingSettings",
    "interleaved",
    "processor_name",
]
