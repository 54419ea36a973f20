"""FitPlan: what each part of the weights and the cache get, found exactly within a memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modicum.errors import InputError
from modicum.fit.cache_option import CacheErrors, CacheOption, CacheSizes
from modicum.fit.library import Library, Variant
from modicum.fit.loss import Loss
from modicum.fit.settings import Target
from modicum.fit.weight_option import DENSE
from modicum.kv.budget import format_size
from modicum.search.milp import Choice, Option, UnreachableError, choose


@dataclass(frozen=True)
class FitPlan:
    """One option for each part, and one for the cache.

    Attributes:
        options: by the parts' names.
        cache: slots and form.
        weights_nbytes: of all weights in memory.
        cache_nbytes: of one sequence.
        predicted: loss, the predictor's intercept included.
        how: by what it was found: "optimum", "uniform", …
    """

    options: Mapping[str, str]
    cache: CacheOption
    weights_nbytes: int
    cache_nbytes: int
    predicted: float
    how: str = "optimum"

    @property
    def name(self) -> str:
        """Tells it from others."""
        return json.dumps([list(self.options.values()), self.cache.name])

    def nbytes(self, batch: int) -> int:
        """Of weights and caches."""
        return self.weights_nbytes + batch * self.cache_nbytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "how": self.how,
            "parts": dict(self.options),
            "store": self.cache.store,
            "tokens": self.cache.tokens,
            "context": self.cache.context,
            "weights_bytes": self.weights_nbytes,
            "cache_bytes": self.cache_nbytes,
            "predicted": self.predicted,
        }


class Planner:
    """Finds plans for a model.

    Args:
        library: with all variants.
        fixed_nbytes: of what is not chosen: embeddings, output layer, norms, buffers.
        sizes: of caches.
        errors: of caches.
    """

    def __init__(
        self,
        library: Library,
        fixed_nbytes: int,
        sizes: CacheSizes,
        errors: CacheErrors,
        stores: Sequence[str],
    ) -> None:
        self.library, self.fixed_nbytes, self.sizes, self.errors = library, fixed_nbytes, sizes, errors
        self.stores = tuple(stores)
        self._nbytes: dict[CacheOption, int] = {}

    def variants(self, part: str) -> list[Variant]:
        """The options of a part that may be chosen."""
        found = [self.library.variants.get((part, option.name)) for option in self.library.options]
        return [variant for variant in found if variant is not None]

    def cache_nbytes(self, option: CacheOption) -> int:
        """Of one sequence."""
        if option not in self._nbytes:
            self._nbytes[option] = self.sizes.nbytes(option)
        return self._nbytes[option]

    def dense_nbytes(self, target: Target) -> int:
        """What the model takes as it is: dense weights and transformers' whole cache."""
        weights = sum(self.library.variants[part.name, DENSE].nbytes for part in self.library.parts)
        return self.fixed_nbytes + weights + target.batch * self.sizes.full_nbytes(target.context)

    def best(
        self,
        target: Target,
        loss: Loss,
        *,
        caches: Sequence[CacheOption] | None = None,
        scales: Mapping[tuple[str, str], float] | None = None,
        how: str = "optimum",
    ) -> FitPlan:
        """The plan of the least predicted loss within the memory.

        Args:
            caches: to choose from; None for all.
            scales: factors of single variants' losses, by part and option; those of caches by ("cache",
                store).

        Raises:
            UnreachableError: nothing fits; names the least that can be, and what it would lose.
        """
        grid = list(caches or self.sizes.grid(self.stores, target.context))
        scale = scales or {}
        names = [part.name for part in self.library.parts]
        variants = [self.variants(name) for name in names]
        groups = [
            [
                Option(
                    loss.of_part(v.part, v.errors) * scale.get((v.part, v.option), 1.0), {"bytes": v.nbytes}
                )
                for v in some
            ]
            for some in variants
        ]
        groups.append(
            [
                Option(
                    loss.of_cache(self.errors.of(o)) * scale.get(("cache", o.store), 1.0),
                    {"bytes": target.batch * self.cache_nbytes(o)},
                )
                for o in grid
            ]
        )
        try:
            choice = choose(groups, {"bytes": target.nbytes - self.fixed_nbytes})
        except UnreachableError as error:
            raise self._unreachable(error, target, variants, grid, loss) from error
        return self._plan(choice, names, variants, grid, loss, how)

    def uniform(self, target: Target, loss: Loss, option: str, store: str) -> FitPlan | None:
        """The same option for every part, and what is left for a cache of one form; None if none fits."""
        names = [part.name for part in self.library.parts]
        found = [self.library.variants.get((name, option)) for name in names]
        chosen = [variant for variant in found if variant is not None]
        if len(chosen) < len(names):
            return None
        weights = self.fixed_nbytes + sum(variant.nbytes for variant in chosen)
        cache = self.largest(target, store, target.nbytes - weights)
        if cache is None:
            return None
        predicted = self._predicted(chosen, cache, loss)
        options = dict.fromkeys(names, option)
        return FitPlan(options, cache, weights, self.cache_nbytes(cache), predicted, "uniform")

    def largest(self, target: Target, store: str, room: int) -> CacheOption | None:
        """The most slots of a form within the bytes for all sequences; None if the smallest size does not
        fit.
        """
        least = self.sizes.smallest(target.context)
        low, high = least, target.context + 1
        if self.cache_nbytes(CacheOption(store, low, target.context)) * target.batch > room:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.cache_nbytes(CacheOption(store, middle, target.context)) * target.batch <= room
            low, high = (middle, high) if fits else (low, middle)
        return CacheOption(store, low, target.context)

    def filled(self, plan: FitPlan, target: Target, loss: Loss) -> FitPlan:
        """The plan with the bytes that are left given to its cache."""
        cache = self.largest(target, plan.cache.store, target.nbytes - plan.weights_nbytes)
        if cache is None or cache.tokens <= plan.cache.tokens:
            return plan
        gained = loss.of_cache(self.errors.of(plan.cache)) - loss.of_cache(self.errors.of(cache))
        return FitPlan(
            plan.options,
            cache,
            plan.weights_nbytes,
            self.cache_nbytes(cache),
            plan.predicted - gained,
            plan.how,
        )

    def _predicted(self, chosen: Sequence[Variant], cache: CacheOption, loss: Loss) -> float:
        """The loss of a whole plan."""
        parts = sum(loss.of_part(variant.part, variant.errors) for variant in chosen)
        return loss.intercept + parts + loss.of_cache(self.errors.of(cache))

    def _plan(
        self,
        choice: Choice,
        names: Sequence[str],
        variants: Sequence[Sequence[Variant]],
        grid: Sequence[CacheOption],
        loss: Loss,
        how: str,
    ) -> FitPlan:
        chosen = [some[pick] for some, pick in zip(variants, choice.picks[:-1], strict=True)]
        cache = grid[choice.picks[-1]]
        weights = self.fixed_nbytes + sum(variant.nbytes for variant in chosen)
        predicted = self._predicted(chosen, cache, loss)
        options = {name: v.option for name, v in zip(names, chosen, strict=True)}
        return FitPlan(options, cache, weights, self.cache_nbytes(cache), predicted, how)

    def _unreachable(
        self,
        error: UnreachableError,
        target: Target,
        variants: Sequence[Sequence[Variant]],
        grid: Sequence[CacheOption],
        loss: Loss,
    ) -> InputError:
        least = error.smallest["bytes"]
        names = [part.name for part in self.library.parts]
        plan = self._plan(least, names, variants, grid, loss, "least")
        return too_small(target, plan, f"a predicted loss of {plan.predicted:.3g}", self.sizes)


def too_small(target: Target, least: FitPlan, loss: str, sizes: CacheSizes) -> InputError:
    """Of a memory below that of the smallest plan."""
    is_unmeasured = sizes.length < target.context and sizes.least < least.cache.tokens
    longer = "a longer probe_length, on which smaller caches can be measured, " if is_unmeasured else ""
    total = least.nbytes(target.batch)
    chosen = ", ".join(sorted(set(least.options.values())))
    return InputError(
        f"a memory of {format_size(target.nbytes)} is too small for this model at a context of "
        f"{target.context:,} tokens and a batch of {target.batch}: the least is {format_size(total)} "
        f"({total} bytes), with weights at {chosen} and {least.cache.tokens} slots per head in "
        f"{least.cache.store}, at {loss} nats per token; give at least that, a shorter context, {longer}or "
        "more options"
    )
