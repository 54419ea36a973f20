"""Packing: the most accurate recognizer that fits into a number of bytes, found by training a few."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modicum.distill.targets import SparseTargets
from modicum.errors import InputError, ModelError
from modicum.speech.acoustic_model import check_float
from modicum.speech.compact.candidates import Candidate, fitting_candidates
from modicum.speech.compact.compressed import CompactRecognizer
from modicum.speech.compact.compression import compress_recognizer
from modicum.speech.compact.packed_file import load_packed, save_packed
from modicum.speech.compact.refining import RefiningRecipe
from modicum.speech.corpus import CorpusSettings, FeatureCorpus, Progress, build_corpus
from modicum.speech.evaluation import evaluate
from modicum.speech.manifest import Utterance, read_manifest
from modicum.speech.recipe import Recipe
from modicum.speech.recognizer import Recognizer
from modicum.speech.scoring import Rate
from modicum.speech.teaching import TeachingSettings, record_targets
from modicum.speech.training import train
from modicum.whole_file import write_whole


@dataclass(frozen=True)
class PackSettings:
    """How `pack` searches.

    Attributes:
        budget: bytes of the file.
        trials: candidates that are trained, at most.
        train: of a candidate that begins from nothing, taught by the given model; its model is not read.
        refine: of every candidate; sparsity and bits are the candidate's.

    Raises:
        InputError: a value is out of range.
    """

    budget: int
    trials: int = 4
    train: Recipe = field(default_factory=lambda: Recipe(epochs=10))
    refine: RefiningRecipe = field(default_factory=RefiningRecipe)

    def __post_init__(self) -> None:
        if self.budget < 1 or self.trials < 1:
            raise InputError(
                f"the budget is {self.budget} bytes for {self.trials} trials: give 1 or more of each"
            )


@dataclass(frozen=True)
class Trial:
    """One candidate, trained and measured."""

    candidate: Candidate
    nbytes: int
    """Of its file."""
    error_rate: Rate
    """Of characters, or of phones."""
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        rate = vars(self.error_rate)
        return {"candidate": self.candidate.to_dict(), "nbytes": self.nbytes, "error_rate": rate}


def pack(
    recognizer: Recognizer,
    manifest: str | Path,
    out: str | Path,
    settings: PackSettings,
    *,
    test: str | Path,
    progress: Progress | None = None,
) -> list[Trial]:
    """Write the most accurate of a few candidates that fit into a budget.

    Each is trained on the manifest, with the given recognizer as its teacher, and measured on `test`. What is
    done is kept in the folder `out`.trials, from which a run that was stopped goes on. The choice among
    trials is made on the same utterances as their rates, so the best rate is a little better than new speech
    will show.

    Args:
        recognizer: trained, CTC.
        manifest: to learn from.
        out: the file.
        settings: budget and recipes.
        test: a manifest for the comparison, of utterances from which neither the candidates nor the given
            recognizer learned: some candidates begin with its weights, and those would be preferred for what
            it knows by heart. What it learned from is not known here; that none are in `manifest` is checked.
        progress: as in training.

    Returns:
        The trials, best first.

    Raises:
        InputError: nothing fits (the smallest that there can be is named), the data cannot be used, the two
            manifests share a file, or the folder is of another search.
        ModelError: the recognizer is no CTC model or an int8 one, or a file cannot be written.
    """
    if recognizer.model.criterion != "ctc":
        raise ModelError("only CTC models are packed: give a conv, dfsmn or sanm model")
    check_float(recognizer.model)
    candidates = fitting_candidates(recognizer, settings.budget)[: settings.trials]
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder: give the name of a file")
    folder = out.with_name(f"{out.name}.trials")
    learned, measured = read_manifest(manifest), read_manifest(test)
    _check_apart(learned, measured)
    corpora = [
        build_corpus(rows, folder / name, CorpusSettings(recognizer.features), progress)
        for name, rows in (("train", learned), ("test", measured))
    ]
    search = _Search(recognizer, corpora[0], corpora[1], settings, folder, progress)
    search.claim()
    trials = sorted((search.trial(one) for one in candidates), key=lambda one: one.error_rate.value)
    fitting = [one for one in trials if one.nbytes <= settings.budget]
    if not fitting:
        sizes = ", ".join(f"{one.candidate.label} {one.nbytes:,}" for one in trials)
        raise InputError(f"no trial fits into {settings.budget:,} bytes ({sizes}): give a larger budget")
    save_packed(load_packed(fitting[0].path), out)
    return fitting


@dataclass(frozen=True)
class _Search:
    recognizer: Recognizer
    train: FeatureCorpus
    test: FeatureCorpus
    settings: PackSettings
    folder: Path
    progress: Progress | None

    def claim(self) -> None:
        """Make the folder one of this search, or check that it is."""
        training, refining = self.settings.train, self.settings.refine
        basis = [
            self.recognizer.digest, self.train.digest, self.test.digest, training.to_dict(),
            refining.training.to_dict(), vars(refining.pruning), refining.quantize_from,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "search.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, digest)
        if path.read_text(encoding="utf-8") != digest:
            raise InputError(
                f"{self.folder} holds trials of another model, other data or recipes: repeat those to go "
                "on, or remove it"
            )

    def trial(self, candidate: Candidate) -> Trial:
        """Train and measure a candidate, or read what was found before."""
        path = self.folder / f"{candidate.label}.safetensors"
        told = path.with_suffix(".json")
        if not told.exists():
            compact = self._compact(candidate)
            nbytes = save_packed(compact, path)
            found = evaluate([compact.recognizer], self.test, progress=self.progress)
            rate = found.character_error_rate or found.phone_error_rate
            assert rate is not None
            write_whole(told, json.dumps({"nbytes": nbytes, "error_rate": vars(rate)}))
        saved = json.loads(told.read_text(encoding="utf-8"))
        return Trial(candidate, saved["nbytes"], Rate(**saved["error_rate"]), path)

    def _compact(self, candidate: Candidate) -> CompactRecognizer:
        targets = self._targets()
        begun = self.recognizer
        if candidate.is_new:
            place = self.folder / candidate.label
            recipe = replace(self.settings.train, model=candidate.model)
            if not (place / "recognizer.json").exists():
                train(recipe, self.train, begun.tokens, out=place, targets=targets, progress=self.progress)
            begun = Recognizer.load(place)
        refining = self.settings.refine
        recipe_of_it = replace(
            refining,
            pruning=replace(refining.pruning, sparsity=candidate.sparsity, block=candidate.block),
            bits=candidate.bits,
        )
        return compress_recognizer(
            begun,
            self.train,
            recipe_of_it,
            targets=targets,
            state=self.folder / f"{candidate.label}.state.safetensors",
            progress=self.progress,
        )

    def _targets(self) -> SparseTargets:
        keep = f"topk={min(10, self.recognizer.tokens.num_classes)}"
        teaching = TeachingSettings(keep)
        return record_targets([self.recognizer], self.train, self.folder / "targets", teaching, self.progress)


def _check_apart(learned: Sequence[Utterance], measured: Sequence[Utterance]) -> None:
    """Raise if a file is learned from and measured with."""
    known = {row.audio.resolve() for row in learned}
    shared = [row.audio for row in measured if row.audio.resolve() in known]
    if shared:
        raise InputError(
            f"{len(shared):,} of the {len(measured):,} utterances to compare with are learned from too, such "
            f"as {shared[0]}: give others as test"
        )
