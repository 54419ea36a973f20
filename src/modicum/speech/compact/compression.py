"""Compression: a recognizer and data in, a compact recognizer out."""

from __future__ import annotations

import copy
from pathlib import Path

from modicum.distill.checkpoint import TrainingCheckpoint
from modicum.distill.targets import SparseTargets
from modicum.speech.acoustic_model import check_float
from modicum.speech.compact.compressed import CompactRecognizer, compress_weights
from modicum.speech.compact.refining import RefiningRecipe, refine
from modicum.speech.corpus import FeatureCorpus, Progress
from modicum.speech.examples import Examples, FrameRate
from modicum.speech.recognizer import Recognizer
from modicum.speech.teaching import check_targets, check_teachers


def compress_recognizer(
    recognizer: Recognizer,
    corpus: FeatureCorpus,
    recipe: RefiningRecipe | None = None,
    *,
    targets: SparseTargets | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> CompactRecognizer:
    """Prune and quantise a trained recognizer while it is trained on.

    Args:
        recognizer: trained, with layers shared or not; it is not changed.
        corpus: with the recognizer's features.
        recipe: how.
        targets: of the recognizer before, of an unshared one or of an ensemble, for this corpus.
        state: a file for a checkpoint, from which a run that was stopped goes on; None for none.
        progress: called with "refining", steps done, and in all.

    Raises:
        ModelError: the recognizer is an int8 one, the corpus has other features, or the loss is not a number.
        InputError: no utterance can be learned from, or the checkpoint is of another run.
        TargetsError: the targets are of other data or tokens.
    """
    recipe = recipe or RefiningRecipe()
    check_float(recognizer.model)
    check_teachers([recognizer], corpus)
    model = copy.deepcopy(recognizer.model)
    examples = Examples(corpus, recognizer.tokens, FrameRate(model.criterion, model.subsampling))
    if targets is not None:
        check_targets(targets, examples)
    checkpoint = None if state is None else TrainingCheckpoint(state, recipe.digest(model, examples, targets))
    losses = refine(model, examples, recipe, targets=targets, checkpoint=checkpoint, progress=progress)
    if checkpoint is not None:
        checkpoint.remove()
    about = {
        "sparsity": recipe.pruning.sparsity,
        "bits": recipe.bits,
        "steps": len(losses),
        "data": corpus.digest,
        "taught": targets is not None,
    }
    compact = Recognizer(model, recognizer.tokens, recognizer.features, about)
    return compress_weights(compact, recipe.bits, recipe.pruning.block)
