"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modicum.whole_file import whole_file, write_json, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path, is_durable=True) as part:
        part.write_text("new", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(type(error)), whole_file(path) as part:  # noqa: PT012  # what has been written goes too
        part.write_text("ne", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_in_the_files_place_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        write_whole(tmp_path / "a", b"content")
    assert names(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "b", b"content")


def test_writers_of_one_path_do_not_mix_their_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    contents = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_whole(path, content), contents * 4))
    assert path.read_text(encoding="utf-8") in contents
    assert names(tmp_path) == ["a.txt"]


def test_text_is_utf_8_and_half_a_pair_leaves_nothing(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "Grüße 🎈")
    assert (tmp_path / "a").read_bytes().decode("utf-8") == "Grüße 🎈"
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "b", "\ud83c")
    assert names(tmp_path) == ["a"]
    write_json(tmp_path / "c", {"name": "\ud83c"})  # JSON escapes it
    assert json.loads((tmp_path / "c").read_text(encoding="utf-8")) == {"name": "\ud83c"}


def test_others_may_read_the_file_as_they_may_read_any_new_one(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode
