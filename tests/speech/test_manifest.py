"""Manifests: three forms are read alike; bad rows are named and the others kept."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InputError
from modicum.speech.manifest import PhoneInterval, Utterance, manifest_line, read_manifest, write_manifest


def audio(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return [folder / name for name in names]


def test_what_is_written_is_read(tmp_path):
    a, b = audio(tmp_path, "a.wav", "deep/b.wav")
    phones = (PhoneInterval("ɡ", 0.0, 0.1), PhoneInterval("oʊ", 0.1, 0.35))
    rows = [Utterance(a, "go", "ann", 0.5, phones), Utterance(b, "été “now”")]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    assert read_manifest(tmp_path / "manifest.jsonl") == rows
    assert read_manifest(tmp_path) == rows
    assert not list(tmp_path.glob("*.part"))


def test_audio_elsewhere_is_found_from_anywhere(tmp_path, monkeypatch):
    (elsewhere,) = audio(tmp_path, "other/a.wav")
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "here" / "m.jsonl", [Utterance(Path("other/a.wav"), "go")])
    assert read_manifest("here/m.jsonl")[0].audio.samefile(elsewhere)


def test_lines_with_tabs_are_read(tmp_path):
    a, b = audio(tmp_path, "a.wav", "b.wav")
    (tmp_path / "m.tsv").write_text("a.wav\tgo on\n\nb.wav\tstop\n", encoding="utf-8")
    assert read_manifest(tmp_path / "m.tsv") == [Utterance(a, "go on"), Utterance(b, "stop")]


def test_a_folder_of_audio_with_transcripts_is_read(tmp_path):
    a, b = audio(tmp_path, "a.wav", "deep/b.FLAC")
    audio(tmp_path, "alone.wav", "silent.wav")
    a.with_suffix(".txt").write_text("go\n on\n", encoding="utf-8")
    b.with_suffix(".txt").write_text("stop", encoding="utf-8")
    (tmp_path / "lost.txt").write_text("nothing", encoding="utf-8")
    (tmp_path / "silent.txt").write_text(" ", encoding="utf-8")
    with pytest.warns(UserWarning, match="3 left out") as seen:
        assert read_manifest(tmp_path) == [Utterance(a, "go on"), Utterance(b, "stop")]
    text = str(seen[0].message)
    assert "alone.wav has no transcript" in text
    assert "silent.wav has no text" in text
    assert "lost.txt has no audio" in text


BAD = {
    '{"audio": "missing.wav", "text": "go"}': "there is no file",
    '{"audio": "a.wav"}': '"text" is None',
    '{"audio": "a.wav", "text": " "}': "has no text",
    '{"audio": 3, "text": "go"}': '"audio" is 3',
    '{"audio": "a.wav", "text": "go"': "line 2",
    '{"audio": "a.wav", "text": "go", "duration": -1}': "lasts -1",
    '{"audio": "a.wav", "text": "go", "duration": "long"}': "could not convert",
    '{"audio": "a.wav", "text": "go", "phones": [["g", 1]]}': "not enough values",
    '{"audio": "a.wav", "text": "go", "phones": [["g", 1, 0.5]]}': "give an end after",
    '{"audio": "a.wav", "text": "go", "phones": [["o", 2, 3], ["g", 1, 2]]}': "phone g at 1.0 seconds",
    '{"audio": "a.wav", "text": "go", "phones": 7}': "not iterable",
    "no tab": "neither JSON nor",
    '{"audio": "a.wav", "text": "go \\ud800"}': 'text" has U+D800, half of a surrogate pair',
    '{"audio": "a.wav", "text": "go", "speaker": "\\udfff"}': 'speaker" has U+DFFF',
    '{"audio": "a.wav", "text": "go", "phones": [["\\udc00", 0, 1]]}': 'phones" has U+DC00',
    '{"audio": "a.wav", "text": "go", "x": ' + "[" * 100_000: "nested too deeply",
    '{"audio": "a.wav", "text": "go", "duration": 1' + "0" * 400 + "}": "too large",
    '{"audio": "' + "a" * 5000 + '", "text": "go"}': "too long",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_and_the_others_kept(tmp_path, line):
    (a,) = audio(tmp_path, "a.wav")
    (tmp_path / "m.jsonl").write_text(f"a.wav\tgo\n{line}\na.wav\tgo\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 left out") as seen:
        assert read_manifest(tmp_path / "m.jsonl") == [Utterance(a, "go")] * 2
    assert "line 2" in str(seen[0].message)
    assert BAD[line] in str(seen[0].message)


def test_null_is_missing(tmp_path):
    (a,) = audio(tmp_path, "a.wav")
    row = '{"audio": "a.wav", "text": "go", "speaker": null, "duration": null, "phones": null}'
    (tmp_path / "m.jsonl").write_text(row, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_manifest(tmp_path / "m.jsonl") == [Utterance(a, "go")]


def test_only_a_newline_ends_a_row(tmp_path):
    (a,) = audio(tmp_path, "a.wav")
    rows = [Utterance(a, f"go{letter}on") for letter in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    write_manifest(tmp_path / "m.jsonl", rows)
    assert read_manifest(tmp_path / "m.jsonl") == rows
    (tmp_path / "m.tsv").write_text("".join(f"a.wav\t{one.text}\n" for one in rows), encoding="utf-8")
    assert read_manifest(tmp_path / "m.tsv") == rows


def test_a_text_that_is_no_unicode_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"'\\ud800', which is no Unicode"):
        write_manifest(tmp_path / "m.jsonl", [Utterance(tmp_path / "a.wav", "\ud800")])
    assert not list(tmp_path.iterdir())


def test_many_bad_rows_are_counted(tmp_path):
    audio(tmp_path, "a.wav")
    (tmp_path / "m.tsv").write_text("a.wav\tgo\n" + "b.wav\tgo\n" * 9, encoding="utf-8")
    with pytest.warns(UserWarning, match="9 left out: .*; and 4 more"):
        read_manifest(tmp_path / "m.tsv")


def test_no_usable_row_is_an_error(tmp_path):
    (tmp_path / "m.tsv").write_text("b.wav\tgo\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"has no utterance .*there is no file"):
        read_manifest(tmp_path / "m.tsv")
    (tmp_path / "empty.tsv").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="it is empty"):
        read_manifest(tmp_path / "empty.tsv")
    (tmp_path / "sound.wav").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_manifest(tmp_path / "sound.wav")
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_manifest(tmp_path / "missing.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="has no utterance"):
        read_manifest(tmp_path / "folder")


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])).map(str.strip).filter(bool)
)
def test_a_row_is_one_line_of_json(text):
    line = manifest_line(Utterance(Path("/f/a.wav"), text), Path("/f"))
    assert "\n" not in line
    assert json.loads(line) == {"audio": "a.wav", "text": text}


def test_no_warning_without_a_fault(tmp_path):
    audio(tmp_path, "a.wav")
    (tmp_path / "m.tsv").write_text("a.wav\tgo\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_manifest(tmp_path / "m.tsv")
