"""Corpora: features computed once, files that are left out, examples and batches."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech import (
    CorpusSettings,
    Fbank,
    FeatureSettings,
    PhoneInterval,
    TokenSet,
    Utterance,
    build_corpus,
    load_audio,
    save_audio,
)
from modicum.speech.batches import BatchPlan
from modicum.speech.examples import NO_LABEL, Examples, FrameRate, collate
from modicum.speech.noise import NoiseSettings
from tests.speech.conftest import TOKENS, Tones


def test_rows_are_the_features_of_the_files(tones: Tones) -> None:
    fbank = Fbank(FeatureSettings())
    assert len(tones.corpus) == len(tones.utterances)
    for row, utterance in enumerate(tones.utterances):
        expected = fbank(load_audio(utterance.audio))
        assert torch.equal(tones.corpus.features(row), expected)
        assert tones.corpus.num_frames(row) == len(expected)
    assert list(tones.corpus.utterances) == list(tones.utterances)


def test_a_folder_of_the_same_corpus_is_read_and_of_another_refused(tones: Tones, tmp_path: Path) -> None:
    first = build_corpus(tones.utterances[:3], tmp_path / "f")
    calls: list[int] = []
    again = build_corpus(tones.utterances[:3], tmp_path / "f", progress=lambda *told: calls.append(told[1]))
    assert not calls
    assert again.digest == first.digest
    for utterances, settings in (
        (tones.utterances[:2], CorpusSettings()),
        ([replace(tones.utterances[0], text="x"), *tones.utterances[1:3]], CorpusSettings()),
        (tones.utterances[:3], CorpusSettings(FeatureSettings(num_mels=20))),
    ):
        with pytest.raises(InputError, match="holds features of other audio, texts or settings"):
            build_corpus(utterances, tmp_path / "f", settings)


def test_texts_are_part_of_the_digest(tones: Tones, tmp_path: Path) -> None:
    changed = [replace(tones.utterances[0], text="x"), *tones.utterances[1:3]]
    digests = {
        build_corpus(tones.utterances[:3], tmp_path / "f").digest,
        build_corpus(changed, tmp_path / "g").digest,
    }
    assert len(digests) == 2


def test_a_build_that_was_stopped_begins_anew(tones: Tones, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(tones.utterances[:4], tmp_path / "f", progress=stop)
    assert not (tmp_path / "f" / "corpus.json").exists()
    expected = build_corpus(tones.utterances[:4], tmp_path / "g")
    assert build_corpus(tones.utterances[:4], tmp_path / "f").digest == expected.digest


def test_a_damaged_folder_is_refused(tones: Tones, tmp_path: Path) -> None:
    build_corpus(tones.utterances[:2], tmp_path / "f")
    told = tmp_path / "f" / "corpus.json"
    whole = told.read_text()
    told.write_text(whole[:20])
    with pytest.raises(InputError, match="cannot be read"):
        build_corpus(tones.utterances[:2], tmp_path / "f")
    told.write_text(whole.replace('"format": 1', '"format": 9'))
    with pytest.raises(InputError, match="has format 9, this modicum reads 1"):
        build_corpus(tones.utterances[:2], tmp_path / "f")
    told.write_text(whole)
    features = tmp_path / "f" / "features.f32"
    features.write_bytes(features.read_bytes()[:-40])
    with pytest.raises(InputError, match="is not whole"):
        build_corpus(tones.utterances[:2], tmp_path / "f")
    with pytest.raises(InputError, match=r"features\.f32 is a file: give a folder"):
        build_corpus(tones.utterances[:2], features)
    features.unlink()
    with pytest.raises(InputError, match=r"has corpus.json and no features\.f32: remove"):
        build_corpus(tones.utterances[:2], tmp_path / "f")
    source = json.loads(whole)["source"]
    for text in (
        '{"format":1}',
        "[]",
        "[" * 100_000,
        json.dumps({"format": 1, "source": source, "digest": "", "num_skipped": 0, "utterances": [{}]}),
        json.dumps({"format": 1, "source": source, "digest": "", "num_skipped": 0, "utterances": 3}),
    ):
        told.write_text(text)
        with pytest.raises(InputError, match=r"corpus\.json cannot be read .*remove"):
            build_corpus(tones.utterances[:2], tmp_path / "f")


def test_files_that_cannot_be_used_are_named_and_the_rest_kept(tones: Tones, tmp_path: Path) -> None:
    save_audio(tmp_path / "silent.wav", torch.zeros(8000), 16_000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no audio")
    save_audio(tmp_path / "short.wav", torch.full((9,), 0.5), 16_000)
    names = ("silent.wav", "empty.wav", "text.wav", "none.wav", "short.wav")
    bad = [Utterance(tmp_path / name, "a") for name in names]
    with pytest.warns(UserWarning, match="5 utterances left out") as told:
        corpus = build_corpus([*bad, *tones.utterances[:2]], tmp_path / "f")
    assert [one.text for one in corpus.utterances] == [one.text for one in tones.utterances[:2]]
    assert corpus.num_skipped == 5
    message = str(told[0].message)
    assert all(one.audio.name in message for one in bad)
    assert f"{tmp_path / 'short.wav'}: 9 samples make no frame" in message
    with pytest.raises(InputError, match="no utterance can be used"):
        build_corpus(bad, tmp_path / "g")
    assert not list((tmp_path / "g").iterdir())


def test_audio_of_another_rate_is_resampled_and_said(tones: Tones, tmp_path: Path) -> None:
    samples = load_audio(tones.utterances[0].audio)[::2]
    for name in ("a.wav", "b.wav"):
        save_audio(tmp_path / name, samples, 8000)
    slow = [Utterance(tmp_path / name, "a") for name in ("a.wav", "b.wav")]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        corpus = build_corpus(slow, tmp_path / "f")
    assert [str(one.message) for one in told] == ["audio of 8,000 Hz is resampled to 16,000 Hz"]
    assert abs(corpus.num_frames(0) - tones.corpus.num_frames(0)) <= 1


def test_copies_are_consecutive_and_have_their_own_speed(tones: Tones, tmp_path: Path) -> None:
    settings = CorpusSettings(copies=2, speeds=(1.0, 2.0))
    corpus = build_corpus(tones.utterances[:2], tmp_path / "f", settings)
    assert len(corpus) == 4
    for number in range(2):
        slow, fast = corpus.utterances[2 * number : 2 * number + 2]
        assert torch.equal(corpus.features(2 * number), tones.corpus.features(number))
        assert abs(corpus.num_frames(2 * number) / 2 - corpus.num_frames(2 * number + 1)) <= 1
        assert fast.text == slow.text
        assert [x.start for x in fast.phones] == [x.start / 2 for x in slow.phones]


def test_noise_is_drawn_anew_for_each_copy_and_the_same_for_each_build(tones: Tones, tmp_path: Path) -> None:
    settings = CorpusSettings(copies=2, noise=NoiseSettings((0.0, 10.0)), seed=3)
    first, again = (build_corpus(tones.utterances[:2], tmp_path / name, settings) for name in "fg")
    assert first.digest == again.digest
    assert not torch.equal(first.features(0), first.features(1))
    other = build_corpus(tones.utterances[:2], tmp_path / "h", replace(settings, seed=4))
    assert other.digest != first.digest


def test_features_with_noise_of_recordings_are_of_those_recordings(tones: Tones, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.mkdir()
    save_audio(noise / "a.wav", 0.1 * torch.sin(torch.arange(4000) * 0.3))
    settings = CorpusSettings(noise=NoiseSettings((0.0, 10.0), "folder", folder=noise))
    first = build_corpus(tones.utterances[:1], tmp_path / "f", settings)
    assert build_corpus(tones.utterances[:1], tmp_path / "f", settings).digest == first.digest

    def check_refused() -> None:
        with pytest.raises(InputError, match="holds features of other audio"):
            build_corpus(tones.utterances[:1], tmp_path / "f", settings)

    save_audio(noise / "b.wav", 0.1 * torch.sin(torch.arange(4000) * 0.4))
    check_refused()  # one more
    (noise / "b.wav").unlink()
    build_corpus(tones.utterances[:1], tmp_path / "f", settings)
    state = (noise / "a.wav").stat()
    os.utime(noise / "a.wav", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    check_refused()  # written again
    os.utime(noise / "a.wav", ns=(state.st_atime_ns, state.st_mtime_ns))
    (noise / "a.wav").rename(noise / "c.wav")
    check_refused()  # another name
    (noise / "c.wav").unlink()
    check_refused()  # none left


def test_utterances_that_ctc_cannot_fit_or_spell_are_named(tones: Tones, tmp_path: Path) -> None:
    one = tones.utterances[0]
    frames = -(-tones.corpus.num_frames(0) // 2)
    texts = ["ab", "a" * (frames // 2 + 2), "ab" * (frames // 2), "ax"]
    utterances = [replace(one, text=text) for text in texts]
    corpus = build_corpus(utterances, tmp_path / "f")
    with pytest.warns(UserWarning, match="2 of 4 utterances left out") as told:
        examples = Examples(corpus, TOKENS, FrameRate("ctc", 2))
    assert examples.rows == [0, 2]  # 2·n equal letters need blanks between, other ones do not
    assert "CTC needs" in str(told[0].message)
    assert "'x'" in str(told[0].message)
    assert examples.num_frames == 4 * frames  # also of rows that are left out
    assert examples.span(2) == (2 * frames, 3 * frames)


def test_frame_labels_are_those_of_the_phone_at_each_output_frame(tones: Tones, tmp_path: Path) -> None:
    examples = Examples(tones.corpus, tones.thirds, FrameRate("frames", 3))
    for row in examples.rows:
        utterance, labels = tones.corpus.utterances[row], examples.labels(row)
        assert len(labels) == examples.span(row)[1] - examples.span(row)[0]
        for frame, label in enumerate(labels.tolist()):
            time = (3 * frame + 0.5) * 0.01
            spoken = [x.phone for x in utterance.phones if x.start <= time < x.end]
            assert tones.thirds.symbols[label // 3] == (spoken[0] if spoken else "SIL")


def test_a_batch_is_padded(tones: Tones) -> None:
    for tokens, rate in ((TOKENS, FrameRate("ctc", 2)), (tones.thirds, FrameRate("frames", 1))):
        examples = Examples(tones.corpus, tokens, rate)
        rows = [4, 0, 7]
        batch = collate(examples, rows, [tones.corpus.features(row) for row in rows])
        at = 0
        for place, row in enumerate(rows):
            size, num = int(batch.lengths[place]), int(batch.label_lengths[place])
            assert torch.equal(batch.features[place, :size], tones.corpus.features(row))
            assert not batch.features[place, size:].any()
            if rate.criterion == "ctc":
                assert torch.equal(batch.labels[at : at + num], examples.labels(row))
                at += num
            else:
                assert torch.equal(batch.labels[place, :num], examples.labels(row))
                assert bool((batch.labels[place, num:] == NO_LABEL).all())


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    copies=st.integers(1, 3),
    max_frames=st.integers(1, 200),
    epoch=st.integers(0, 4),
)
def test_an_epoch_has_each_utterance_once_in_batches_of_the_size(
    lengths: list[int], copies: int, max_frames: int, epoch: int
) -> None:
    rows = list(range(copies * len(lengths)))
    plan = BatchPlan([length for length in lengths for _ in range(copies)], copies, max_frames, 0)
    batches = plan.epoch(rows, epoch)
    assert sorted(row // copies for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(plan.lengths[row] for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_frames
    assert plan.epoch(rows, epoch) == batches
    if copies > 1:
        later = {row for n in range(copies) for batch in plan.epoch(rows, epoch + n) for row in batch}
        assert later == set(rows)


@pytest.mark.parametrize("seed", [10**17, -(10**17)])
def test_any_whole_number_is_a_seed(seed: int, tones: Tones, tmp_path: Path) -> None:
    (batches,) = BatchPlan([5, 5, 5], 1, 100, seed).epoch([0, 1, 2], 1)
    assert sorted(batches) == [0, 1, 2]
    settings = CorpusSettings(noise=NoiseSettings((0.0, 10.0)), seed=seed)
    assert len(build_corpus(tones.utterances[:1], tmp_path, settings)) == 1


def test_a_folder_that_cannot_be_written_is_told_from_a_full_disk(
    tones: Tones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, remedy in ((errno.ENOSPC, "make room"), (errno.EACCES, "give one that can be written")):

        def fail(*_: object, code: int = code, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("pathlib.Path.mkdir", fail)
        with pytest.raises(InputError, match=f"{os.strerror(code)}; {remedy}"):
            build_corpus(tones.utterances[:1], tmp_path / "f")


def test_a_row_that_is_left_out_has_its_copies_in_its_place() -> None:
    plan = BatchPlan([5, 5, 5, 5], 2, 100, 0)
    seen = {row for epoch in range(4) for batch in plan.epoch([0, 3], epoch) for row in batch}
    assert seen == {0, 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CorpusSettings(copies=0), "there are 0 copies"),
        (lambda: CorpusSettings(speeds=()), "there is no speed"),
        (lambda: CorpusSettings(speeds=(3.0,)), "the speed is 3"),
        (lambda: BatchPlan([1], 1, 0, 0), "a batch has 0 frames"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_examples_want_tokens_of_their_criterion(tones: Tones, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no use for tokens that are thirds"):
        Examples(tones.corpus, tones.thirds, FrameRate("ctc", 2))
    with pytest.raises(InputError, match="has no use for tokens that are graphemes"):
        Examples(tones.corpus, TOKENS, FrameRate("frames", 1))
    bare = build_corpus([replace(one, phones=()) for one in tones.utterances[:2]], tmp_path / "f")
    with pytest.raises(InputError, match=r"no utterance can be learned from: 000\.wav: it has no phones"):
        Examples(bare, tones.thirds, FrameRate("frames", 1))
    with pytest.raises(InputError, match="it has no phones"):
        Examples(bare, TokenSet("phones", ("a",)), FrameRate("ctc", 2))


def test_silence_is_no_phone_of_a_transcript(tones: Tones, tmp_path: Path) -> None:
    phones = (PhoneInterval("SIL", 0.0, 0.1), PhoneInterval("a", 0.1, 0.2))
    corpus = build_corpus([replace(tones.utterances[0], phones=phones)], tmp_path / "f")
    examples = Examples(corpus, TokenSet("phones", ("a",)), FrameRate("ctc", 2))
    assert examples.labels(0).tolist() == [1]
