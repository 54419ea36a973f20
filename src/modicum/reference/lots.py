"""Keys and values: words, numbers, letters, drawn at random."""

from __future__ import annotations

import random
import string
import uuid as uuids
from collections.abc import Callable

from modicum.tasks.words import listed, pair


def draws(rng: random.Random, length: int) -> tuple[Callable[[], str], Callable[[], str], str]:
    """How keys and values are drawn in one sequence, and what a value is called."""
    keys: list[Callable[[random.Random], str]] = [noun, short_number, letters]
    values: list[Callable[[random.Random], str]] = [short_number, noun]
    if length >= 128:
        keys += [two_words(rng)] * (4 if length < 256 else 8)
        values += [number] * (3 if length < 256 else 7) + [hex]
    if length >= 512:
        keys.append(uuid)
        values.append(uuid)
    key, value = rng.choice(keys), rng.choice(values)
    called: dict[Callable[[random.Random], str], str] = {noun: "word", uuid: "uuid"}
    return lambda: key(rng), lambda: value(rng), called.get(value, "number")


def two_words(rng: random.Random) -> Callable[[random.Random], str]:
    """Keys of two words, as RULER has them; in two sequences of five ones that are easily run together."""
    luck = rng.random()
    if luck < 0.6:
        return pair
    if luck < 0.8:
        return twin
    # Of few words, so that each stands in several keys; now and then one more, so that keys never run out.
    words = {kind: rng.sample(listed(kind), 4) for kind in ("adjective", "noun")}

    def kin(rng: random.Random) -> str:
        for kind, known in words.items():
            if rng.random() < 0.15:
                known.append(rng.choice(listed(kind)))
        return "-".join(rng.choice(known) for known in words.values())

    return kin


def twin(rng: random.Random) -> str:
    """A pair of which one word comes twice, or ends or begins as the other does, or is one of the noise."""
    adjective, noun = pair(rng).split("-", 1)
    luck = rng.random()
    if luck < 0.25:
        return f"{adjective}-{noun}-{noun}"
    if luck < 0.5:
        return f"{adjective}-{rng.choice(('green', 'blue', 'yellow', 'grass', 'sky', 'sun'))}"
    part = adjective[-2:] if luck < 0.75 else adjective[:3]
    same = [n for n in rng.sample(listed("noun"), 400) if (n.endswith if luck < 0.75 else n.startswith)(part)]
    return f"{adjective}-{rng.choice(same) if same else noun}"


def noun(rng: random.Random) -> str:
    return rng.choice(listed("noun"))


def number(rng: random.Random) -> str:
    """Seven digits; often few different ones, which teaches to count a repeated digit out."""
    if rng.random() < 0.3:
        few = rng.sample(string.digits, rng.randint(2, 3))
        return rng.choice("123456789") + "".join(rng.choice(few) for _ in range(6))
    return str(rng.randint(1_000_000, 9_999_999))


def alike(rng: random.Random, least: int = 7) -> Callable[[], str]:
    """Numbers of seven digits, or names of five letters, that are easily taken for each other: most begin as
    another does or hold a part of it, and some have few different signs, so that the last two or three do
    not tell the next. At `least` so many signs, three or more, if that is fewer."""
    signs, most = (string.digits, 7) if rng.random() < 0.75 else (string.ascii_uppercase, 5)
    few = "".join(rng.sample(signs, rng.randint(2, 5))) if rng.random() < 0.35 else signs
    drawn: list[str] = []

    def draw() -> str:
        for among in (*([few] * 9), *([signs] * 99)):  # of few signs there may be too few values
            size = rng.randint(min(least, most), most)
            fresh = [rng.choice(among) for _ in range(size)]
            luck = rng.random()
            if drawn and luck < 0.4:
                begin = rng.choice(drawn)[: rng.randint(1, size - 1)]
                fresh[: len(begin)] = begin
            elif drawn and luck < 0.85 and size > 3:
                other, count = rng.choice(drawn), rng.randint(2, min(4, size - 2))
                start = rng.randrange(size - count)
                part = other[start if rng.random() < 0.3 else rng.randrange(len(other)) :][:count]
                fresh[start : start + len(part)] = part
            value = "".join(fresh)
            if value[0] != "0" and value not in drawn:
                break
        drawn.append(value)
        return value

    return draw


def short_number(rng: random.Random) -> str:
    return str(rng.randint(100, 99_999))


def two_digits(rng: random.Random) -> str:
    return str(rng.randint(10, 99))


def hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"


def uuid(rng: random.Random) -> str:
    return str(uuids.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, size: int = 5) -> str:
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(size))
