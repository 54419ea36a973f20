"""Search: from a folder of images to finetuned networks on the front of accuracy and time.

The steps of DONNA (arXiv 2012.08859): train a reference; train every variant of every block in isolation;
fit a predictor to a few finetuned networks; find the front with it and with block times; finetune from the
library's weights. Each step leaves files, so that a stopped run goes on.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.errors import InputError
from modicum.measure.block_table import BlockTable, measure_blocks
from modicum.packages import import_package
from modicum.search.batchnorm import reset_statistics
from modicum.search.categories import predicted_errors
from modicum.search.costs import num_macs, num_parameters
from modicum.search.front import predicted_front
from modicum.search.latency import block_seconds, network_seconds, timed_blocks
from modicum.search.library import BlockLibrary
from modicum.search.network import BlockNetwork, fingerprint
from modicum.search.predictor import Predictor, kendall_tau
from modicum.search.samples import Sample, SampleFile, draw
from modicum.search.space import Picks, ReferenceBlock, SearchSpace
from modicum.vision.recipe import ImageRecipe
from modicum.vision.report import FoundNetwork, SearchReport, draw_front
from modicum.vision.saved import CONFIG, VisionNetwork
from modicum.vision.search_images import SearchImages
from modicum.vision.settings import VisionSearchSettings, digest_of
from modicum.vision.training import accuracy, statistics_batches, train
from modicum.whole_file import write_json

Progress = Callable[[str, int, int], object]


def search(
    images: SearchImages,
    out: str | Path,
    settings: VisionSearchSettings | None = None,
    *,
    progress: Progress | None = None,
) -> SearchReport:
    """Search networks for images.

    Args:
        images: see `SearchImages.load`.
        out: folder of the search: reference/, library/, samples.jsonl, table.json, networks/, search.json,
            front.png. A run with the same images and settings goes on with what is there.
        settings: how.
        progress: called with what is done, steps done, and in all.

    Returns:
        What was found; the same as in search.json.

    Raises:
        InputError: the folder has a search with other images or settings, a block table lacks a block, every
            variant of a block failed, or a package is missing.
        ModelError: the reference's training failed, or a file cannot be written.
    """
    return VisionSearch(images, Path(out), settings or VisionSearchSettings(), progress).run()


class VisionSearch:
    """The steps of a search, each made when it is first asked for.

    Args:
        images: of all kinds.
        out: the folder.
        settings: how.
        progress: see `search`.
    """

    def __init__(
        self,
        images: SearchImages,
        out: Path,
        settings: VisionSearchSettings,
        progress: Progress | None = None,
    ) -> None:
        self.images, self.out, self.settings = images, out, settings
        self.progress: Progress = progress or (lambda *_: None)
        self.seconds: dict[str, float] = {}
        self._failed: set[tuple[int, str]] = set()
        """Blocks and variants whose training failed after their errors had been predicted."""

    def run(self) -> SearchReport:
        """All steps; writes search.json and front.png."""
        self._check()
        self.table  # noqa: B018  # what is wrong with it should be told before all else is trained
        with self._timed("winners"):
            front = self._with_winners()
        report = self.report(front)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "search.json", report.to_dict())
            draw_front(report, self.out / "front.png")
        except OSError as error:
            raise InputError(f"cannot write to {self.out}: {error.strerror or error}") from error
        shutil.rmtree(self.out / "state", ignore_errors=True)
        return report

    def _check(self) -> None:
        """Raise for what else would only be found after training: a file in the folder's place, a missing
        package, a table that lacks a block.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file: give a folder")
        if self.settings.method == "milp":
            import_package("scipy.optimize", "search")
        self.settings.runtime.check_packages()
        if self.settings.table is None:
            return
        table = BlockTable.load(self.settings.table)
        with torch.random.fork_rng(devices=[]):
            network = self.settings.reference.build(len(self.images.train.classes))
            space = SearchSpace(network, self.settings.reference.example, self.settings.variants())
            network_seconds(space, table, (0,) * len(space.sites))
            block_seconds(space, table)

    # -- steps -----------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> BlockNetwork:
        """The reference network, trained."""
        settings, folder = self.settings, self.out / "reference"
        basis = digest_of(self.images.digest, settings.reference, settings.recipe)
        if (folder / CONFIG).exists():
            saved = VisionNetwork.load(folder)
            if saved.about.get("basis") != basis:
                raise InputError(
                    f"{self.out} holds a search with other images, another reference or another recipe: "
                    "repeat those to go on, or give another folder"
                )
            return saved.network
        with self._timed("reference"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.recipe.seed)
            network = settings.reference.build(len(self.images.train.classes))
            self._trained(network, settings.recipe, None, "reference", basis)
            VisionNetwork.of(
                network,
                settings.reference,
                [ReferenceBlock()] * len(network.blocks),
                self.images.train,
                {"basis": basis, "recipe": settings.recipe.to_dict()},
            ).save(folder)
        return network

    @cached_property
    def space(self) -> SearchSpace:
        """The reference and the variants of its blocks."""
        return SearchSpace(self.reference, self.settings.reference.example, self.settings.variants())

    @cached_property
    def table(self) -> BlockTable:
        """Block times: of another device where a table was given, else measured here."""
        space = self.space
        if self.settings.table is not None:
            return BlockTable.load(self.settings.table)
        with self._timed("table"):
            return measure_blocks(
                timed_blocks(space), self.settings.runtime, self.out / "table.json", progress=self.progress
            )

    @cached_property
    def library(self) -> BlockLibrary:
        """Variants trained in isolation; all, or some of each block."""
        with self._timed("library"):
            return self._library(self._wanted())

    def _wanted(self) -> dict[int, tuple[str, ...]]:
        generator = random.Random(self.settings.seed)
        count = self.settings.variants_per_block
        wanted = {}
        for number, own in enumerate(self.space.variants):
            # The reference's own block needs no training.
            free = [variant.name for variant in own if isinstance(variant, ReferenceBlock)]
            names = [variant.name for variant in own if variant.name not in free]
            kept = names if count is None or count >= len(names) else generator.sample(names, count)
            wanted[number] = (*free, *kept)
        return wanted

    def _library(self, wanted: dict[int, tuple[str, ...]]) -> BlockLibrary:
        built = BlockLibrary.build(
            self.space,
            self.images.train,
            self.images.validation,
            self.out / "library",
            self.settings.blockwise,
            wanted=wanted,
            progress=self.progress,
        )
        # What winners added to the folder must not change what a second run draws and predicts.
        asked = {(number, name) for number, names in wanted.items() for name in names}
        return BlockLibrary(
            built.folder, self.space, {key: entry for key, entry in built.entries.items() if key in asked}
        )

    @cached_property
    def samples(self) -> list[Sample]:
        """Finetuned networks of the library."""
        settings = self.settings
        recipe = settings.finetuning(settings.sample_epochs)
        basis = digest_of(fingerprint(self.reference), self.images.digest, recipe, settings.blockwise)
        file = SampleFile(self.out / "samples.jsonl", basis)
        drawn = draw(self.library.usable(), settings.samples, settings.seed)
        with self._timed("samples"):
            for number, picks in enumerate(drawn):
                self.progress("finetuning samples", number, len(drawn))
                if self.space.names(picks) not in file.samples:
                    file.add(self.sample(picks))
            self.progress("finetuning samples", len(drawn), len(drawn))
        return [file.samples[self.space.names(picks)] for picks in drawn]

    def sample(self, picks: Picks) -> Sample:
        """Assemble a network, measure it, finetune it, measure it again."""
        started = time.process_time()
        network = self.assembled(picks)
        before = accuracy(network, self.images.validation)
        train(
            network,
            self.images.train,
            self.settings.finetuning(self.settings.sample_epochs),
            teacher=self.reference,
        )
        after = accuracy(network, self.images.validation)
        return Sample(self.space.names(picks), before, after, time.process_time() - started)

    def assembled(self, picks: Picks) -> BlockNetwork:
        """A network of the library's weights, statistics reset; blocks that are not in it are trained."""
        names = self.space.names(picks)
        library = self.library
        if any((number, name) not in library.entries for number, name in enumerate(names)):
            library = self._library({number: (name,) for number, name in enumerate(names)})
        network = self.space.assemble(picks, library.weights(picks))
        reset_statistics(network, statistics_batches(self.images.train, self.settings.recipe.batch))
        return network

    @cached_property
    def errors(self) -> list[dict[str, float]]:
        """For each block the errors by name; of variants that were not trained as predicted."""
        found = []
        for number, own in enumerate(self.space.variants):
            known = {v: e.error for (n, v), e in self.library.entries.items() if n == number}
            known |= {v: math.nan for n, v in self._failed if n == number}
            found.append(predicted_errors(own, known)[0])
        return found

    def block_errors(self, names: Sequence[str]) -> list[float]:
        """Of the blocks of a network."""
        return [self.errors[number][name] for number, name in enumerate(names)]

    @cached_property
    def predictor(self) -> Predictor:
        """Accuracy from block errors."""
        rows = [self.block_errors(sample.variants) for sample in self.samples]
        return Predictor.fit(rows, [sample.finetuned for sample in self.samples])

    def front(self) -> list[FoundNetwork]:
        """The networks that none is predicted to beat in both accuracy and time, by rising time."""
        settings, predictor = self.settings, self.predictor
        seconds = block_seconds(self.space, self.table)
        with self._timed("front"):
            chosen = predicted_front(
                self.space,
                self.errors,
                predictor,
                seconds,
                method=settings.method,
                points=settings.front_points,
                seed=settings.seed,
            )
        return [self.found(picks) for picks in chosen]

    def found(self, picks: Picks) -> FoundNetwork:
        """What is known of a network without finetuning it."""
        names = self.space.names(picks)
        network = self.space.assemble(picks, {})
        return FoundNetwork(
            variants=names,
            milliseconds=1000 * network_seconds(self.space, self.table, picks),
            parameters=num_parameters(network),
            macs=num_macs(network, self.space.example),
            predicted=self.predictor.predict(self.block_errors(names)),
        )

    def _with_winners(self) -> list[FoundNetwork]:
        """The front, some of its networks, evenly spaced, finetuned and saved."""
        while True:
            found = self.front()
            places = evenly_spaced(len(found), self.settings.winners)
            if not self._failing(found[place].variants for place in places):
                break
        for number, place in enumerate(places):
            found[place] = self.winner(found[place], number)
        return found

    def _failing(self, networks: Iterable[Sequence[str]]) -> bool:
        """Train the variants of networks that were only predicted so far; whether one failed.

        A variant that failed is in no network of a later front.
        """
        wanted = {number: tuple(dict.fromkeys(own)) for number, own in enumerate(zip(*networks, strict=True))}
        asked = {(number, name) for number, names in wanted.items() for name in names}
        if asked <= self.library.entries.keys():
            return False
        failed = {(entry.block, entry.variant) for entry in self._library(wanted).failed} & asked
        self._failed |= failed
        if failed:
            vars(self).pop("errors", None)  # worked out anew when it is asked for
        return bool(failed)

    def winner(self, one: FoundNetwork, number: int) -> FoundNetwork:
        """Finetune a network from the library's weights, measure it, and save it."""
        settings = self.settings
        recipe = settings.finetuning(settings.winner_epochs)
        basis = digest_of(fingerprint(self.reference), one.variants, recipe, settings.blockwise)
        folder = self.out / "networks" / basis
        picks = self.space.picks(one.variants)
        if (folder / CONFIG).exists():
            network = VisionNetwork.load(folder).network
        else:
            network = self.assembled(picks)
            self._trained(network, recipe, self.reference, f"network {number + 1}", basis)
            blocks = [own[pick] for own, pick in zip(self.space.variants, picks, strict=True)]
            about = {"basis": basis, "variants": one.variants, "recipe": recipe.to_dict()}
            VisionNetwork.of(network, settings.reference, blocks, self.images.train, about).save(folder)
        return replace(
            one,
            validation=accuracy(network, self.images.validation),
            test=accuracy(network, self.images.test),
            folder=folder.relative_to(self.out).as_posix(),
        )

    def _trained(
        self, network: BlockNetwork, recipe: ImageRecipe, teacher: BlockNetwork | None, name: str, basis: str
    ) -> None:
        checkpoint = TrainingCheckpoint(self.out / "state" / f"{basis}.safetensors", basis)
        train(
            network,
            self.images.train,
            recipe,
            teacher=teacher,
            checkpoint=checkpoint,
            progress=self.progress,
            doing=f"training the {name}",
        )

    # -- report ----------------------------------------------------------------------------------------------

    def report(self, front: list[FoundNetwork]) -> SearchReport:
        """The numbers of all steps."""
        samples, predictor, images = self.samples, self.predictor, self.images
        scores = [sample.finetuned for sample in samples]
        picks = [self.space.picks(sample.variants) for sample in samples]
        parameters = [
            float(sum(self.library.entry(n, p).parameters for n, p in enumerate(own))) for own in picks
        ]
        times = [1000 * network_seconds(self.space, self.table, own) for own in picks]
        return SearchReport(
            classes=images.train.classes,
            images=(len(images.train), len(images.validation), len(images.test)),
            unreadable=images.unreadable,
            device=self.table.device,
            runtime=self.table.runtime,
            num_networks=self.space.num_networks,
            reference=self._reference_found(),
            failed_variants=tuple(
                f"{block}/{name}"
                for block, name in sorted({(e.block, e.variant) for e in self.library.failed} | self._failed)
            ),
            kendall_tau=predictor.kendall_tau,
            kendall_tau_sum=kendall_tau([-sum(self.block_errors(s.variants)) for s in samples], scores),
            kendall_tau_assembled=kendall_tau([s.assembled for s in samples], scores),
            kendall_tau_parameters=kendall_tau(parameters, scores),
            error=predictor.error,
            samples=tuple(zip(times, scores, strict=True)),
            front=tuple(front),
            seconds={name: round(value, 1) for name, value in self.seconds.items()},
        )

    def _reference_found(self) -> FoundNetwork:
        reference, images = self.reference, self.images
        milliseconds = None
        if self.settings.with_reference_blocks:
            milliseconds = 1000 * network_seconds(self.space, self.table, (0,) * len(self.space.sites))
        return FoundNetwork(
            variants=("reference",) * len(self.space.sites),
            milliseconds=milliseconds,
            parameters=num_parameters(reference),
            macs=num_macs(reference, self.space.example),
            predicted=self.predictor.predict([0.0] * len(self.space.sites)),
            validation=accuracy(reference, images.validation),
            test=accuracy(reference, images.test),
            folder="reference",
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Add the time of a step, but for that of the steps within it."""
        started, told = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - told
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started - within


def evenly_spaced(num: int, count: int) -> list[int]:
    """At most `count` of `num` places, the first and the last among them; of one place the last."""
    count = min(count, num)
    if count == 1:
        return [num - 1]
    return sorted({round(i * (num - 1) / (count - 1)) for i in range(count)})
