"""Examples: a corpus with the labels that a model is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modicum.errors import InputError
from modicum.speech.acoustic_model import Criterion
from modicum.speech.corpus import FeatureCorpus
from modicum.speech.faults import listed
from modicum.speech.manifest import Utterance
from modicum.speech.tokens import SILENCE, TokenSet

NO_LABEL = -1


@dataclass(frozen=True)
class FrameRate:
    """Output frames of a model.

    Attributes:
        criterion: what its classes are trained by.
        subsampling: feature frames for each output frame.
    """

    criterion: Criterion
    subsampling: int

    def num_frames(self, num_features: int) -> int:
        """Output frames of so many feature frames."""
        return -(-num_features // self.subsampling)


class Examples:
    """The rows of a corpus that a model can learn from, with their labels.

    A row is left out, and named in a warning, if its text has unknown letters or has more tokens than CTC
    can fit into the output frames. Output frames are counted over all rows, also those left out: recorded
    targets have these frames in this order.

    Attributes:
        corpus: of the features.
        tokens: of the labels.
        rate: of the model.
        rows: that can be used.

    Raises:
        InputError: none can be used, or the tokens are not of the criterion.
    """

    def __init__(self, corpus: FeatureCorpus, tokens: TokenSet, rate: FrameRate) -> None:
        if (tokens.kind == "thirds") != (rate.criterion == "frames"):
            raise InputError(
                f"a model trained by {rate.criterion} has no use for tokens that are {tokens.kind}: give "
                "thirds of phones to a frames model, and graphemes or phones to the others"
            )
        self.corpus, self.tokens, self.rate = corpus, tokens, rate
        lengths = [rate.num_frames(corpus.num_frames(row)) for row in range(len(corpus))]
        self._starts = [0, *accumulate(lengths)]
        self._labels: dict[int, Tensor] = {}
        faults: list[str] = []
        for row, utterance in enumerate(corpus.utterances):
            try:
                self._labels[row] = self._label(row, utterance)
            except InputError as error:
                faults.append(f"{utterance.audio.name}: {error}")
        self.rows = list(self._labels)
        if not self.rows:
            raise InputError(f"no utterance can be learned from: {listed(faults)}")
        if faults:
            warnings.warn(
                f"{len(faults):,} of {len(corpus):,} utterances left out: {listed(faults)}", stacklevel=2
            )

    @property
    def num_frames(self) -> int:
        """Output frames of all rows of the corpus."""
        return self._starts[-1]

    def span(self, row: int) -> tuple[int, int]:
        """The row's first output frame among all, and the one after its last."""
        return self._starts[row], self._starts[row + 1]

    def labels(self, row: int) -> Tensor:
        """Tokens [L] int64 for CTC, or a class for each output frame [T'] int64."""
        return self._labels[row]

    def _label(self, row: int, utterance: Utterance) -> Tensor:
        start, end = self.span(row)
        if self.rate.criterion == "frames":
            if not utterance.phones:
                raise InputError("it has no phones")
            shift = 1 / self.corpus.settings.features.frames_per_second
            labels = self.tokens.frame_labels(utterance.phones, self.corpus.num_frames(row), shift)
            return labels[:: self.rate.subsampling]
        classes = torch.tensor(self.tokens.encode(reference_text(utterance, self.tokens)), dtype=torch.int64)
        # CTC puts a blank between two equal tokens.
        needed = len(classes) + int((classes[1:] == classes[:-1]).sum())
        if not needed:
            raise InputError(f"it has no {self.tokens.kind}")
        if needed > end - start:
            raise InputError(f"CTC needs {needed} output frames for its text, and it has {end - start}")
        return classes


def reference_text(utterance: Utterance, tokens: TokenSet) -> str:
    """What a model with these tokens should say: the text, or the phones with spaces between."""
    if tokens.kind == "graphemes":
        return utterance.text
    return " ".join(interval.phone for interval in utterance.phones if interval.phone != SILENCE)


@dataclass(frozen=True)
class Batch:
    """Utterances of a step."""

    rows: list[int]
    features: Tensor
    """[N, T, F] float32, padded with 0."""
    lengths: Tensor
    """[N] int64, feature frames."""
    labels: Tensor
    """Tokens of all utterances one after another [ΣL] int64; or frame labels [N, T'], NO_LABEL in padding."""
    label_lengths: Tensor
    """[N] int64"""


def collate(examples: Examples, rows: Sequence[int], features: Sequence[Tensor]) -> Batch:
    """A batch of rows with their features, each [T, F]."""
    labels = [examples.labels(row) for row in rows]
    if examples.rate.criterion == "frames":
        joined = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
    else:
        joined = torch.cat(labels)
    return Batch(
        list(rows),
        pad_sequence(list(features), batch_first=True),
        torch.tensor([len(one) for one in features]),
        joined,
        torch.tensor([len(one) for one in labels]),
    )
