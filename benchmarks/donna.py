"""Architecture search for small photos: rankings, costs, fronts, peers. About two hours of one core a seed,
resumable.

    python benchmarks/donna.py --work FOLDER --data FOLDER          # measures what rows.jsonl does not have
    python benchmarks/donna.py --work FOLDER --data FOLDER --quick  # one small seed, minutes; for a trial
    python benchmarks/donna.py --work FOLDER --docs                 # docs/benchmarks_donna.json, tables

--data is a folder with train.zip and test.zip of class folders. One thread. Costs are seconds of processor
time, latencies processor time of a call on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from donna_peers import peer_search
from donna_sizes import QUICK, Sizes
from donna_tables import section
from measured_rows import append_row, read_rows, work_folder, write_docs

from modicum.measure.block_table import BlockTable, measure_blocks
from modicum.measure.runtimes import Runtime
from modicum.search.blockwise import BlockwiseSettings
from modicum.search.categories import predicted_errors
from modicum.search.latency import (
    block_seconds,
    check_latency,
    measure_networks,
    network_seconds,
    timed_blocks,
)
from modicum.search.milp import Option, choose
from modicum.search.network import BlockNetwork
from modicum.search.predictor import Predictor, kendall_tau
from modicum.search.samples import draw
from modicum.search.space import Picks
from modicum.vision.recipe import ImageRecipe
from modicum.vision.reference import ReferenceSettings
from modicum.vision.search import VisionSearch
from modicum.vision.search_images import SearchImages
from modicum.vision.settings import VisionSearchSettings
from modicum.vision.training import accuracy, train

RUNTIMES = (Runtime("onnxruntime"), Runtime("onnxruntime-int8"), Runtime("torch"))
MAIN = RUNTIMES[0]


class Bench:
    """One seed's search, and rows in a folder.

    Args:
        work: the folder.
        data: with train.zip and test.zip.
        sizes: how much.
        seed: of all that is random.
    """

    def __init__(self, work: Path, data: Path, sizes: Sizes, seed: int) -> None:
        self.work, self.data, self.sizes, self.seed = work, data, sizes, seed
        self.rows = read_rows(work)
        self.settings = VisionSearchSettings(
            reference=ReferenceSettings(channels=sizes.channels, strides=sizes.strides),
            recipe=ImageRecipe(epochs=sizes.epochs, seed=seed),
            space=sizes.space,
            variants_per_block=sizes.variants,
            blockwise=BlockwiseSettings(seed=seed),
            samples=sizes.samples,
            sample_epochs=sizes.sample_epochs,
            validation=sizes.validation,
            most_images=sizes.most_images,
            runtime=MAIN,
            seed=seed,
        )

    @cached_property
    def images(self) -> SearchImages:
        """Photos to learn from, to compare with, to test on."""
        return SearchImages.load(self.data / "train.zip", self.settings, self.data / "test.zip")

    @cached_property
    def run(self) -> VisionSearch:
        """The search."""
        return VisionSearch(self.images, self.work / f"seed{self.seed}", self.settings, tell)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of this seed, if there is one."""
        key = {"seed": self.seed, **key}
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        row = {"seed": self.seed, **row}
        append_row(self.work, row)
        self.rows.append(row)
        short = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
        print(short, file=sys.stderr, flush=True)

    def measure(self) -> None:
        """All that has no row yet."""
        self.ranking()
        for runtime in RUNTIMES:
            self.latency_check(runtime)
        self.winners()
        self.baselines()
        self.longer()
        self.finetuning()
        if self.sizes.has_peers:
            for method in ("random", "evolution"):
                self.peer(method)
        self.latencies()
        if self.seed == self.sizes.seeds[0]:
            self.repeat()

    # -- the predictor ---------------------------------------------------------------------------------------

    def ranking(self) -> None:
        """Kendall's τ of what may rank networks, and what it all costs."""
        if self.find(kind="ranking"):
            return
        run = self.run
        started = time.process_time()
        reference = run.reference
        if not self.find(kind="reference"):  # a row of its own: a stopped run loads the network
            self.add({"kind": "reference", "seconds": time.process_time() - started})
        trained = self.find(kind="reference")
        assert trained is not None
        samples = run.samples
        scores = [s.finetuned for s in samples]
        errors = [run.block_errors(s.variants) for s in samples]
        picks = [run.space.picks(s.variants) for s in samples]
        entries = [[run.library.entry(n, p) for n, p in enumerate(own)] for own in picks]
        fits = {}
        for count in range(5, len(samples) + 1, 5):
            # Fitted to the first, tested on the others; and with each left out.
            predictor = Predictor.fit(errors[:count], scores[:count])
            rest = [predictor.predict(row) for row in errors[count:]]
            fits[count] = {
                "left_out": predictor.kendall_tau,
                "error": predictor.error,
                "others": kendall_tau(rest, scores[count:]) if len(rest) > 3 else None,
            }
        started = time.process_time()
        run.front()
        self.add(
            {
                "kind": "ranking",
                "sum": kendall_tau([-sum(row) for row in errors], scores),
                "predictor": run.predictor.kendall_tau,
                "error": run.predictor.error,
                "weights": list(run.predictor.weights),
                "assembled": kendall_tau([s.assembled for s in samples], scores),
                "parameters": kendall_tau([float(sum(e.parameters for e in own)) for own in entries], scores),
                "macs": kendall_tau([float(sum(e.macs for e in own)) for own in entries], scores),
                "fits": fits,
                "categories": self.category_fits(),
                "samples": [[s.assembled, s.finetuned, *row] for s, row in zip(samples, errors, strict=True)],
                "reference": accuracy(reference, self.images.validation),
                "reference_test": accuracy(reference, self.images.test),
                "reference_seconds": trained["seconds"],
                "library_seconds": run.library.seconds,
                "variants": len(run.library.entries),
                "failed": len(run.library.failed),
                "sample_seconds": sum(s.seconds for s in samples),
                "front_seconds": time.process_time() - started,
                "networks": run.space.num_networks,
                "images": [len(self.images.train), len(self.images.validation), len(self.images.test)],
            }
        )

    def category_fits(self) -> list[float]:
        """For each block Kendall's τ of errors predicted from settings, each variant left out."""
        taus = []
        for number, own in enumerate(self.run.space.variants):
            known = {v: e.error for (n, v), e in self.run.library.entries.items() if n == number}
            predictor = predicted_errors(own, known)[1]
            if predictor is not None:
                taus.append(predictor.kendall_tau)
        return taus

    def repeat(self) -> None:
        """Kendall's τ between two finetunings of the samples, alike but for their seeds: what is random in an
        accuracy bounds what any predictor can reach.
        """
        if self.find(kind="repeat"):
            return
        run, recipe = self.run, self.settings.finetuning(self.sizes.sample_epochs)
        second = []
        for number, sample in enumerate(run.samples):
            tell("finetuning samples again", number, len(run.samples))
            network = run.assembled(run.space.picks(sample.variants))
            train(network, self.images.train, replace(recipe, seed=recipe.seed + 1), teacher=run.reference)
            second.append(accuracy(network, self.images.validation))
        first = [sample.finetuned for sample in run.samples]
        middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        sums = [-sum(run.block_errors(sample.variants)) for sample in run.samples]
        self.add(
            {
                "kind": "repeat",
                "between": kendall_tau(first, second),
                "sum": kendall_tau(sums, middle),
                "scores": second,
            }
        )

    # -- latency ---------------------------------------------------------------------------------------------

    def table(self, runtime: Runtime) -> BlockTable:
        """Block times of a runtime."""
        path = self.work / f"seed{self.seed}" / f"table-{runtime.name}.json"
        return measure_blocks(timed_blocks(self.run.space), runtime, path, progress=tell)

    def latency_check(self, runtime: Runtime) -> None:
        """Sums of block times beside ten networks end to end."""
        if self.find(kind="check", runtime=runtime.name):
            return
        picks = draw([list(range(size)) for size in self.run.space.sizes], 10, self.seed)
        check = check_latency(self.run.space, self.table(runtime), runtime, picks)
        self.add(
            {
                "kind": "check",
                "runtime": runtime.name,
                "tau": check.kendall_tau,
                "ratio": check.ratio.median,
                "low": check.ratio.low,
                "high": check.ratio.high,
                "predicted": list(check.predicted),
                "measured": list(check.measured),
            }
        )

    def best(self, runtime: Runtime, limit: float) -> Picks:
        """The network that is predicted to be the best within seconds by a table."""
        run, table = self.run, self.table(runtime)
        seconds, weights = block_seconds(run.space, table), run.predictor.weights
        groups = [
            [
                Option(-weights[n] * run.errors[n][variant.name], {"seconds": seconds[n][p]})
                for p, variant in enumerate(own)
            ]
            for n, own in enumerate(run.space.variants)
        ]
        zero = (0,) * len(groups)
        ends = network_seconds(run.space, table, zero) - sum(own[0] for own in seconds)
        return choose(groups, {"seconds": limit - ends}).picks

    def limits(self, runtime: Runtime) -> list[float]:
        """Seconds by the table, from the cheapest network to the reference."""
        space, table = self.run.space, self.table(runtime)
        whole = network_seconds(space, table, (0,) * len(space.sites))
        cheapest = [min(range(len(own)), key=own.__getitem__) for own in block_seconds(space, table)]
        least = network_seconds(space, table, tuple(cheapest))
        return [least + share * (whole - least) for share in self.sizes.shares]

    # -- trained networks ------------------------------------------------------------------------------------

    def trained(self, network: BlockNetwork, epochs: int, rate: float) -> tuple[BlockNetwork, dict[str, Any]]:
        """Train with the reference as the teacher, and measure."""
        started = time.process_time()
        recipe = replace(self.settings.recipe, epochs=epochs, learning_rate=rate)
        train(network, self.images.train, recipe, teacher=self.run.reference, progress=tell)
        seconds = time.process_time() - started
        told = {
            "epochs": epochs,
            "validation": accuracy(network, self.images.validation),
            "test": accuracy(network, self.images.test),
            "seconds": seconds,
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        return network, told

    def fresh(self, picks: Picks) -> BlockNetwork:
        """A network of the space whose blocks, stem and head have fresh weights."""
        torch.manual_seed(self.seed)
        network = self.run.space.assemble(picks, {})
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return network

    def winners(self) -> None:
        """The best networks within the limits of the main runtime, and of the one in int8."""
        for runtime in RUNTIMES[:2]:
            for share, limit in zip(self.sizes.shares, self.limits(runtime), strict=True):
                key = {"kind": "winner", "runtime": runtime.name, "share": share}
                if self.find(**key):
                    continue
                picks = self.best(runtime, limit)
                names = list(self.run.space.names(picks))
                predicted = self.run.predictor.predict(self.run.block_errors(names))
                same = next(
                    (
                        r
                        for r in self.rows
                        if r["kind"] == "winner" and r["seed"] == self.seed and r["variants"] == names
                    ),
                    None,
                )
                told = (
                    {k: same[k] for k in ("epochs", "validation", "test", "seconds", "parameters")}
                    if same
                    else (
                        self.trained(
                            self.run.assembled(picks), self.sizes.winner_epochs, self.settings.finetune_rate
                        )[1]
                    )
                )
                self.add(key | {"variants": names, "predicted": predicted} | told)

    def baseline(self, kind: str, factor: float, depth: int) -> BlockNetwork:
        """A network of a family."""
        channels = tuple(max(8, int(factor * c) // 8 * 8) for c in self.sizes.channels)
        settings = ReferenceSettings(kind, channels, self.sizes.strides, depth)  # type: ignore[arg-type]
        torch.manual_seed(self.seed)
        return settings.build(len(self.images.train.classes))

    def families(self) -> list[tuple[str, float, int]]:
        """Kind, factor of channels, depth."""
        return [
            *(("mobilenetv2", *one) for one in self.sizes.mobilenets),
            *(("residual", *one) for one in self.sizes.residuals),
        ]

    def baselines(self) -> None:
        """MobileNetV2-like and residual networks from fresh weights, with the same teacher, twice as long."""
        for kind, factor, depth in self.families():
            key = {"kind": "baseline", "family": kind, "factor": factor, "depth": depth}
            if not self.find(**key):
                network = self.baseline(kind, factor, depth)
                rate = self.settings.recipe.learning_rate
                self.add(key | self.trained(network, self.sizes.baseline_epochs, rate)[1])

    def longer(self) -> None:
        """The winners of the main runtime again from the library's weights, for as long as the families."""
        for winner in [r for r in self.rows if r["kind"] == "winner" and r["runtime"] == MAIN.name]:
            key = {"kind": "longer", "share": winner["share"]}
            if winner["seed"] == self.seed and not self.find(**key):
                network = self.run.assembled(self.run.space.picks(winner["variants"]))
                told = self.trained(network, self.sizes.baseline_epochs, self.settings.finetune_rate)[1]
                self.add(key | {"variants": winner["variants"]} | told)

    def finetuning(self) -> None:
        """The network of the middle limit from the library's weights and from fresh ones, for some epochs."""
        limits = self.limits(MAIN)
        picks = self.best(MAIN, limits[len(limits) // 2])
        for start, counts in (("library", self.sizes.library_epochs), ("fresh", self.sizes.scratch_epochs)):
            for epochs in counts:
                key = {"kind": "epochs", "start": start, "epochs": epochs}
                if not self.find(**key):
                    is_library = start == "library"
                    network = self.run.assembled(picks) if is_library else self.fresh(picks)
                    rate = self.settings.finetune_rate if is_library else self.settings.recipe.learning_rate
                    self.add(key | self.trained(network, epochs, rate)[1])

    def peer(self, method: str) -> None:
        """A search that trains each candidate, at the cost of library and samples, within the middle limit.

        Candidates are trained from fresh weights for as long as a sample, with the same teacher; the one with
        the best validation accuracy is trained as long as a winner.
        """
        if self.find(kind="peer", method=method):
            return
        ranking = self.find(kind="ranking")
        assert ranking is not None
        budget = self.sizes.peer_share * (ranking["library_seconds"] + ranking["sample_seconds"])
        limits, table, space = self.limits(MAIN), self.table(MAIN), self.run.space
        limit, rate = limits[len(limits) // 2], self.settings.recipe.learning_rate
        key = {"kind": "candidate", "method": method}
        done = [r for r in self.rows if (key | {"seed": self.seed}).items() <= r.items()]

        def tried(number: int, picks: Picks) -> tuple[float, float]:
            names = list(space.names(picks))
            if number < len(done):
                row = done[number]
                assert row["variants"] == names, "the draws of a stopped run are repeated"
            else:
                row = key | {"variants": names}
                row |= self.trained(self.fresh(picks), self.sizes.sample_epochs, rate)[1]
                self.add(row)
            return row["validation"], row["seconds"]

        def fits(picks: Picks) -> bool:
            return network_seconds(space, table, picks) <= limit

        found = peer_search(method, space.sizes, fits, tried, budget, self.seed)
        told = self.trained(self.fresh(found.picks), self.sizes.winner_epochs, rate)[1]
        about = {"kind": "peer", "method": method, "candidates": found.candidates, "spent": found.spent}
        self.add(about | {"variants": list(space.names(found.picks))} | told)

    # -- end to end ------------------------------------------------------------------------------------------

    def latencies(self) -> None:
        """Milliseconds end to end of all trained networks, in turn."""
        space = self.run.space
        networks: dict[str, BlockNetwork] = {"reference": self.run.reference}
        for row in self.rows:
            if row["seed"] == self.seed and row["kind"] in ("winner", "peer"):
                networks["|".join(row["variants"])] = space.assemble(space.picks(row["variants"]), {})
        for kind, factor, depth in self.families():
            networks[f"{kind} {factor} {depth}"] = self.baseline(kind, factor, depth)
        for runtime in RUNTIMES[:2]:
            if not self.find(kind="latencies", runtime=runtime.name):
                shape = self.settings.reference.example.shape[1:]
                spreads = measure_networks(list(networks.values()), shape, runtime)
                told = {name: 1000 * spread.median for name, spread in zip(networks, spreads, strict=True)}
                self.add({"kind": "latencies", "runtime": runtime.name, "milliseconds": told})


def tell(doing: str, done: int, total: int) -> None:
    """Progress on stderr, now and then."""
    if done == total or done % 200 == 0:
        print(f"\r{doing}: {done} of {total}   ", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="rows, libraries and tables")
    parser.add_argument("--data", type=Path, help="train.zip and test.zip")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--no-peers", action="store_true", help="without random search and evolution")
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument("--docs", action="store_true", help="write the tables")
    options = parser.parse_args()
    if options.docs:
        write_docs(options.work, section, "benchmarks_donna.json", "search.md", "donna")
        return
    if options.data is None:
        parser.error("--data is needed to measure")
    torch.set_num_threads(1)
    options.work = work_folder(options.work, options.quick)
    sizes = replace(QUICK if options.quick else Sizes(), has_peers=not options.no_peers)
    seeds = sizes.seeds if options.seeds is None else tuple(map(int, options.seeds.split(",")))
    for seed in seeds:
        Bench(options.work, options.data, sizes, seed).measure()
    if options.quick:
        print(
            section(
                {
                    "date": "today",
                    "machine": {"processor": "?", "torch": torch.__version__},
                    "rows": read_rows(options.work),
                }
            )
        )


if __name__ == "__main__":
    main()
