"""Make the recognizer that modicum carries: speech, training, compression, and the numbers of its card.

    python tools/embedded_speech.py speech WORK     # synthetic speech by espeak-ng
    python tools/embedded_speech.py train WORK      # a float model; a run that was stopped goes on
    python tools/embedded_speech.py compress WORK   # 8 bits, into WORK/embedded
    python tools/embedded_speech.py measure WORK [--digits FOLDER] [--orders FOLDER]

All sentences are of small grammars of our own; no recording of a person is learned from.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.speech import (
    AddNoise,
    CorpusSettings,
    FeatureSettings,
    GreedyDecoder,
    NoiseSettings,
    Recipe,
    Recognizer,
    Synthesizer,
    TokenSet,
    Utterance,
    build_corpus,
    character_error_rate,
    read_digits,
    read_manifest,
    save_audio,
    train,
    word_error_rate,
    write_manifest,
)
from modicum.speech.audio import SAMPLE_RATE, resample
from modicum.speech.augment import change_speed
from modicum.speech.compact.compression import compress_recognizer
from modicum.speech.compact.packed_file import save_packed
from modicum.speech.compact.pruning import PruningSettings
from modicum.speech.compact.refining import RefiningRecipe
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.compact.word_search import WordSearch, read_words
from modicum.speech.decoding import Decoder
from modicum.speech.digits import WORDS
from modicum.speech.synthesis import ACCENTS, DOMAINS, Voice, split_voices

HOURS = {"train": 4.0, "dev": 0.1, "test": 0.25}
"""Of speech; dev and test are by held-out voices, half of them each."""
HELD_OUT = 12
FEATURES = FeatureSettings(num_mels=40, normalization="none", high_frequency=-400)
"""Not normalised, so that it can be streamed; up to 400 Hz below half the rate, as sherpa-onnx has it."""
MODEL = SanmSettings(
    subsampling=4,
    width=128,
    num_layers=5,
    hidden=384,
    kernel=11,
    shift=2,
    attention_left=16,
    attention_right=3,
)
RECIPE = Recipe(model=MODEL, epochs=12, batch_seconds=60, learning_rate=2e-3, save_every=100)
REFINING = RefiningRecipe(
    replace(RECIPE, epochs=4, learning_rate=1e-3), PruningSettings(), bits=8, quantize_from=0.3
)

SIZES = ("small", "medium", "large", "eight ounce", "twelve ounce", "sixteen ounce", "twenty ounce")
ROASTS = ("light roast", "medium roast", "dark roast")
SHOTS = ("single shot", "double shot", "triple shot")
DRINKS = (
    "coffee", "iced coffee", "drip coffee", "house coffee", "americano", "cappuccino", "espresso", "latte",
    "mocha", "iced mocha", "black tea", "green tea", "hot chocolate",
)  # fmt: skip
ADDED = (
    "milk", "skim milk", "whole milk", "soy milk", "almond milk", "oat milk", "cream", "sugar", "brown sugar",
    "sweetener", "honey", "cinnamon",
)  # fmt: skip
AMOUNTS = ("", "some", "a bit of", "a little bit of", "a lot of", "lots of", "no more", "plenty of")
OPENINGS = (
    "please bring me", "i will take", "we would like", "could we get", "order", "i need", "can i get",
    "may i have", "i want", "make me", "give me", "get me", "let us have", "for me", "add", "",
)  # fmt: skip


def order(chance: random.Random) -> str:
    """A drink and what goes into it, in an order of its own."""
    pick = chance.choice
    before = [pick(SIZES)] if chance.random() < 0.45 else []
    before += [pick(ROASTS)] if chance.random() < 0.4 else []
    before += [pick(SHOTS)] if chance.random() < 0.4 else []
    chance.shuffle(before)
    words = [pick(OPENINGS), pick(["a", "an", "one", "the", ""]), *before, pick(DRINKS)]
    if chance.random() < 0.65:
        words += [pick(["with", "and", "plus"]), pick(AMOUNTS), pick(ADDED)]
        if chance.random() < 0.5:
            words += [pick(["and", "with", "but"]), pick(AMOUNTS), pick(ADDED)]
    if chance.random() < 0.1:
        words.append(pick(["please", "to go", "thank you"]))
    return " ".join(" ".join(words).split())


def phrase(chance: random.Random) -> str:
    """A slot alone, as an answer to a question."""
    pick = chance.choice
    return pick(
        [pick(SIZES), pick(ROASTS), pick(SHOTS), pick(DRINKS), f"{pick(AMOUNTS)} {pick(ADDED)}".strip()]
    )


def text(chance: random.Random) -> str:
    """What is said: orders, digits alone and in strings, commands to a house, statements."""
    kinds: Sequence[tuple[float, Callable[[random.Random], str]]] = (
        (0.36, order),
        (0.08, phrase),
        (0.14, lambda c: c.choice(WORDS)),
        (0.12, lambda c: " ".join(c.choice(WORDS) for _ in range(c.randint(2, 6)))),
        (0.18, DOMAINS["commands"]),
        (0.12, DOMAINS["statements"]),
    )
    (make,) = chance.choices([make for _, make in kinds], [weight for weight, _ in kinds])
    return make(chance)


def speak(work: Path) -> None:
    """Write the speech of each split, with a manifest."""
    with Synthesizer() as synthesizer:
        voices = split_voices(synthesizer.variants, None, HELD_OUT)
        held_out = [voice.variant for voice in voices.held_out]
        variants = {
            "train": [voice.variant for voice in voices.train],
            "dev": held_out[: HELD_OUT // 2],
            "test": held_out[HELD_OUT // 2 :],
        }
        for split, hours in HOURS.items():
            folder = work / split
            if (folder / "manifest.jsonl").exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            seconds, rows = 0.0, []
            while seconds < hours * 3600:
                rows.append(_utterance(folder, split, len(rows), variants[split], synthesizer))
                seconds += rows[-1].duration
                if len(rows) % 500 == 0:
                    print(
                        f"{split}: {seconds / 60:.0f} of {hours * 60:.0f} minutes",
                        file=sys.stderr,
                        flush=True,
                    )
            write_manifest(folder / "manifest.jsonl", rows)


def _utterance(
    folder: Path, split: str, number: int, variants: Sequence[str], synthesizer: Synthesizer
) -> Utterance:
    chance = random.Random(f"embedded {split} {number}")
    said = text(chance)
    voice = Voice(
        chance.choice(ACCENTS),
        chance.choice(list(variants)),
        chance.randint(20, 80),
        chance.randint(125, 205),
    )
    speech = synthesizer.speak(said, voice)
    samples = degraded(resample(speech.samples, speech.sample_rate, SAMPLE_RATE), chance)
    path = folder / f"{number:06d}.flac"
    save_audio(path, samples, SAMPLE_RATE)
    return Utterance(path, said, voice.name, len(samples) / SAMPLE_RATE)


def degraded(samples: Tensor, chance: random.Random) -> Tensor:
    """As over some microphone in some room: speed, silence, echo, a telephone's band, noise and gain."""
    generator = torch.Generator().manual_seed(chance.getrandbits(62))
    samples = change_speed(samples, chance.uniform(0.85, 1.15))
    silence = [torch.zeros(int(SAMPLE_RATE * chance.uniform(0, 0.35))) for _ in range(2)]
    samples = torch.cat([silence[0], samples, silence[1]])
    if chance.random() < 0.5:
        samples = echoed(samples, chance.uniform(0.05, 0.5), generator)
    if chance.random() < 0.3:
        samples = resample(resample(samples, SAMPLE_RATE, 8000), 8000, SAMPLE_RATE)
    if chance.random() < 0.4:
        tilt = chance.uniform(-0.7, 0.7)
        samples = samples + tilt * torch.cat([torch.zeros(1), samples[:-1]])
    if chance.random() < 0.8:
        samples = AddNoise(NoiseSettings((5.0, 40.0)))(samples, generator)
    return samples / samples.abs().max() * 10 ** (-chance.uniform(2, 30) / 20)


