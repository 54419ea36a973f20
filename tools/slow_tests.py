"""Write tests/slow.txt, the tests that `make test-fast` leaves out, from the times of a run.

    pytest -n 2 --junitxml=times.xml -o junit_duration_report=total
    python tools/slow_tests.py times.xml
    pytest -n 2 -m "not slow" --junitxml=fast.xml -o junit_duration_report=total
    python tools/slow_tests.py --add fast.xml    # and again, until nothing is added

A test function of which one case takes half a second or more is left out. One whose cases take as long
together runs with its first parameters only. The run must be of all tests; functions that it skipped stay as
they are listed. The time of a fixture of a whole file is told of the first test that asks for it. When that
test is left out, the next one takes the time: so the fast tests are run once more and the slow ones added.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "slow.txt"
LIMIT = 0.5
"""Seconds."""
HEAD = (
    "# Test functions that `make test-fast` leaves out (all), or runs with their first parameters only",
    "# (first). Written by tools/slow_tests.py from the times of a run of all tests.",
)


def read_list(path: Path = LIST) -> dict[str, str]:
    """By "FILE::FUNCTION", below tests/: "all" or "first"."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split() for line in lines if line[:1] not in ("", "#"))


def times(path: Path) -> dict[str, list[float]]:
    """By "FILE::FUNCTION": the seconds of each case that was run."""
    found: dict[str, list[float]] = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        parts = case.get("classname", "").split(".")
        while not (ROOT / Path(*parts)).with_suffix(".py").exists():
            parts.pop()  # a class in the file
            if not parts:
                raise SystemExit(f"{path}: {case.get('classname')} is no file of tests")
        name = Path(*parts[1:]).with_suffix(".py").as_posix() + "::" + case.get("name", "").split("[")[0]
        found[name].append(float(case.get("time", 0)))
    return found


def main() -> None:
    """Renew the list, or add to it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("times", type=Path, help="written by pytest --junitxml")
    parser.add_argument("--add", action="store_true", help="keep what is listed; for times of the fast tests")
    asked = parser.parse_args()
    listed = read_list()
    before = set(listed)
    for name, seconds in times(asked.times).items():
        if not asked.add:
            listed.pop(name, None)
        if max(seconds) >= LIMIT:
            listed[name] = "all"
        elif sum(seconds) >= LIMIT:
            listed[name] = "first"
    lines = [f"{name} {what}" for name, what in sorted(listed.items())]
    LIST.write_text("\n".join([*HEAD, *lines]) + "\n", encoding="utf-8")
    print(f"{len(listed)} functions, {len(set(listed) - before)} of them new")


if __name__ == "__main__":
    main()
