"""What is held back: running text and the text that questions are asked of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modicum.errors import InputError
from modicum.fit.fit_text import FitText
from tests.fit.fitting import QUICK, tiny

TASKS = "niah_single_2:max_new_tokens=2,niah_multikey_1:keys=2,each=true,max_new_tokens=2"
LENGTH = 448
LEARNED, HELD = "Whales sing at night.", "Foxes dig their dens."


def test_probes_read_what_is_held_back_and_calibration_the_rest() -> None:
    model, tokenizer = tiny()
    ids = [tokenizer(f"{one} " * 150, add_special_tokens=False)["input_ids"] for one in (LEARNED, HELD)]
    text = FitText(*ids)
    settings = replace(QUICK, tasks=TASKS, sequences=2, probes=2)

    def tell(*_: Any) -> None:
        pass

    probes = text.probes(model, tokenizer, TASKS, settings, LENGTH, tell)
    asked = [tokenizer.decode(item.context) for item in probes.items if item.asks]
    assert len(asked) == 2
    for context in (*asked, *(tokenizer.decode(item.context) for item in probes.items if not item.asks)):
        assert HELD in context
        assert LEARNED not in context
    rows = text.sequences(model, tokenizer, TASKS, settings, LENGTH, tell)
    found = [tokenizer.decode(row) for row in rows]
    assert any("special magic" in row for row in found)
    for row in found:
        assert LEARNED in row
        assert HELD not in row


@pytest.mark.parametrize(("part", "option"), [("sequences", "--length"), ("probes", "--probe-length")])
def test_a_length_too_short_for_the_questions_names_the_options(part: str, option: str) -> None:
    model, tokenizer = tiny()
    ids = tokenizer(f"{LEARNED} " * 40, add_special_tokens=False)["input_ids"]
    read = getattr(FitText(ids, ids), part)
    with pytest.raises(InputError, match=rf"the length is 32: .* fit's {option}, .* its --tasks"):
        read(model, tokenizer, TASKS, QUICK, 32, lambda *_: None)