def echoed(samples: Tensor, decay_seconds: float, generator: torch.Generator) -> Tensor:
    """Convolved with noise that falls by 60 dB in so many seconds, behind the direct sound."""
    size = int(decay_seconds * SAMPLE_RATE)
    fall = torch.exp(-6.9 * torch.arange(size) / size)
    response = torch.randn(size, generator=generator) * fall * 0.05
    response[0] = 1
    length = len(samples) + size
    product = torch.fft.rfft(samples, length) * torch.fft.rfft(response, length)
    return torch.fft.irfft(product, length)[: len(samples)]


def train_float(work: Path) -> None:
    """Train the model on floating-point numbers."""
    corpus = build_corpus(read_manifest(work / "train"), work / "features", CorpusSettings(FEATURES))
    tokens = TokenSet("graphemes", TokenSet.of_texts(["a"]).symbols)
    train(RECIPE, corpus, tokens, out=work / "float", progress=_tell)


def _tell(what: str, done: int, total: int) -> None:
    if done % 50 == 0:
        print(f"{what} {done}/{total}", file=sys.stderr, flush=True)


def compress(work: Path) -> None:
    """8 bits with training that sees the rounding, and the file."""
    recognizer = Recognizer.load(work / "float")
    corpus = build_corpus(read_manifest(work / "train"), work / "features", CorpusSettings(FEATURES))
    compact = compress_recognizer(
        recognizer, corpus, REFINING, state=work / "refining.safetensors", progress=_tell
    )
    nbytes = save_packed(compact, work / "embedded" / "recognizer.safetensors")
    print(f"{nbytes:,} bytes")
    words = sorted({word for row in read_manifest(work / "train") for word in row.text.split()})
    (work / "embedded" / "words.txt").write_text("\n".join(words) + "\n")


