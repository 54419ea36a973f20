"""`modicum policies`: what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict

from modicum.cli.console import print_json, print_table
from modicum.cli.options import JsonOption


def policies(as_json: JsonOption = False) -> None:
    """List the policies: name, what it keeps, settings, paper."""
    import modicum.kv.policies  # noqa: F401  # registers them
    from modicum.kv.registry import policies as registered

    known = registered()
    if as_json:
        print_json([asdict(info) for info in known])
        return
    for wrapper, title in ((False, "Policies"), (True, "Wrappers, around a policy: caote+snapkv")):
        rows = [
            [
                info.name,
                f"{info.title}: {info.summary}" if info.summary else info.title,
                ", ".join(f"{key}={value}" for key, value in info.settings.items()),
                info.paper.removeprefix("https://arxiv.org/abs/"),
            ]
            for info in known
            if info.wrapper is wrapper
        ]
        print_table(["name", "keeps", "settings", "arXiv"], rows, title=title)
    names = [[name, text] for info in known for name, text in info.also.items()]
    print_table(["name", "stands for"], names, title="Other names")
