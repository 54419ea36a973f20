"""What keys and values are drawn from."""

from __future__ import annotations

import random
import re

from modicum.reference import lots


def test_values_are_alike_and_never_twice() -> None:
    begins = 0
    for seed in range(20):
        value = lots.alike(random.Random(seed))
        values = [value() for _ in range(60)]
        assert len(set(values)) == 60
        assert all(re.fullmatch("[1-9][0-9]{6}|[A-Z]{5}", one) for one in values)
        begins += len({one[:4] for one in values})
    assert begins < 1000  # of 1,200, nearly all of which differ where values are drawn at random


def test_keys_of_two_words_are_run_together_in_two_draws_of_five() -> None:
    plain = kin = twins = 0
    for seed in range(100):
        rng = random.Random(seed)
        key = lots.two_words(rng)
        drawn = [key(rng) for _ in range(40)]
        assert all(re.fullmatch(r".+-.+", one) for one in drawn)
        assert len({key(rng) for _ in range(4000)}) > 400  # they do not run out
        if len({one.split("-")[0] for one in drawn}) < 20:
            kin += 1
        elif key is lots.twin:
            twins += 1
        else:
            plain += 1
    assert 45 < plain < 75
    assert 10 < kin < 30
    assert 10 < twins < 30


def test_twins_repeat_or_share_a_part_or_hold_the_noise() -> None:
    rng = random.Random(1)
    noise = {"green", "blue", "yellow", "grass", "sky", "sun"}
    kinds = dict.fromkeys(("twice", "noise", "end", "beginning", "other"), 0)
    for _ in range(400):
        first, *rest = lots.twin(rng).split("-")
        last = rest[-1]
        if rest[: len(rest) // 2] == rest[len(rest) // 2 :]:
            kinds["twice"] += 1
        elif last in noise:
            kinds["noise"] += 1
        elif "-".join(rest).endswith(first[-2:]):
            kinds["end"] += 1
        elif rest[0].startswith(first[:3]):
            kinds["beginning"] += 1
        else:  # no noun of those looked at does
            kinds["other"] += 1
    assert min(kinds[name] for name in ("twice", "noise", "end", "beginning")) > 25
    assert kinds["other"] < 130
