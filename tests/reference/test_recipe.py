"""The reference model's recipe: what it draws, where weights start, that a stopped run goes on."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from modicum.errors import InputError
from modicum.reference.corpus import read_texts, sentences, unwrap
from modicum.reference.documents import KINDS, Writer
from modicum.reference.exact import mark_choices
from modicum.reference.muon import Muon, orthogonal
from modicum.reference.pieces import Pen
from modicum.reference.recipe import Recipe
from modicum.reference.tokenizer import END, wrap
from modicum.reference.train import build, hidden_states, spread_positions
from tests.bounds import assert_same_logits, assert_within, gamma
from tests.reference.tiny import TINY


def test_digits_stand_alone_and_text_comes_back(tokenizer: Tokenizer, book: str) -> None:
    text = "In 1920, 7,193,558 bears – or was it 42? – ate 007 berries.\n\nÉtude: 日本 🙂"
    pieces = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(pieces.ids) == text
    decoded = [tokenizer.decode([i]) for i in pieces.ids]
    assert max(sum(c.isdigit() for c in piece) for piece in decoded) == 1
    assert tokenizer.decode(tokenizer.encode(book, add_special_tokens=False).ids) == book


def test_wrapped_tokenizer_opens_with_its_end_token(tokenizer: Tokenizer) -> None:
    wrapped = wrap(Tokenizer.from_str(tokenizer.to_str()))
    ids = wrapped("A miller")["input_ids"]
    assert ids[0] == wrapped.eos_token_id == wrapped.pad_token_id == 0
    assert wrapped.decode(ids) == f"{END}A miller"


def test_sentences_join_to_the_text_but_for_blanks(book: str) -> None:
    text = unwrap(book)
    joined = "".join(sentences(text))
    assert joined.split() == text.split()
    assert all(s[0] in " \n" and s.strip() for s in sentences(text))


def test_read_texts_keeps_some_back(data: Path) -> None:
    learnt, kept = read_texts([data], ("held",))
    assert list(learnt) == ["learnt"]
    assert list(kept) == ["held-back"]
    with pytest.raises(InputError, match="there is no folder"):
        read_texts([data / "none"], ())
    with pytest.raises(InputError, match=r"no \.txt"):
        read_texts([data], ("held", "learnt"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 128, 200, 512, 1024])
def test_a_sequence_has_its_length(writer: Writer, kind: str, length: int) -> None:
    for seed in range(8):
        drawn = writer.draw(kind, length, random.Random(seed))
        assert len(drawn.ids) == len(drawn.marks) == length
        assert set(drawn.marks) <= {-1, 0, 1, 2}
        again = writer.draw(kind, length, random.Random(seed))
        assert again.ids == drawn.ids


@pytest.mark.parametrize("kind", ["table", "exact", "keys", "needle", "chain"])
@pytest.mark.parametrize("length", [400, 1024, 2048])
def test_answers_are_in_what_came_before(
    writer: Writer, tokenizer: Tokenizer, kind: str, length: int
) -> None:
    """Every answer can be known: its words stand in the context."""
    found = 0
    for seed in range(16):
        drawn = writer.draw(kind, length, random.Random(seed))
        for start, stop in _runs(drawn.marks):
            if stop == length:  # cut off by the end
                continue
            before = tokenizer.decode(drawn.ids[:start])
            answer = tokenizer.decode(drawn.ids[start:stop])
            for word in re.findall(r"[^\s,.:;]+", answer.replace(" and ", " ")):
                assert word in before, (word, before[-300:])
                found += 1
    assert found > 5


def test_tables_read_backwards(writer: Writer, tokenizer: Tokenizer) -> None:
    """After a value comes the key before which it stands in the table."""
    asks = tokenizer.encode("\nWhat is", add_special_tokens=False).ids
    found = 0
    for seed in range(16):
        ids, marks = (drawn := writer.draw("back", 256, random.Random(seed))).ids, drawn.marks
        for start, stop in _runs(marks):
            asked = next(i for i in range(start, 0, -1) if ids[i : i + len(asks)] == asks)
            key, value = ids[start:stop], ids[asked + len(asks) : start]
            told = [i for i in range(asked) if ids[i : i + len(value)] == value]
            if stop < len(ids):
                assert any(ids[i - len(key) - gap : i - gap] == key for i in told for gap in range(7))
                found += 1
    assert found > 50


def test_a_list_says_the_last_key_before_the_next(tokenizer: Tokenizer) -> None:
    pen = Pen(tokenizer, [])
    made = pen.open("several")
    keys, values = ["one", "two", "three"], [["1"], ["2", "3"], ["4"]]
    pen.answer_list(
        made, [pen.ids(f" {key}") for key in keys], [[pen.ids(f" {v}") for v in its] for its in values]
    )
    assert tokenizer.decode(made.ids[1:]) == " one: 1; one, two: 2 and 3; two, and three: 4."
    assert made.marks[1:].count(2) == 3 + 2 + 4
    assert min(made.marks[1:]) == 1


@pytest.mark.parametrize("length", [64, 128, 512])
def test_lists_have_their_answers_in_the_table(writer: Writer, tokenizer: Tokenizer, length: int) -> None:
    """What chooses a key or a value in an answer stands in what came before the question."""
    opens = tokenizer.encode("\nfor", add_special_tokens=False).ids
    found = 0
    for seed in range(12):
        drawn = writer.draw("several", length, random.Random(seed))
        for start, stop in _runs(drawn.marks):
            asked = next(i for i in range(start, 0, -1) if drawn.ids[i : i + len(opens)] == opens)
            for i in range(start, stop):
                if drawn.marks[i] == 2:  # the first token, or the second where a blank stands alone
                    assert drawn.ids[i] in drawn.ids[:asked]
                    found += 1
    assert found > 12


def test_a_key_answers_with_its_own_value(writer: Writer, tokenizer: Tokenizer) -> None:
    """Also when it comes once more after it."""
    asked = 0
    for seed in range(40):
        drawn = writer.draw("exact", 64, random.Random(seed))
        told: dict[str, str] = {}
        for line in tokenizer.decode(drawn.ids[1:]).split("\n")[1:-1]:
            key, value, *echo = line.replace(" is:", ":").replace(":", "").split()
            asked += key in told
            assert told.setdefault(key, value) == value
            assert echo in ([], [key])
    assert asked > 20


def test_a_sign_that_could_be_another_is_a_choice(tokenizer: Tokenizer) -> None:
    pen = Pen(tokenizer, [])
    made = pen.open("exact")
    pen.answer(made, " 6123456")
    mark_choices(pen, made, 0, "6123456", ["6123456", "8412799"])
    assert made.marks[-7:] == [2, 2, 1, 2, 1, 1, 1]  # 12 is followed by 3 here and by 7 there


def test_copies_are_copies(writer: Writer) -> None:
    right = wrong = 0
    for seed in range(10):
        drawn = writer.draw("copy", 256, random.Random(seed))
        for start, stop in _runs(drawn.marks):
            piece = drawn.ids[start - 2 : stop]
            earlier = drawn.ids[: start - 2]
            hit = any(earlier[i : i + len(piece)] == piece for i in range(len(earlier) - len(piece) + 1))
            right, wrong = right + hit, wrong + (not hit)
    assert right > 20
    assert wrong == 0


def test_positions_rise_and_stay_below_the_models() -> None:
    recipe = replace(TINY, positions=4096, gaps=1.0)
    rows = spread_positions(200, 64, recipe, random.Random(1))
    assert rows.shape == (200, 64)
    steps = rows.diff(dim=1)
    assert int(steps.min()) >= 1
    assert int(rows[:, 0].max()) == 0
    assert int(rows.max()) < 4096
    assert int(rows.max()) > 1000
    assert torch.equal(
        spread_positions(2, 64, replace(recipe, gaps=0.0), random.Random(1))[1], torch.arange(64)
    )


def test_orthogonal_is_near_the_polar_factor() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 40, dtype=torch.float64)
    for matrix in matrices:
        mine = orthogonal(matrix)
        values = torch.linalg.svdvals(mine)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert float(((left.T @ mine @ right.T).diagonal() - values.mean()).abs().max()) < 0.35
        # The quintic's slope is at most 4 where singular values are below 1.2: five steps, each a chain of
        # three products in float64.
        bound = 4**5 * 5 * gamma(3 * 40, torch.float64) * float(mine.norm())
        assert_within(orthogonal(matrix.mT), mine.mT, bound)


def test_muon_goes_down_a_quadratic() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 12)
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    muon = Muon([weight], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (weight - target).square().sum()
        losses.append(float(loss.detach()))
        loss.backward()
        muon.step()
        muon.zero_grad()
    assert losses[-1] < 0.05 * losses[0]


def test_first_heads_look_back_and_the_second_layer_matches() -> None:
    """Before training: a head finds the token before, another the place after the same token's last time."""
    recipe = Recipe()
    model = build(recipe)
    model.set_attn_implementation("eager")
    torch.manual_seed(3)
    once = torch.randint(1, recipe.vocabulary, (1, 48))
    with torch.no_grad():
        maps = model(torch.cat([once, once], 1), output_attentions=True).attentions
    for head, back in enumerate((1, 2, 1, 3)):
        assert float(maps[0][0, head].diagonal(-back).mean()) > 0.9
    induction = maps[1][0, :4].diagonal(-47, dim1=1, dim2=2).mean(-1)
    assert float(induction.max()) > 0.05  # by chance it would be about 0.014


def test_hidden_states_are_the_models_own() -> None:
    model = build(TINY)
    ids = torch.randint(0, 512, (3, 20))
    ours, guide = hidden_states(model, ids, torch.arange(20)[None].expand(3, -1))
    assert guide is None
    assert_same_logits(model, ours, model.model(ids).last_hidden_state)  # as inexact as logits


def test_bad_recipes() -> None:
    with pytest.raises(InputError, match="query heads"):
        Recipe(heads=6, kv_heads=4)
    with pytest.raises(InputError, match="longer than"):
        Recipe(positions=1024)


def _runs(marks: list[int]) -> list[tuple[int, int]]:
    """Where answers begin and end."""
    edges = [
        i for i in range(len(marks) + 1) if (i < len(marks) and marks[i] > 0) != (i > 0 and marks[i - 1] > 0)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))
