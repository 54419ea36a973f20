"""Speed and peak memory beside kvpress and transformers' quantised caches, on the model of kv_cpu.py.

Each peer has an environment of its own, where modicum runs from the source tree in the same process, so that
times are of one machine and one moment.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import fresh
import machine
import report
from peak import FULL
from rich.console import Console
from rich.progress import track
from subject import QUICK, Settings

from modicum.measure import Spread

_ROOT = Path(__file__).resolve().parent.parent
PEERS = {"kvpress": ".venv-kvpress", "transformers": ".venv-transformers"}


def run(peer: str, settings: Settings, *more: str) -> dict[str, Any]:
    """What rival.py prints in the peer's environment."""
    python = _ROOT / PEERS[peer] / "bin" / "python"
    if not python.is_file():
        raise SystemExit(f"there is no {python.relative_to(_ROOT)}: `make bench-speed-peers` builds it")
    names = ("tokens", "budget", "chunk", "repeats", "block", "threads")
    options = [f"--{name}={getattr(settings, name)}" for name in names]
    given = ["--peer", peer, *options, *more]
    return fresh.answer("rival.py", given, python, PYTHONPATH=str(_ROOT / "src"), HF_HUB_OFFLINE="1")


def measure(settings: Settings) -> dict[str, Any]:
    """For each peer: the times of all rivals in turns, then each one's peak in a process of its own."""
    found: dict[str, Any] = {}
    for peer in PEERS:
        found[peer] = run(peer, settings)
        found[peer]["memory"] = [
            run(peer, settings, "--alone", rival)
            for rival in track(found[peer]["rivals"], f"{peer}: memory", console=Console(stderr=True))
        ]
    return found


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    s = raw["settings"]
    parts = [
        f"Measured {raw['date']} in {raw['minutes']} minutes on {raw['machine']['cores']} cores "
        f"({raw['machine']['processor']}): a prompt of {s['tokens']:,} tokens, {s['budget']:,} kept per KV "
        f"head; {s['repeats']} rounds of {s['block']} decoded tokens, all in turns; medians and quartiles of "
        f"ratios to `{FULL}` in the same round."
    ]
    parts += [_table(peer, found, s) for peer, found in raw["peers"].items()]
    return "\n\n".join(parts)


def _table(peer: str, found: dict[str, Any], s: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    memory = {x["rival"]: x for x in found["memory"]}
    first = found["rivals"][0]
    rows = []
    for rival in found["rivals"]:
        prefill, decode = (_seconds(found[what], rival) for what in ("prefill", "decode"))
        reference = _seconds(found["decode"], first), _seconds(found["prefill"], first)
        again = not prefill
        rows.append(
            [
                f"`{rival}`",
                "as above" if again else f"{statistics.median(prefill.values()):.2f} s",
                "" if again else _over(prefill, reference[1]),
                f"{statistics.median(decode.values()) * 1e3:.2f} ms",
                _over(decode, reference[0]),
                *_beside_presses(found["decode"], rival, decode),
                f"{(memory[rival]['peak'] - memory[rival]['loaded']) / 2**20:,.0f} MiB",
            ]
        )
    head = ["", "prefill", "÷ one-shot", "a token", f"÷ `{FULL}` at {s['tokens']:,}"]
    presses = peer == "kvpress"
    head += ["÷ the press's", "÷ the same, decoding too"] * presses + ["peak above the model"]
    return f"**Beside {peer}** ({versions})\n\n" + report.table(head, rows)


def _beside_presses(samples: list[dict[str, Any]], rival: str, own: dict[int, float]) -> list[str]:
    """Beside the press that does what this policy of ours does: as it lets go of the prompt only, and as it
    also lets a block of tokens go after each block.
    """
    press = rival.replace("modicum", "kvpress").split(" /")[0]
    both = [_seconds(samples, press), _seconds(samples, f"{press}, decoding too")]
    if not any(x["rival"].startswith("kvpress") for x in samples):
        return []
    return [_over(own, x) if rival.startswith("modicum") else "" for x in both]


def _seconds(samples: list[dict[str, Any]], rival: str) -> dict[int, float]:
    return {x["round"]: x["seconds"] for x in samples if x["rival"] == rival}


def _over(own: dict[int, float], reference: dict[int, float]) -> str:
    return Spread.of(seconds / reference[number] for number, seconds in own.items()).text(3)


def main() -> None:
    """Measure, write, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small settings; prints and writes nothing")
    asked = parser.parse_args()
    settings = QUICK if asked.quick else replace(Settings(), policies=())
    started = datetime.now().astimezone()
    peers = measure(settings)
    raw = {
        **machine.since(started),
        "settings": asdict(settings),
        "peers": peers,
    }
    report.publish(raw, section, "peers", keep=not asked.quick)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
