"""Recognizers in folders: what is saved comes back bit for bit, and damage is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modicum.errors import InputError, ModelError
from modicum.speech import (
    PrefixBeamSearch,
    Recognizer,
    build_corpus,
    evaluate,
    greedy_decode,
    load_audio,
    save_audio,
)
from tests.speech.conftest import MODELS, Tones


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_saved_recognizer_gives_the_same_output_bit_for_bit(
    model: str, tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    members[model].save(tmp_path / "saved")
    loaded = Recognizer.load(tmp_path / "saved")
    assert loaded.digest == members[model].digest
    assert (loaded.tokens, loaded.features) == (members[model].tokens, members[model].features)
    assert dict(loaded.about) == dict(members[model].about)
    for row in range(3):
        features = tones.test.features(row)
        assert torch.equal(loaded.logits(features), members[model].logits(features))
    audio = tones.test.utterances[0].audio
    assert loaded.transcribe(audio) == members[model].transcribe(audio)
    loaded.save(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again")]
    assert files[0] == files[1]


def test_a_digest_tells_weights_apart(members: dict[str, Recognizer], tmp_path: Path) -> None:
    members["conv"].save(tmp_path / "saved")
    other = Recognizer.load(tmp_path / "saved")
    with torch.no_grad():
        other.model.get_parameter("output.bias")[0] += 1
    assert other.digest != members["conv"].digest


def test_a_transcript_is_what_evaluation_hears(tones: Tones, members: dict[str, Recognizer]) -> None:
    for recognizer in members.values():
        found = evaluate([recognizer], tones.test)
        heard = [recognizer.transcribe(one.audio).text for one in tones.test.utterances]
        assert list(found.hypotheses) == heard


def test_samples_and_files_are_transcribed_alike(tones: Tones, members: dict[str, Recognizer]) -> None:
    audio = tones.test.utterances[0].audio
    beam = PrefixBeamSearch(4)
    transcript = members["dfsmn"].transcribe(audio, beam)
    assert transcript == members["dfsmn"].transcribe(load_audio(audio), beam)
    assert transcript.seconds == len(load_audio(audio)) / 16_000
    log_probs = members["dfsmn"].logits(tones.test.features(0))
    assert list(members["dfsmn"].transcribe(audio).classes) == greedy_decode(log_probs)


def test_silence_and_nothing_are_refused(members: dict[str, Recognizer], tmp_path: Path) -> None:
    recognizer = members["conv"]
    save_audio(tmp_path / "silent.wav", torch.zeros(8000), 16_000)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"silent\.wav is silent: give a recording with speech"):
        recognizer.transcribe(tmp_path / "silent.wav")
    with pytest.raises(InputError, match="the samples are silent"):
        recognizer.transcribe(torch.zeros(8000))
    save_audio(tmp_path / "short.wav", torch.full((9,), 0.5), 16_000)
    with pytest.raises(InputError, match=r"short\.wav: 9 samples make no frame"):
        recognizer.transcribe(tmp_path / "short.wav")
    with pytest.raises(InputError, match=r"^9 samples make no frame"):
        recognizer.transcribe(torch.full((9,), 0.5))
    with pytest.raises(InputError, match=r"empty\.wav cannot be read as audio"):
        recognizer.transcribe(tmp_path / "empty.wav")
    with pytest.raises(InputError, match=r"there is no audio file .*none\.wav"):
        recognizer.transcribe(tmp_path / "none.wav")


Damage = Callable[[Path], None]


def changed(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "recognizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def without(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "recognizer.json"
        fields = json.loads(path.read_text())
        del fields[name]
        path.write_text(json.dumps(fields))

    return damage


def truncated(name: str) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def of_other_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["output.weight"] = tensors["output.weight"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(format=2), "has format 2, this modicum reads 1"),
        (changed(model={"name": "rnn"}), "there is no acoustic model 'rnn'"),
        (changed(tokens={"kind": "words"}), "cannot be read"),
        (changed(about=3), "cannot be read"),
        (without("about"), r"cannot be read \('about'\)"),
        (lambda folder: (folder / "recognizer.json").write_text("[" * 100_000), "cannot be read"),
        (truncated("recognizer.json"), "cannot be read"),
        (truncated("model.safetensors"), "cannot be read"),
        (of_other_layers, "size mismatch for output.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "recognizer.json").unlink(), "has no recognizer.json"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Damage, message: str, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    members["conv"].save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ModelError, match=message):
        Recognizer.load(tmp_path / "saved")


def test_an_ensemble_of_equal_members_is_its_member(tones: Tones, members: dict[str, Recognizer]) -> None:
    for name in ("conv", "frames"):
        one, three = (evaluate([members[name]] * count, tones.test) for count in (1, 3))
        assert one.hypotheses == three.hypotheses
        assert three.num_parameters == 3 * one.num_parameters


def test_frame_accuracy_counts_right_frames(tones: Tones, members: dict[str, Recognizer]) -> None:
    found = evaluate([members["frames"]], tones.test)
    right = total = 0
    for row, utterance in enumerate(tones.test.utterances):
        labels = tones.thirds.frame_labels(utterance.phones, tones.test.num_frames(row), 0.01)
        best = members["frames"].logits(tones.test.features(row)).argmax(-1)
        right, total = right + int((best == labels).sum()), total + len(labels)
    assert found.frame_accuracy is not None
    assert (found.frame_accuracy.count, found.frame_accuracy.total) == (right, total)


def test_members_of_an_ensemble_are_checked(tones: Tones, members: dict[str, Recognizer]) -> None:
    with pytest.raises(InputError, match="there is no teacher"):
        evaluate([], tones.test)
    other = replace(members["conv"], features=replace(members["conv"].features, frame_shift_ms=12.5))
    with pytest.raises(ModelError, match="read other features"):
        evaluate([other], tones.test)


def test_frames_of_phones_that_were_not_learned_are_wrong(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    renamed = {"a": "a", "b": "new", "c": "c"}
    utterances = [
        replace(one, phones=tuple(replace(x, phone=renamed[x.phone]) for x in one.phones))
        for one in tones.test.utterances
    ]
    corpus = build_corpus(utterances, tmp_path / "f")
    right = total = unknown = 0
    for row, utterance in enumerate(utterances):
        known = tones.thirds.frame_labels(tones.test.utterances[row].phones, corpus.num_frames(row), 0.01)
        centre = [(frame + 0.5) * 0.01 for frame in range(corpus.num_frames(row))]
        is_new = [any(x.phone == "new" and x.start <= at < x.end for x in utterance.phones) for at in centre]
        best = members["frames"].logits(corpus.features(row)).argmax(-1)
        right += sum(int(a == b) and not c for a, b, c in zip(best, known, is_new, strict=True))
        total, unknown = total + len(known), unknown + sum(is_new)
    assert unknown
    with pytest.warns(UserWarning, match=f"{unknown:,} of {total:,} frames are of phones") as told:
        found = evaluate([members["frames"]], corpus)
    assert len(told) == 1
    assert found.frame_accuracy is not None
    assert (found.frame_accuracy.count, found.frame_accuracy.total) == (right, total)


def test_rows_without_phones_have_no_part_in_rates_of_phones(
    tones: Tones, members: dict[str, Recognizer], tmp_path: Path
) -> None:
    bare = [replace(one, phones=()) for one in tones.test.utterances]
    with pytest.raises(InputError, match=r'no utterance has phones, .* give a manifest with "phones"'):
        evaluate([members["frames"]], build_corpus(bare, tmp_path / "bare"))
    mixed = build_corpus([*bare[:4], *tones.test.utterances[4:]], tmp_path / "mixed")
    with pytest.warns(UserWarning, match="4 of 10 utterances have no phones"):
        found = evaluate([members["frames"]], mixed)
    whole = evaluate([members["frames"]], build_corpus(tones.test.utterances[4:], tmp_path / "whole"))
    assert found.phone_error_rate == whole.phone_error_rate
    assert found.frame_accuracy == whole.frame_accuracy
