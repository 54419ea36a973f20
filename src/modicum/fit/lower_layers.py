"""Lower layers: what they compute for the probes, kept while only a layer above them changes.

A library replaces one layer at a time. What enters that layer is what enters it in the reference, so the
layers below need not run again: half of the work, on average over all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modicum.fit.probe import Probes


class LowerLayers:
    """What enters one layer of the reference in each call that the probes make.

    The first layer of each kind of attention runs even so: masks and positions follow from what the cache
    holds there.

    Args:
        model: the reference. It is as it was after each call.
        layers: its decoder layers, in order.
        probes: they read the model, with its own cache.

    Attributes:
        number: the layer whose inputs are kept; 0 where nothing is, and all layers run.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], probes: Probes) -> None:
        self._model, self._layers, self._probes = model, layers, probes
        config: Any = model.config.get_text_config()
        kinds = list(getattr(config, "layer_types", None) or ["all"] * len(layers))
        self._running = {kinds.index(kind) for kind in kinds}
        # Layers that read the keys of others need those to have run.
        self._is_possible = not getattr(config, "num_kv_shared_layers", 0)
        self.number = 0
        self._inputs: list[Tensor] = []

    @torch.no_grad()
    def keep(self, number: int) -> None:
        """Keep what enters a layer, of the model as it is now: the reference.

        Args:
            number: a layer that is not below the one before. Where the reference's predictions are not found
                again, bit for bit, nothing is kept from then on.
        """
        if number == self.number or not self._is_possible:
            return
        found: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        with self.skipped(), self._without(range(number, len(self._layers))):
            handle = self._layers[number].register_forward_pre_hook(note, with_kwargs=True)
            try:
                self._probes.read_all(self._model)
            finally:
                handle.remove()
        self.number, self._inputs = number, found
        with self.skipped():
            if not self._probes.is_reference(self._model):
                self.number, self._inputs, self._is_possible = 0, [], False

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Meanwhile layers below `number` do not run, and what was kept enters it; for one
        `Probes.measure`.
        """
        if not self.number:
            yield
            return
        inputs = iter(self._inputs)

        def give(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = next(inputs)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        with self._without(range(self.number)):
            handle = self._layers[self.number].register_forward_pre_hook(give, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    @contextmanager
    def _without(self, numbers: Sequence[int]) -> Iterator[None]:
        """Meanwhile these layers give what they get, in the form of the first layer's output."""
        form: list[Any] = [None]

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            form[0] = output

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, *form[0][1:]) if isinstance(form[0], tuple) else hidden_states

        with ExitStack() as stack:
            stack.callback(self._layers[0].register_forward_hook(note).remove)
            for number in numbers:
                if number not in self._running:
                    stack.enter_context(_replaced(self._layers[number], forward))
            yield


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile a layer has another forward."""
    own = layer.__dict__.get("forward")
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = own