def measure(work: Path, digits: Path | None, orders: Path | None) -> None:
    """The numbers of the card, as JSON: of the float model and the packed one, free and with the list."""
    found: dict[str, Any] = {}
    words = read_words(work / "embedded" / "words.txt")
    rows = {"test": read_manifest(work / "test")}
    if digits is not None:
        # Indices 0 to 4 are the dataset's own test split.
        rows["digits"] = [x for x in read_digits(digits) if int(x.audio.stem.split("_")[2]) < 5]
    packed = work / "embedded" / "recognizer.safetensors"
    kinds = [("packed, list", packed, True), ("packed", packed, False), ("float", work / "float", False)]
    for name, path, has_list in kinds:
        recognizer = Recognizer.load(path)
        decoder = WordSearch.of(recognizer.tokens, words) if has_list else GreedyDecoder()
        found[name] = {split: _rates(recognizer, decoder, utterances) for split, utterances in rows.items()}
        if digits is not None and has_list:
            ten = WordSearch.of(recognizer.tokens, WORDS)
            found[name]["digits, list of ten"] = _rates(recognizer, ten, rows["digits"])
        if orders is not None:
            found[name]["orders"] = _slots(recognizer, decoder, orders)
        print(json.dumps(found, indent=1), flush=True)


def _rates(recognizer: Recognizer, decoder: Decoder, utterances: Sequence[Utterance]) -> dict[str, Any]:
    texts = [recognizer.transcribe(utterance.audio, decoder).text for utterance in utterances]
    references = [utterance.text for utterance in utterances]
    right = sum(text == reference for text, reference in zip(texts, references, strict=True))
    return {
        "utterances": len(texts),
        "wer": vars(word_error_rate(references, texts)),
        "cer": vars(character_error_rate(references, texts)),
        "whole": right,
    }


def _slots(recognizer: Recognizer, decoder: Decoder, folder: Path) -> dict[str, Any]:
    """Words of the slots of real orders that are among the words heard, and slots heard whole."""
    labels: dict[str, dict[str, str]] = json.loads((folder / "labels.json").read_text())
    words = heard = slots = whole = 0
    examples = []
    for name, wanted in sorted(labels.items()):
        text = recognizer.transcribe(folder / name, decoder).text
        left = Counter(text.split())
        for value in wanted.values():
            hits = 0
            for word in value.split():
                hits += left[word] > 0
                left[word] -= left[word] > 0
            words, heard = words + len(value.split()), heard + hits
            slots, whole = slots + 1, whole + (f" {value} " in f" {text} ")
        examples.append((text, wanted))
    return {
        "orders": len(labels),
        "slot words": words,
        "heard": heard,
        "slots": slots,
        "slots heard whole": whole,
        "examples": examples[:8],
    }


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["speech", "train", "compress", "measure"])
    parser.add_argument("work", type=Path, help="folder for speech and models")
    parser.add_argument("--digits", type=Path, help="the Free Spoken Digit Dataset, for measure")
    parser.add_argument("--orders", type=Path, help="recorded orders with labels.json, for measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = arguments.work
    if arguments.step == "measure":
        measure(work, arguments.digits, arguments.orders)
    else:
        {"speech": speak, "train": train_float, "compress": compress}[arguments.step](work)


if __name__ == "__main__":
    main()
