"""Sharing: which layers use which set of weights.

A map gives the weight set s(i) of each layer i of L, with u sets. The names are those of Takase and Kiyono
2021, "Lessons on Parameter Sharing across Layers in Transformers" (arXiv 2104.06022); the formulas are our
reading, as is the use of these maps for the system of arXiv 2104.05784.
"""

from __future__ import annotations

from typing import Literal, get_args

from modicum.errors import InputError

Sharing = Literal["none", "all", "sequence", "cycle", "cycle-reversed"]
"""
- none: every layer has a set of its own.
- all: one set for all layers.
- sequence: s(i) = ⌊i·u / L⌋, so neighbours share.
- cycle: s(i) = i mod u.
- cycle-reversed: as cycle, but the last pass of up to u layers goes through the sets backwards and ends at
  set 0.
"""


def sharing_map(sharing: Sharing, num_layers: int, num_sets: int) -> tuple[int, ...]:
    """The weight set of each layer.

    Args:
        sharing: see `Sharing`.
        num_layers: L.
        num_sets: u; "none" and "all" do not read it.

    Raises:
        InputError: the name is not known, or u is not from 1 to L.
    """
    if sharing not in get_args(Sharing):
        raise InputError(f"sharing is {sharing!r}: choose one of {', '.join(get_args(Sharing))}")
    if num_layers < 1:
        raise InputError(f"there are {num_layers} layers: give 1 or more")
    if sharing == "none":
        return tuple(range(num_layers))
    if sharing == "all":
        return (0,) * num_layers
    if not 1 <= num_sets <= num_layers:
        raise InputError(f"{num_layers} layers share {num_sets} weight sets: give 1 to {num_layers}")
    if sharing == "sequence":
        return tuple(layer * num_sets // num_layers for layer in range(num_layers))
    cycle = tuple(layer % num_sets for layer in range(num_layers))
    if sharing == "cycle":
        return cycle
    last = (num_layers - 1) // num_sets * num_sets  # the first layer of the last pass
    return cycle[:last] + tuple(num_layers - 1 - layer for layer in range(last, num_layers))
