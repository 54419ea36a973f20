"""Small data and recognizers that several tests use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from modicum.speech import (
    ConvCtcSettings,
    CorpusSettings,
    DfsmnCtcSettings,
    FeatureCorpus,
    FrameModelSettings,
    ModelSettings,
    Recipe,
    Recognizer,
    TokenSet,
    Utterance,
    build_corpus,
    train,
)
from tests.speech.tones import write_tones

TOKENS = TokenSet("graphemes", ("a", "b", "c"))
MODELS: dict[str, ModelSettings] = {
    "conv": ConvCtcSettings(width=32, num_blocks=2, kernel=7),
    "dfsmn": DfsmnCtcSettings(hidden=48, projection=24, num_layers=2, left=3, right=3),
    "frames": FrameModelSettings(width=24, num_layers=2, context=4),
}
QUICK = Recipe(
    model=MODELS["conv"], epochs=2, batch_seconds=8, learning_rate=5e-3, spec_augment=False, save_every=3
)


@dataclass(frozen=True)
class Tones:
    """To learn from and to test with: utterances in folders, and their corpora."""

    folder: Path
    """With manifest.jsonl."""
    test_folder: Path
    utterances: Sequence[Utterance]
    corpus: FeatureCorpus
    test: FeatureCorpus

    @property
    def thirds(self) -> TokenSet:
        return TokenSet.of_phones([one.phones for one in self.utterances], thirds=True)

    def tokens(self, model: str) -> TokenSet:
        return self.thirds if model == "frames" else TOKENS


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Tones:
    folder = tmp_path_factory.mktemp("tones")
    utterances = write_tones(folder / "train", 64)
    test = write_tones(folder / "test", 10, seed=1)
    return Tones(
        folder / "train",
        folder / "test",
        utterances,
        build_corpus(utterances, folder / "features", CorpusSettings()),
        build_corpus(test, folder / "test_features", CorpusSettings()),
    )


@pytest.fixture(scope="session")
def members(tones: Tones) -> dict[str, Recognizer]:
    """A recognizer of each model, trained for a moment."""
    return {
        name: train(replace(QUICK, model=settings, epochs=12), tones.corpus, tones.tokens(name)).recognizer
        for name, settings in MODELS.items()
    }


Stop = Callable[[int], Callable[[str, int, int], None]]


@pytest.fixture
def stop_at() -> Stop:
    """A progress function that presses Ctrl-C when so many steps of training are done."""

    def make(step: int) -> Callable[[str, int, int], None]:
        def progress(what: str, done: int, total: int) -> None:
            if what == "training" and done == step:
                raise KeyboardInterrupt

        return progress

    return make
