"""Makefile: what the pages and the recipes name exists, and each environment has what its tests import."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from sys import stdlib_module_names
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RULES = dict(re.findall(r"^([^\s:#]+):(?!=)[^\n]*\n((?:\t[^\n]*\n|\n(?=\t))*)", MAKEFILE, re.MULTILINE))
"""Recipe by target."""
PHONY = set(re.findall(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)[0].split())


def variables(text: str) -> str:
    """The text with the Makefile's own variables filled in."""
    for name, value in re.findall(r"^(\w+) \??:?= (.*)$", MAKEFILE, re.MULTILINE):
        text = text.replace(f"$({name})", value)
    return text


def blocks(page: Path) -> list[str]:
    """The page's fenced blocks of commands."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def scripts(text: str) -> Iterator[tuple[Path, list[str]]]:
    """The Python files that commands run, each with the options given to it."""
    for line in variables(text).replace("\\\n", " ").splitlines():
        words = shlex.split(line.lstrip("@\t "), comments=True) if "python" in line else []
        for place, word in enumerate(words):
            if re.fullmatch(r"(benchmarks|tools)/[\w/]+\.py", word) and "python" in words[place - 1]:
                yield ROOT / word, [w.split("=")[0] for w in words[place + 1 :] if re.match(r"--?[a-z]", w)]
                break


@cache
def literals(script: Path) -> frozenset[str]:
    """The strings in a script, and in the modules of its folder that it imports."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for name in imports(tree):
        for folder in (script.parent, ROOT / "benchmarks"):
            if (folder / f"{name}.py").exists() and folder / f"{name}.py" != script:
                found |= literals(folder / f"{name}.py")
    return frozenset(found)


def imports(tree: ast.AST, package: str = "") -> set[str]:
    """Modules that are imported, in full, wherever in the file of that package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = f"{package}.{node.module}" if node.level else node.module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def needed(folder: str) -> set[str]:
    """What the tests of a folder need to be collected: imports, theirs in turn; ours left out."""
    seen: set[Path] = set()
    ahead = [ROOT / "tests" / "conftest.py", *(ROOT / folder).glob("*.py")]
    found = set()
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if not isinstance(n, ast.FunctionDef)
        ]
        for name in imports(ast.Module(top, []), ".".join(path.parent.relative_to(ROOT).parts)):
            # The benchmarks are scripts: they import one another by their bare names.
            for folder in (ROOT, path.parent):
                if (local := folder / f"{name.replace('.', '/')}.py").exists():
                    ahead.append(local)
                    break
            else:
                found.add(name.partition(".")[0])
    ours = {"modicum", *(folder.name for folder in ROOT.iterdir() if folder.is_dir())}
    modules = {path.stem for path in seen}
    return found - stdlib_module_names - ours - modules


def brought(names: set[str]) -> set[str]:
    """Distributions, with all that they need where they are installed here."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = re.split(r"[^\w.-]", ahead.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            ahead += [need for need in metadata.requires(name) or [] if "extra ==" not in need]
        except metadata.PackageNotFoundError:
            continue
    return found


def of_extras(names: list[str], project: dict[str, Any]) -> set[str]:
    """What extras name, those that they name themselves included."""
    found: set[str] = set()
    for need in (need for name in names for need in project["optional-dependencies"][name]):
        own = re.fullmatch(r"modicum\[(.*)\]", need)
        found |= of_extras(own[1].split(","), project) if own else {need}
    return found


def installed(recipe: str) -> set[str]:
    """The distributions that a recipe installs, this package's dependencies and extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[str] = set()
    for line in variables(recipe).replace("\\\n", " ").splitlines():
        if "pip install" not in line:
            continue
        words = shlex.split(line.partition("pip install")[2])
        for place, word in enumerate(words):
            if word.startswith(".") and words[place - 1] == "-e":
                found |= set(project["dependencies"]) | of_extras(re.findall(r"[\w-]+", word), project)
            elif not word.startswith("-") and words[place - 1] not in ("-c", "-e"):
                found.add(word)
    return brought(found)


def test_the_makefile_is_read() -> None:
    assert {"venv", "test", "lint", "bench", "test-vllm", ".venv-vllm/.stamp"} <= set(RULES)
    assert "pytest" in installed(RULES[".venv-vllm/.stamp"])
    assert len(list(scripts(RULES["bench"]))) >= 2


def test_every_target_that_is_no_file_is_phony_and_has_a_rule() -> None:
    assert {name for name in RULES if "/" not in name and not name.startswith(".")} == PHONY


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_targets_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([\w-]+)[^`]*`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)))
    named |= {name for block in blocks(page) for name in re.findall(r"^make ([\w-]+)", block, re.MULTILINE)}
    assert named <= PHONY


@pytest.mark.parametrize("page", [ROOT / "Makefile", *PAGES], ids=lambda page: page.name)
def test_scripts_and_their_options_exist(page: Path) -> None:
    for text in RULES.values() if page.name == "Makefile" else blocks(page):
        for script, options in scripts(text):
            assert script.exists(), script
            for option in options:
                assert option in literals(script), f"{script.name} has no {option}"


@pytest.mark.parametrize(
    ("target", "folder"),
    [
        ("$(VENV)/.stamp", "tests/kv"),
        ("$(COMPAT)/.stamp", "tests/contract"),
        ("test-newest", "tests/contract"),
        (".venv-vllm/.stamp", "tests/serving"),
    ],
)
def test_environments_have_what_their_tests_import(target: str, folder: str) -> None:
    there = installed(RULES[target])
    homes = metadata.packages_distributions()
    for name in needed(folder):
        names = {name, f"{name}-cpu", *homes.get(name, ())}
        assert {each.lower().replace("_", "-") for each in names} & there, f"{target} lacks {name}"


def test_slow_tests_exist() -> None:
    """What `make test-fast` leaves out by name is there, so a renamed test is not listed in vain."""
    lines = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        name, what = line.split()
        file, function = name.split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {function}\(", text, re.MULTILINE), name
        assert what in ("all", "first"), line
