"""Speech: audio, features, models and their training. Needs the extra "speech".

The names below load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy_names import lazy_names

if TYPE_CHECKING:
    from modicum.speech.acoustic_model import AcousticModel, ModelSettings
    from modicum.speech.audio import load_audio, save_audio
    from modicum.speech.augment import SpecAugment, SpeedPerturbation
    from modicum.speech.conv_ctc import ConvCtc, ConvCtcSettings
    from modicum.speech.conv_dfsmn import ConvDfsmnCtc, ConvDfsmnCtcSettings
    from modicum.speech.corpus import CorpusSettings, FeatureCorpus, build_corpus
    from modicum.speech.decoding import GreedyDecoder, Hypothesis, PrefixBeamSearch, greedy_decode
    from modicum.speech.dfsmn import DfsmnCtc, DfsmnCtcSettings
    from modicum.speech.digits import read_digits, split_speakers
    from modicum.speech.entry import TrainReport, TrainSettings, train_recognizer
    from modicum.speech.evaluation import Evaluation, evaluate
    from modicum.speech.features import Fbank, FeatureSettings
    from modicum.speech.frame_model import FrameModel, FrameModelSettings
    from modicum.speech.manifest import PhoneInterval, Utterance, read_manifest, write_manifest
    from modicum.speech.noise import AddNoise, NoiseSettings
    from modicum.speech.quantization import QuantizationResult, QuantizationSettings, quantize
    from modicum.speech.quantize_entry import QuantizeReport, quantize_recognizer
    from modicum.speech.recipe import Recipe
    from modicum.speech.recognizer import Recognizer, Transcript
    from modicum.speech.scoring import Rate, character_error_rate, word_error_rate
    from modicum.speech.sizes import model_settings
    from modicum.speech.synthesis import SynthesisSettings, Synthesizer, synthesize
    from modicum.speech.teaching import TeachingSettings, record_targets
    from modicum.speech.tokens import TokenSet
    from modicum.speech.training import TrainingResult, train
    from modicum.speech.viterbi import PhoneViterbi
    from modicum.speech.wav2letter import Wav2letterCtc, Wav2letterCtcSettings

_HOMES = {
    "acoustic_model": ("AcousticModel", "ModelSettings"),
    "audio": ("load_audio", "save_audio"),
    "conv_ctc": ("ConvCtc", "ConvCtcSettings"),
    "conv_dfsmn": ("ConvDfsmnCtc", "ConvDfsmnCtcSettings"),
    "corpus": ("CorpusSettings", "FeatureCorpus", "build_corpus"),
    "decoding": ("GreedyDecoder", "Hypothesis", "PrefixBeamSearch", "greedy_decode"),
    "dfsmn": ("DfsmnCtc", "DfsmnCtcSettings"),
    "entry": ("TrainReport", "TrainSettings", "train_recognizer"),
    "evaluation": ("Evaluation", "evaluate"),
    "features": ("Fbank", "FeatureSettings"),
    "frame_model": ("FrameModel", "FrameModelSettings"),
    "manifest": ("PhoneInterval", "Utterance", "read_manifest", "write_manifest"),
    "quantization": ("QuantizationResult", "QuantizationSettings", "quantize"),
    "quantize_entry": ("QuantizeReport", "quantize_recognizer"),
    "recipe": ("Recipe",),
    "recognizer": ("Recognizer", "Transcript"),
    "scoring": ("Rate", "character_error_rate", "word_error_rate"),
    "sizes": ("model_settings",),
    "teaching": ("TeachingSettings", "record_targets"),
    "tokens": ("TokenSet",),
    "synthesis": ("SynthesisSettings", "Synthesizer", "synthesize"),
    "digits": ("read_digits", "split_speakers"),
    "augment": ("SpecAugment", "SpeedPerturbation"),
    "noise": ("AddNoise", "NoiseSettings"),
    "training": ("TrainingResult", "train"),
    "viterbi": ("PhoneViterbi",),
    "wav2letter": ("Wav2letterCtc", "Wav2letterCtcSettings"),
}

__all__ = [  # noqa: RUF022  # in the order of the reader's interest
    "load_audio",
    "save_audio",
    "Fbank",
    "FeatureSettings",
    "Utterance",
    "PhoneInterval",
    "read_manifest",
    "write_manifest",
    "TokenSet",
    "CorpusSettings",
    "FeatureCorpus",
    "build_corpus",
    "AcousticModel",
    "ModelSettings",
    "ConvCtc",
    "ConvCtcSettings",
    "DfsmnCtc",
    "DfsmnCtcSettings",
    "ConvDfsmnCtc",
    "ConvDfsmnCtcSettings",
    "Wav2letterCtc",
    "Wav2letterCtcSettings",
    "FrameModel",
    "FrameModelSettings",
    "model_settings",
    "Recipe",
    "TrainingResult",
    "train",
    "TrainSettings",
    "TrainReport",
    "train_recognizer",
    "TeachingSettings",
    "record_targets",
    "QuantizationSettings",
    "QuantizationResult",
    "quantize",
    "QuantizeReport",
    "quantize_recognizer",
    "Recognizer",
    "Transcript",
    "GreedyDecoder",
    "PrefixBeamSearch",
    "Hypothesis",
    "greedy_decode",
    "Evaluation",
    "evaluate",
    "Rate",
    "word_error_rate",
    "character_error_rate",
    "PhoneViterbi",
    "SpecAugment",
    "SpeedPerturbation",
    "AddNoise",
    "NoiseSettings",
    "read_digits",
    "split_speakers",
    "synthesize",
    "SynthesisSettings",
    "Synthesizer",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
