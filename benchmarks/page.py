"""Sections of a page that a script writes, each between two markers with its name."""

from __future__ import annotations

from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Put a text between the markers of that name, `<!-- name: begin -->` and `<!-- name: end -->`.

    A page that is not there is made.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    written = page.read_text(encoding="utf-8") if page.is_file() else f"{begin}\n{end}\n"
    if written.count(begin) != 1 or written.count(end) != 1 or written.index(begin) > written.index(end):
        raise SystemExit(f"{page} must hold '{begin}' and then '{end}', each once")
    before, after = written.split(begin)[0], written.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
