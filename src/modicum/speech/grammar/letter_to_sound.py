"""Letter to sound: phones for spellings that no dictionary has, by a short table of rules for English.

A rough guess, for spellings that a recognizer of letters has heard ("smalr") and for names. A word that the
pronouncing dictionary has should be looked up there.
"""

from __future__ import annotations

_RULES = {
    "tion": "SH AH N",
    "igh": "AY",
    "tch": "CH",
    "dge": "JH",
    "sch": "S K",
    "oar": "AO R",
    "air": "EH R",
    "ear": "IH R",
    "our": "AW ER",
    "ch": "CH",
    "sh": "SH",
    "th": "TH",
    "ph": "F",
    "wh": "W",
    "qu": "K W",
    "ck": "K",
    "ng": "NG",
    "kn": "N",
    "wr": "R",
    "ee": "IY",
    "ea": "IY",
    "ie": "IY",
    "oo": "UW",
    "ou": "AW",
    "ow": "OW",
    "oa": "OW",
    "oi": "OY",
    "oy": "OY",
    "ai": "EY",
    "ay": "EY",
    "ei": "EY",
    "ey": "IY",
    "au": "AO",
    "aw": "AO",
    "ew": "Y UW",
    "ue": "UW",
    "er": "ER",
    "ir": "ER",
    "ur": "ER",
    "ar": "AA R",
    "or": "AO R",
    "a": "AE",
    "b": "B",
    "c": "K",
    "d": "D",
    "e": "EH",
    "f": "F",
    "g": "G",
    "h": "HH",
    "i": "IH",
    "j": "JH",
    "k": "K",
    "l": "L",
    "m": "M",
    "n": "N",
    "o": "AA",
    "p": "P",
    "q": "K",
    "r": "R",
    "s": "S",
    "t": "T",
    "u": "AH",
    "v": "V",
    "w": "W",
    "x": "K S",
    "y": "Y",
    "z": "Z",
}
_LONGEST = max(map(len, _RULES))
_SOFT = "eiy"
_LONG = {"a": "EY", "e": "IY", "i": "AY", "o": "OW", "u": "UW"}
_LAST = {"a": "AH", "o": "OW"}
_VOWELS = "aeiou"


def letter_to_sound(word: str) -> tuple[str, ...]:
    """ARPAbet phones of a word in lower case, without stress; letters that are not English have none."""
    phones: list[str] = []
    at = 0
    while at < len(word):
        size = next(
            (
                size
                for size in range(_LONGEST, 0, -1)
                if word[at : at + size] in _RULES and at + size <= len(word)
            ),
            0,
        )
        if not size:
            at += 1
            continue
        phones += _sounds(word, at, size)
        at += size
    # Double letters are one sound.
    return tuple(phone for index, phone in enumerate(phones) if index == 0 or phone != phones[index - 1])


def _sounds(word: str, at: int, size: int) -> list[str]:
    """The phones of a rule, or what the letters beside make of it."""
    part, rest = word[at : at + size], word[at + size :]
    if part == "e" and not rest and any(letter in _VOWELS for letter in word[:at]):
        return []
    if part in ("c", "g") and rest and rest[0] in _SOFT:
        return ["S" if part == "c" else "JH"]
    if part == "y" and at and (not rest or rest[0] not in _VOWELS):
        return ["IH" if rest else "IY"]
    if part in _LONG and len(rest) == 2 and rest[0] not in _VOWELS and rest[1] == "e":
        return [_LONG[part]]
    if not rest and part in _LAST:
        return [_LAST[part]]
    return _RULES[part].split()
