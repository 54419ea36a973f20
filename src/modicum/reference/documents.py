"""The sequences the reference model learns from: each a context, questions about it, and their answers.

A sequence is made of pieces that are tokenised apart, so that it is known which tokens are an answer's. The
wording of the needle, chain and counting tasks is that of RULER (`modicum.tasks`), beside shorter forms that
fit into the first, short sequences of the curriculum.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tokenizers import Tokenizer

from modicum.tasks.words import listed, pair

KINDS = ("copy", "table", "keys", "needle", "chain", "count", "text")


@dataclass
class Sequence:
    """Token ids, with what each is: 2 for the token of an answer that chooses it, 1 for the others of an
    answer (which follow from the first), -1 for running text, 0 for what is left."""

    kind: str
    ids: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def add(self, ids: list[int], mark: int) -> None:
        """More tokens of one sort."""
        self.ids += ids
        self.marks += [mark] * len(ids)


class Writer:
    """Draws sequences.

    Args:
        tokenizer: of the model.
        texts: tokenised sentences of each text, in order.
        end: the id that opens a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[list[list[int]]], end: int = 0) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._sizes = [sum(map(len, text)) for text in texts]
        self._end = end
        self._words = tokenizer.get_vocab_size()
        self._known: dict[str, list[int]] = {}
        self._space = self._ids(" ")

    def draw(self, kind: str, length: int, rng: random.Random) -> Sequence:
        """A sequence of exactly `length` tokens."""
        makers: dict[str, Callable[[int, random.Random], Sequence]] = {
            "copy": self._copy,
            "table": self._table,
            "keys": self._keys,
            "needle": self._needle,
            "chain": self._chain,
            "count": self._count,
            "text": self._plain,
        }
        made = makers[kind](length, rng)
        if len(made.ids) < length:  # text after the answers
            made.add(self._filler(length - len(made.ids), rng, exact=True), -1)
        del made.ids[length:], made.marks[length:]
        return made

    # ------------------------------------------------------------------ kinds

    def _copy(self, length: int, rng: random.Random) -> Sequence:
        """Segments, then some of them again; all but the first tokens of a repeat are known beforehand."""
        made = self._open("copy")
        random_tokens = length < 128 or rng.random() < 0.5
        segments: list[list[int]] = []
        while len(made.ids) < length:
            if segments and rng.random() < 0.55:
                segment = rng.choice(segments)
                start = rng.randrange(max(1, len(segment) - 4))
                repeat = segment[start : start + rng.randint(4, 64)]
                made.add(repeat[:2], 0)
                made.add(repeat[2:], 1)
                continue
            size = rng.randint(4, max(5, min(length // 4, 200)))
            if random_tokens:
                segment = [rng.randrange(1, self._words) for _ in range(size)]
                made.add(segment, 0)
            else:
                segment = self._filler(size, rng, exact=True)
                made.add(segment, -1)
            segments.append(segment)
        return made

    def _table(self, length: int, rng: random.Random) -> Sequence:
        """Keys with values, dense, then again in another order: as many as fit."""
        made = self._open("table")
        if rng.random() < (0.5 if length <= 128 else 0.1):
            return self._token_table(made, length, rng)
        key, value, _ = self._draws(rng, length)
        before, between, after = rng.choice(
            (
                ("", ":", "\n"),
                ("", " =", ";"),
                (" The", " is", "."),
                (" (", ",", ")"),
                (" for", " is:", "."),
                (" One of the special magic numbers for", " is:", "."),
            )
            if length >= 128
            else (("", ":", "\n"), ("", " =", ";"), ("", " is", "."))
        )
        pairs: dict[str, str] = {}
        context: list[int] = []
        room = (length - 2) * rng.uniform(0.4, 0.6)
        while True:
            one, other = key(), value()
            if one in pairs:
                continue
            row = self._ids(before) + self._ids(_spaced(one)) + self._ids(between)
            row += self._ids(_spaced(other)) + self._ids(after)
            if pairs and len(context) + len(row) > room:
                break
            pairs[one] = other
            context += row
        made.add(context, 0)
        asked = list(pairs)
        while len(made.ids) < length:
            rng.shuffle(asked)
            for one in asked:
                made.add(self._ids(before) + self._ids(_spaced(one)) + self._ids(between), 0)
                self._answer(made, _spaced(pairs[one]))
                made.add(self._ids(after), 0)
        return made

    def _token_table(self, made: Sequence, length: int, rng: random.Random) -> Sequence:
        """The same with any tokens as keys and values."""
        between, after = (
            self._ids(mark) for mark in rng.choice(((":", "\n"), (" is", "."), (" =", ";"), ("", ",")))
        )
        row = 2 + len(between) + len(after)
        count = max(2, min(200, int(length * rng.uniform(0.3, 0.6)) // row))
        keys = rng.sample(range(1, self._words), count)
        values = [rng.randrange(1, self._words) for _ in keys]
        for turn in range(2 + length // (row * count)):
            order = list(range(count))
            rng.shuffle(order)
            for i in order:
                made.add([keys[i], *between], 0)
                made.add([values[i]], 2 if turn else 0)
                made.add(after, 0)
        return made

    def _keys(self, length: int, rng: random.Random) -> Sequence:
        """Needles side by side, as many as fit, and a question for each: which key is it?"""
        made = self._open("keys")
        key, value, what = self._draws(rng, length)
        if rng.random() < 0.6:
            key = partial(pair, rng)
        dense = rng.random() < 0.6  # short values and questions: more choices in as many tokens
        if dense:
            value, what = partial(_two_digits, rng), "number"
        room = length * rng.uniform(0.3, 0.5)
        facts: dict[str, str] = {}
        while len(made.ids) < room:
            one, other = key(), value()
            if one in facts:
                continue
            facts[one] = other
            shape = "\n{} is: {}." if dense else " One of the special magic {}s for {} is: {}."
            made.add(self._ids(shape.format(*(() if dense else (what,)), one, other)), 0)
        asked: list[str] = []
        while len(made.ids) < length:
            asked = asked or rng.sample(list(facts), len(facts))
            one = asked.pop()
            self._ask(made, [one], [[facts[one]]], what, rng, short=0.9 if dense else 0.6)
        return made

    def _needle(self, length: int, rng: random.Random) -> Sequence:
        """Needles of one or several keys in text, noise or among other needles; several questions."""
        made = self._open("needle")
        key, value, what = self._draws(rng, length)
        if length >= 192 and rng.random() < 0.12:
            return self._fact(length, rng)
        plain = length < 192 and rng.random() < 0.7
        each = 12 if plain else 30
        most = max(2, min(24, length // (4 * each)))
        count = rng.randint(1, most) if rng.random() < 0.7 else rng.choice((1, 1, 4, 8))
        facts: dict[str, list[str]] = {}
        while len(facts) < min(count, most):
            several = rng.choice((1, 1, 1, 2, 4)) if length >= 256 and count <= 4 else 1
            facts[key()] = [value() for _ in range(several)]
        needles = [
            (" " + one + " is " + other + ".")
            if plain
            else f" One of the special magic {what}s for {one} is: {other}."
            for one, values in facts.items()
            for other in values
        ]
        order = list(range(len(needles)))
        rng.shuffle(order)
        if not plain and rng.random() < 0.7:
            many = len(needles) > 1
            made.add(
                self._ids(
                    f"{'Some' if many else 'A'} special magic {what}{'s are' if many else ' is'} hidden "
                    "within the following text. Make sure to memorize it. I will quiz you about the "
                    f"{what}{'s' if many else ''} afterwards.\n"
                ),
                0,
            )
        ranked = [needles[i] for i in order]
        told = {
            one: [v for n in ranked for v in values if n.endswith(f" {v}.")] for one, values in facts.items()
        }
        questions = self._questions(told, what, plain, length, rng)
        self._bury([self._ids(n) for n in ranked], length - len(questions.ids), made, rng)
        made.ids += questions.ids
        made.marks += questions.marks
        return made

    def _questions(
        self, facts: dict[str, list[str]], what: str, plain: bool, length: int, rng: random.Random
    ) -> Sequence:
        """Questions until a third of the sequence is theirs, or each fact was asked twice."""
        made = Sequence("needle")
        room = length * rng.uniform(0.2, 0.4)
        for turn in range(2):
            asked = list(facts)
            rng.shuffle(asked)
            while asked:
                several = 1 if plain or rng.random() < 0.6 else min(len(asked), rng.randint(2, 4))
                keys, asked = asked[:several], asked[several:]
                values = [facts[key] for key in keys]
                if len(made.ids) > room and (turn or len(made.ids) > 0):
                    return made
                if plain:
                    made.add(self._ids(f" {keys[0]} is"), 0)
                    self._answer(made, f" {values[0][0]}")
                    made.add(self._ids("."), 0)
                    continue
                self._ask(made, keys, values, what, rng)
        return made

    def _ask(
        self,
        made: Sequence,
        keys: list[str],
        values: list[list[str]],
        what: str,
        rng: random.Random,
        short: float = 0.2,
    ) -> None:
        """A question in RULER's words, without its first half, or (`short`) in few words, with its answer."""
        many = sum(map(len, values)) > 1
        names = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
        whats, verb = (f"{what}s", "are") if many else (what, "is")
        if rng.random() < short:
            forms = (f"\nfor {names}:", f"\n{names} {verb}", f"\n The {whats} for {names} {verb}")
            made.add(self._ids(rng.choice(forms)), 0)
        else:
            # The key must be carried over what stands between it and the answer: sometimes less than RULER's.
            words = _TAIL if rng.random() < 0.4 else _TAIL[: rng.randint(0, len(_TAIL))]
            opening = "What are all the" if many else "What is the"
            asked = f" special magic {whats} for {names}"
            tail = " ".join(("", *words))
            made.add(self._ids("\n" + (f"{opening}{asked}{tail}?" if rng.random() < 0.5 else "")), 0)
            made.add(self._ids(f" The{asked}{tail} {verb}"), 0)
        self._tell(made, keys, values)

    def _tell(self, made: Sequence, keys: list[str], values: list[list[str]]) -> None:
        """One value alone; several with their keys, one after the other."""
        if len(keys) == 1 and len(values[0]) == 1:
            self._answer(made, f" {values[0][0]}")
        else:
            pairs = [(key, value) for key, its in zip(keys, values, strict=True) for value in its]
            for i, (key, value) in enumerate(pairs):
                if i:
                    made.add(self._ids(","), 1)
                self._answer(made, f" {key}")
                made.add(self._ids(":"), 1)
                self._answer(made, f" {value}")
        made.add(self._ids("."), 1)

    def _fact(self, length: int, rng: random.Random) -> Sequence:
        """Plain facts: The password of the captain is 4817."""
        made = self._open("needle")
        facts: dict[str, str] = {}
        for _ in range(rng.randint(1, max(1, length // 96))):
            facts[f"the {_noun(rng)} of the {_noun(rng)}"] = rng.choice((_short_number(rng), _noun(rng)))
        questions = Sequence("needle")
        names = list(facts)
        rng.shuffle(names)
        for name in names:
            if len(questions.ids) > length // 3:
                break
            questions.add(self._ids(f"\nWhat is {name}?"), 0)
            questions.add(self._ids(f" T{name[1:]} is"), 0)
            self._answer(questions, f" {facts[name]}.")
        needles = [self._ids(f" T{name[1:]} is {value}.") for name, value in facts.items()]
        self._bury(needles, length - len(questions.ids), made, rng)
        made.ids += questions.ids
        made.marks += questions.marks
        return made

    def _chain(self, length: int, rng: random.Random) -> Sequence:
        """Variables that take each other's values; which of them have a value?"""
        made = self._open("chain")
        long = length >= 256
        lined = long and rng.random() < 0.5  # each assignment on a line of its own, among lines of noise
        if long and length >= 512 and rng.random() < 0.4:
            self._chain_part(made, 200, True, True, 3, rng)
            made.add(self._ids("\n\n"), 0)
        self._chain_part(made, length, long, lined, 5, rng)
        return made

    def _chain_part(
        self, made: Sequence, length: int, long: bool, lined: bool, size: int, rng: random.Random
    ) -> None:
        """One text with its questions, up to `length` tokens in all."""
        most = max(1, min(4, length // 100))
        chains: dict[str, list[str]] = {}
        for _ in range(1 if rng.random() < 0.4 else rng.randint(1, most)):
            hops = rng.randint(1, 2 if length < 256 else 4)
            chains[str(rng.randint(10_000, 99_999))] = [_letters(rng, size) for _ in range(hops + 1)]
        lines: list[list[tuple[float, str]]] = []
        for value, names in chains.items():
            places = sorted(rng.random() for _ in names)
            right = [value, *(f"VAR {name}" for name in names)]
            shape = "\nVAR {} = {} " if lined else " VAR {} = {}"
            lines.append([(p, shape.format(n, r)) for p, n, r in zip(places, names, right, strict=False)])
        needles = [self._ids(text) for _, text in sorted(x for line in lines for x in line)]
        if long and rng.random() < 0.7:
            made.add(
                self._ids(
                    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
                ),
                0,
            )
        questions = Sequence("chain")
        asked = list(chains)
        rng.shuffle(asked)
        for value in asked:
            names = chains[value]
            if long:
                questions.add(
                    self._ids(
                        f"\nQuestion: Find all variables that are assigned the value {value} in the text "
                        "above. Answer: According to the chain(s) of variable assignment in the text above, "
                        f"{len(names)} variables are assigned the value {value}, they are:"
                    ),
                    0,
                )
            else:
                questions.add(self._ids(f"\nthe value {value}, they are:"), 0)
            for name in names:
                self._answer(questions, f" {name}")
            questions.add(self._ids("."), 1)
        self._bury(needles, length - len(questions.ids), made, rng, noise=lined)
        made.ids += questions.ids
        made.marks += questions.marks

    def _count(self, length: int, rng: random.Random) -> Sequence:
        """Which words come most often?"""
        made = self._open("count")
        coded = rng.random() < 0.5
        if coded:
            intro = (
                "Read the following coded text and track the frequency of each coded word. Find the three "
                "most frequently appeared coded words."
            )
            ask = (
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
                "three most frequently appeared words in the above coded text? Answer: According to the "
                "coded text above, the three most frequently appeared words are:"
            )
            top, size = 3, (length - 110) // 3
            names = ["...", *(_letters(rng, 6).lower() for _ in range(40))]
            power = rng.uniform(1.5, 2.5)
            weights = [1.0 / (rank + 1) ** power for rank in range(len(names))]
        else:
            intro = (
                "Below is a numbered list of words. In these words, some appear more often than others. "
                "Memorize the ones that appear most often.\n"
            )
            top, size = rng.randint(3, 10), (length - 110) // 5
            ask = (
                f"\nQuestion: What are the {top} most common words in the above list? Answer: The top {top} "
                "words that appear most often in the list are:"
            )
            names = [_noun(rng) for _ in range(max(top + 10, size // 8))]
            weights = [10.0 if rank < top else 1.0 for rank in range(len(names))]
        listed = rng.choices(names, weights, k=max(8, size))
        counts = {name: listed.count(name) for name in dict.fromkeys(names) if name != "..."}
        best = sorted(counts, key=lambda name: -counts[name])[:top]
        made.add(self._ids(intro), 0)
        for place, name in enumerate(listed, 1):
            made.add(self._ids(f" {name}" if coded else f" {place}. {name}"), 0)
        made.add(self._ids(ask), 0)
        for place, name in enumerate(best, 1):
            self._answer(made, f" {name}" if coded else f" {place}. {name}")
        made.add(self._ids("."), 1)
        return made

    def _plain(self, length: int, rng: random.Random) -> Sequence:
        """Running text."""
        made = self._open("text")
        made.add(self._filler(length - 1, rng, exact=True), -1)
        return made

    # ---------------------------------------------------------------- helpers

    def _open(self, kind: str) -> Sequence:
        made = Sequence(kind)
        made.add([self._end], 0)
        return made

    def _bury(
        self,
        needles: list[list[int]],
        length: int,
        made: Sequence,
        rng: random.Random,
        *,
        noise: bool = False,
    ) -> None:
        """The needles in order, at any depth of filler, so that `made` comes to `length` tokens at most."""
        room = length - len(made.ids) - sum(map(len, needles))
        if room <= 8:
            for needle in needles:
                made.add(needle, 0)
            return
        if noise or rng.random() < 0.15:
            straw = [self._ids(sentence) for sentence in _NOISE]
            hay = [straw[i % len(straw)] for i in range(room // 5)]
        else:
            hay = self._sentences(room, rng)
        places = sorted(rng.randint(0, len(hay)) for _ in needles)
        left = room
        for i, sentence in enumerate([*hay, []]):
            while places and places[0] <= i:
                made.add(needles[len(needles) - len(places)], 0)
                places.pop(0)
            if left > 0:
                made.add(sentence[:left], -1)
                left -= len(sentence)

    def _sentences(self, room: int, rng: random.Random) -> list[list[int]]:
        """Consecutive sentences of a text, at least `room` tokens if it is that long."""
        (text,) = rng.choices(self._texts, self._sizes)
        start = rng.randrange(len(text))
        taken: list[list[int]] = []
        while room > 0:
            sentence = text[start % len(text)]
            taken.append(sentence)
            room -= len(sentence)
            start += 1
        return taken

    def _filler(self, room: int, rng: random.Random, *, exact: bool = False) -> list[int]:
        joined = [token for sentence in self._sentences(room, rng) for token in sentence]
        return joined[:room] if exact else joined

    def _draws(self, rng: random.Random, length: int) -> tuple[Callable[[], str], Callable[[], str], str]:
        """How keys and values are drawn in one sequence, and what a value is called."""
        keys: list[Callable[[random.Random], str]] = [_noun, _short_number, _letters]
        values: list[Callable[[random.Random], str]] = [_short_number, _noun]
        if length >= 128:
            keys += [pair, pair, pair, pair]
            values += [_number, _number, _number, _hex]
        if length >= 512:
            keys.append(_uuid)
            values.append(_uuid)
        key, value = rng.choice(keys), rng.choice(values)
        names: dict[Callable[[random.Random], str], str] = {_noun: "word", _uuid: "uuid"}
        return lambda: key(rng), lambda: value(rng), names.get(value, "number")

    def _answer(self, made: Sequence, text: str) -> None:
        ids = self._ids(text)
        made.ids += ids
        choice = 1 if ids[:1] == self._space else 0  # before a digit the space is a token of its own
        made.marks += [2 if i == choice else 1 for i in range(len(ids))]

    def _ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = self._tokenizer.encode(text, add_special_tokens=False).ids if text else []
            if len(self._known) < 50_000:
                self._known[text] = known
        return known


_TAIL = ("mentioned", "in", "the", "provided", "text")
_NOISE = (
    "\nThe grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)


def _spaced(text: str) -> str:
    return f" {text}"


def _noun(rng: random.Random) -> str:
    return rng.choice(listed("noun"))


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _short_number(rng: random.Random) -> str:
    return str(rng.randint(100, 99_999))


def _two_digits(rng: random.Random) -> str:
    return str(rng.randint(10, 99))


def _hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _letters(rng: random.Random, size: int = 5) -> str:
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(size))
