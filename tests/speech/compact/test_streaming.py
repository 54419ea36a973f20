"""Streaming and ONNX: the same text as for the whole file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modicum.cli.speech_stream import stream_text
from modicum.errors import InputError, ModelError
from modicum.speech import (
    ConvCtcSettings,
    ConvDfsmnCtcSettings,
    CorpusSettings,
    DfsmnCtcSettings,
    Fbank,
    FeatureSettings,
    FrameModelSettings,
    ModelSettings,
    Recipe,
    Recognizer,
    TokenSet,
    Wav2letterCtcSettings,
    build_corpus,
    load_audio,
    save_audio,
    train,
)
from modicum.speech.compact.context import model_context
from modicum.speech.compact.onnx_export import export_onnx, tokens_txt
from modicum.speech.compact.sanm import SanmSettings
from modicum.speech.compact.streaming import StreamingRecognizer, _Chunks, read_blocks
from modicum.speech.frame_norm import FrameNorm
from tests.speech.conftest import TOKENS, Tones

FEATURES = FeatureSettings(normalization="none", high_frequency=-400)
SANM = SanmSettings(
    subsampling=2, width=32, num_layers=1, num_heads=2, hidden=96, kernel=7, shift=1, attention_left=6,
    attention_right=2,
)  # fmt: skip
LIMITED: list[ModelSettings] = [
    ConvCtcSettings(subsampling=3, width=8, num_blocks=2, kernel=5),
    DfsmnCtcSettings(subsampling=2, hidden=8, projection=6, num_layers=2, left=3, right=2, right_stride=2),
    SanmSettings(
        subsampling=2, width=8, num_layers=2, num_heads=2, hidden=8, kernel=5, shift=2, attention_left=4,
        attention_right=0, rank=1, adapter=2,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def streamed(tones: Tones, tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    """A trained recognizer that can be streamed."""
    folder = tmp_path_factory.mktemp("streamed")
    corpus = build_corpus(tones.utterances, folder, CorpusSettings(FEATURES))
    recipe = Recipe(model=SANM, epochs=25, batch_seconds=8, learning_rate=1e-2, spec_augment=False)
    return train(recipe, corpus, TOKENS).recognizer


def built(model: ModelSettings) -> Recognizer:
    torch.manual_seed(0)
    module = model.build(6, 5).eval()
    for one in module.modules():
        if isinstance(one, FrameNorm):
            nn.init.normal_(one.bias)
    return Recognizer(module, TokenSet("graphemes", ("a", "b", "c", "d")), replace(FEATURES, num_mels=6))


@pytest.mark.parametrize("model", LIMITED, ids=lambda model: model.name)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), size=st.integers(1, 90), chunk=st.integers(1, 9))
@settings(max_examples=25)
def test_chunks_give_the_logits_of_the_whole(
    model: ModelSettings, cuts: list[int], size: int, chunk: int
) -> None:
    recognizer = built(model)
    features = torch.randn(size, 6)
    whole = recognizer.logits(features)
    chunks, parts, at = _Chunks(recognizer.model, chunk), [], 0
    context = model_context(model)
    for cut in sorted(cuts):
        cut = min(cut, size)
        parts.append(chunks.add(features[at:cut], is_last=False))
        at = cut
        waiting = chunk * model.subsampling
        assert chunks.num_kept <= context.left + context.right + waiting + 2 * model.subsampling
    parts.append(chunks.add(features[at:], is_last=True))
    together = torch.cat(parts)
    assert together.shape == whole.shape
    # The same sums in kernels of another size: a few hundred roundings of numbers of this size.
    assert float((together - whole).abs().max()) <= 1000 * 6e-8 * (1 + float(whole.abs().max()))


@pytest.mark.parametrize("model", LIMITED, ids=lambda model: model.name)
def test_the_context_of_a_model_is_what_its_outputs_depend_on(model: ModelSettings) -> None:
    recognizer = built(model)
    context, stride = model_context(model), model.subsampling
    size, at = 120, 60
    features = torch.randn(size, 6, requires_grad=True)
    logits = recognizer.model(features[None], torch.tensor([size]))[0]
    torch.autograd.backward(logits[at // stride].square().sum())
    assert features.grad is not None
    seen = features.grad.abs().sum(1).nonzero().flatten()
    assert at - context.left <= int(seen.min())
    assert int(seen.max()) <= at + context.right


@pytest.mark.parametrize("block", [1, 160, 1000, 5000, 10**6])
def test_a_stream_gives_the_text_of_the_whole_file(streamed: Recognizer, tones: Tones, block: int) -> None:
    heard = []
    for utterance in tones.test.utterances[: 1 if block == 1 else 8]:
        samples = load_audio(utterance.audio)
        stream = StreamingRecognizer(streamed)
        pieces = [stream.accept(part) for part in samples[:8000].split(block)]
        pieces += [stream.accept(part) for part in samples[8000:].split(block)] if block > 1 else []
        pieces.append(stream.finish())
        said = samples[:8000] if block == 1 else samples
        assert "".join(pieces) == stream.text == streamed.transcribe(said).text
        heard.append(stream.text == utterance.text)
    assert block == 1 or sum(heard) >= 4  # it does recognise


def test_memory_does_not_grow_with_the_audio(streamed: Recognizer) -> None:
    stream = StreamingRecognizer(streamed, chunk_seconds=0.2)
    kept = []
    for _ in range(100):
        stream.accept(0.1 * torch.randn(1600))
        kept.append(stream.num_kept_frames)
    context = model_context(streamed.model.settings)
    assert max(kept) <= context.left + context.right + 20 + 10 + 2 * SANM.subsampling
    assert max(kept[50:]) == max(kept[20:50])


def test_memory_does_not_grow_with_what_comes_at_once(streamed: Recognizer) -> None:
    torch.manual_seed(0)
    samples = 0.1 * torch.randn(16_000 * 20)
    frames: list[int] = []
    hook = streamed.model.register_forward_pre_hook(lambda _, given: frames.append(given[0].shape[1]))
    texts = []
    try:
        for size in (len(samples), 1600):
            stream = StreamingRecognizer(streamed, chunk_seconds=0.2)
            for block in samples.split(size):
                stream.accept(block)
            stream.finish()
            texts.append(stream.text)
    finally:
        hook.remove()
    context = model_context(streamed.model.settings)
    assert max(frames) <= context.left + context.right + 20 + 2 * SANM.subsampling
    assert texts[0] == texts[1]


@given(cuts=st.lists(st.integers(0, 90), max_size=6), chunk=st.integers(1, 9))
@settings(max_examples=25)
def test_logits_are_the_same_numbers_however_features_come(cuts: list[int], chunk: int) -> None:
    recognizer = built(LIMITED[1])
    features = torch.randn(90, 6)
    divided, at = _Chunks(recognizer.model, chunk), 0
    parts = []
    for cut in [*sorted(cuts), 90]:
        parts.append(divided.add(features[at:cut], is_last=False))
        at = cut
    parts.append(divided.add(features[90:], is_last=True))
    assert torch.equal(torch.cat(parts), _Chunks(recognizer.model, chunk).add(features, is_last=True))


def test_ctrl_c_in_a_file_leaves_out_the_files_after_it(
    streamed: Recognizer, tones: Tones, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (load_audio(one.audio) for one in tones.test.utterances[:2])
    opened: list[str] = []

    def blocks(path: Path, rate: int) -> Iterator[torch.Tensor]:
        opened.append(path.name)
        yield first[:8000] if path.name == "one" else second
        if path.name == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr("modicum.speech.compact.streaming.read_blocks", blocks)
    stream_text(streamed, [Path("one"), Path("two")])
    assert opened == ["one"]
    assert capsys.readouterr().out == streamed.transcribe(first[:8000]).text + "\n"
    stream_text(streamed, [Path("two"), Path("two")])
    assert opened == ["one", "two", "two"]


def test_damage_in_the_middle_of_a_file_is_told_after_the_text_before_it(
    streamed: Recognizer, tones: Tones, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = load_audio(tones.test.utterances[0].audio).repeat(4)
    path = tmp_path / "a.flac"
    save_audio(path, samples)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    heard: list[torch.Tensor] = []
    with pytest.raises(InputError, match=r"a\.flac cannot be read as audio"):
        heard.extend(read_blocks(path, 16_000))
    assert heard
    with pytest.raises(InputError, match=r"a\.flac cannot be read as audio"):
        stream_text(streamed, [path])
    assert capsys.readouterr().out == streamed.transcribe(torch.cat(heard)).text + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_unicode_is_streamed(tmp_path: Path) -> None:
    samples = 0.1 * torch.sin(torch.arange(4000) * 0.2)
    save_audio(tmp_path / "a.wav", samples)
    path = tmp_path / os.fsdecode(b"\xff.wav")
    (tmp_path / "a.wav").rename(path)
    assert torch.equal(torch.cat(list(read_blocks(path, 16_000))), load_audio(path))


def test_streams_are_refused_where_they_cannot_be(streamed: Recognizer) -> None:
    whole = Recognizer(streamed.model, TOKENS, FeatureSettings())
    with pytest.raises(ModelError, match="normalised over the whole utterance"):
        StreamingRecognizer(whole)
    unlimited = SanmSettings(width=8, num_layers=1, num_heads=1, hidden=8).build(40, 4).eval()
    with pytest.raises(ModelError, match="cannot be streamed"):
        StreamingRecognizer(Recognizer(unlimited, TOKENS, FEATURES))
    frames = FrameModelSettings(width=4, num_layers=1).build(40, 6).eval()
    with pytest.raises(ModelError, match="only CTC models"):
        StreamingRecognizer(Recognizer(frames, TokenSet("thirds", ("SIL", "a")), FEATURES))
    with pytest.raises(ModelError, match="not known"):
        model_context(FrameModelSettings())
    with pytest.raises(InputError, match=r"a chunk has 0\.001 seconds"):
        StreamingRecognizer(streamed, 0.001)
    stream = StreamingRecognizer(streamed)
    with pytest.raises(InputError, match="inf or nan"):
        stream.accept(torch.tensor([float("nan")]))
    stream.accept(torch.zeros(10))
    with pytest.raises(InputError, match="10 samples make no frame"):
        stream.finish()
    with pytest.raises(InputError, match="the stream has ended"):
        stream.accept(torch.zeros(10))


@pytest.mark.parametrize("rate", [16_000, 8000, 44_100])
def test_blocks_of_a_file_are_its_samples(tmp_path: Path, rate: int) -> None:
    samples = 0.5 * torch.sin(torch.arange(rate) * 2 * torch.pi * 440 / rate)
    save_audio(tmp_path / "a.wav", samples, rate)
    blocks = list(read_blocks(tmp_path / "a.wav", 16_000))
    joined = torch.cat(blocks)
    assert max(len(one) for one in blocks) <= 2 * 1600
    if rate == 16_000:
        assert torch.equal(joined, load_audio(tmp_path / "a.wav"))
    assert abs(len(joined) - 16_000) <= 1
    middle = torch.arange(4000, 12_000)
    expected = 0.5 * torch.sin(middle * 2 * torch.pi * 440 / 16_000)
    assert float((joined[4000:12_000] - expected).abs().max()) < 1e-2


@pytest.fixture(scope="module")
def exported(streamed: Recognizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    folder = tmp_path_factory.mktemp("onnx")
    files = export_onnx(streamed, folder)
    assert files.is_for_sherpa
    return folder


def test_onnxruntime_gives_the_same_logits(exported: Path, streamed: Recognizer, tones: Tones) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = [Fbank(FEATURES)(load_audio(one.audio)) for one in tones.test.utterances[:3]]
    lengths = torch.tensor([len(one) for one in inputs])
    padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=-23.0)
    log_probs, frames = session.run(None, {"x": padded.numpy(), "x_lens": lengths.numpy()})
    for row, one in enumerate(inputs):
        expected = streamed.logits(one).log_softmax(-1).numpy()
        assert int(frames[row]) == len(expected)
        assert np.abs(log_probs[row, : len(expected)] - expected).max() <= 1e-3
    (alone, _) = session.run(None, {"x": inputs[0][None].numpy(), "x_lens": lengths[:1].numpy()})
    assert np.abs(alone[0] - streamed.logits(inputs[0]).log_softmax(-1).numpy()).max() <= 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        ConvCtcSettings(width=8, num_blocks=1, kernel=3),
        Wav2letterCtcSettings(width=8, num_layers=1, head=6),
        ConvDfsmnCtcSettings(hidden=8, projection=6, num_layers=2),
    ],
    ids=lambda settings: settings.name,
)
def test_normalisation_is_part_of_the_exported_model(
    settings: ModelSettings, tones: Tones, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    torch.manual_seed(1)
    recognizer = Recognizer(settings.build(40, 4).eval(), TOKENS, FeatureSettings())
    files = export_onnx(recognizer, tmp_path)
    assert not files.is_for_sherpa
    session = onnxruntime.InferenceSession(str(files.model), providers=["CPUExecutionProvider"])
    samples = load_audio(tones.test.utterances[0].audio)
    raw = Fbank(FeatureSettings(normalization="none"))(samples)
    expected = recognizer.logits(Fbank(FeatureSettings())(samples)).log_softmax(-1).numpy()
    for padding in (0, 9):
        padded = torch.cat([raw, torch.full((padding, 40), -23.0)])[None]
        log_probs, frames = session.run(None, {"x": padded.numpy(), "x_lens": np.array([len(raw)])})
        assert int(frames[0]) == len(expected)
        assert np.abs(log_probs[0, : len(expected)] - expected).max() <= 1e-3


def test_sherpa_onnx_decodes_the_same_text(exported: Path, streamed: Recognizer, tones: Tones) -> None:
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="the package sherpa-onnx is not installed")
    recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
        model=str(exported / "model.onnx"), tokens=str(exported / "tokens.txt"), feature_dim=40
    )
    texts = []
    for utterance in tones.test.utterances:
        stream = recognizer.create_stream()
        samples = load_audio(utterance.audio)
        stream.accept_waveform(16_000, samples.numpy())
        recognizer.decode_stream(stream)
        assert stream.result.text == streamed.transcribe(samples).text
        texts.append(stream.result.text)
    assert any(texts)


def test_tokens_are_written_as_sherpa_reads_them() -> None:
    model = ConvCtcSettings(width=4, num_blocks=1, kernel=3).build(40, 4)
    graphemes = Recognizer(model, TokenSet("graphemes", ("'", " ", "a")), FEATURES)
    assert tokens_txt(graphemes) == "<blk> 0\n' 1\n▁ 2\na 3\n"
    phones = Recognizer(model, TokenSet("phones", ("aa", "b", "c")), FEATURES)
    assert tokens_txt(phones) == "<blk> 0\n▁aa 1\n▁b 2\n▁c 3\n"


def test_an_export_that_cannot_be_is_refused(
    streamed: Recognizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = FrameModelSettings(width=4, num_layers=1).build(40, 6).eval()
    with pytest.raises(ModelError, match="only CTC models are exported"):
        export_onnx(Recognizer(frames, TokenSet("thirds", ("SIL", "a")), FEATURES), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'modicum\[speech-export\]'"):
        export_onnx(streamed, tmp_path)
