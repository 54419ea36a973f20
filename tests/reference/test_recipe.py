"""The reference model's recipe: what it draws, where weights start, that a stopped run goes on."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import modicum
from modicum.errors import InputError
from modicum.reference import lots
from modicum.reference.corpus import read_texts, sentences, unwrap
from modicum.reference.documents import KINDS, Writer
from modicum.reference.exact import mark_choices
from modicum.reference.guide import looks, sources
from modicum.reference.muon import Muon, orthogonal
from modicum.reference.pieces import Pen
from modicum.reference.recipe import Recipe, Stage
from modicum.reference.tokenizer import END, train_tokenizer, wrap
from modicum.reference.train import Training, build, hidden_states, spread_positions

LONG = {"copy": 1.0, "table": 1.0, "needle": 2.0, "chain": 1.0, "count": 0.5, "text": 1.0}
TINY = Recipe(
    vocabulary=512,
    hidden=32,
    mlp=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    positions=256,
    stages=(Stage(64, 256, {"copy": 1.0, "table": 1.0}, 1024), Stage(128, 256, LONG, 10_000)),
    guided=((1, 0), (1, 3)),
    warmup=2,
    total_tokens=4096,
    held_back=("held",),
)


@pytest.fixture(scope="module")
def book() -> str:
    return modicum.sample_text().read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(book: str) -> Tokenizer:
    return train_tokenizer([book], 512)


@pytest.fixture(scope="module")
def writer(book: str, tokenizer: Tokenizer) -> Writer:
    cut = sentences(unwrap(book))
    return Writer(tokenizer, [[e.ids for e in tokenizer.encode_batch(cut, add_special_tokens=False)]])


@pytest.fixture
def data(tmp_path: Path, book: str) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "learnt.txt").write_text(book[:40_000], encoding="utf-8")
    (folder / "held-back.txt").write_text(book[40_000:60_000], encoding="utf-8")
    return folder


def test_digits_stand_alone_and_text_comes_back(tokenizer: Tokenizer, book: str) -> None:
    text = "In 1920, 7,193,558 bears – or was it 42? – ate 007 berries.\n\nÉtude: 日本 🙂"
    pieces = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(pieces.ids) == text
    decoded = [tokenizer.decode([i]) for i in pieces.ids]
    assert max(sum(c.isdigit() for c in piece) for piece in decoded) == 1
    assert tokenizer.decode(tokenizer.encode(book, add_special_tokens=False).ids) == book


def test_wrapped_tokenizer_opens_with_its_end_token(tokenizer: Tokenizer) -> None:
    wrapped = wrap(Tokenizer.from_str(tokenizer.to_str()))
    ids = wrapped("Buster Bear")["input_ids"]
    assert ids[0] == wrapped.eos_token_id == wrapped.pad_token_id == 0
    assert wrapped.decode(ids) == f"{END}Buster Bear"


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


def test_values_are_alike_and_never_twice() -> None:
    begins = 0
    for seed in range(20):
        value = lots.alike(random.Random(seed))
        values = [value() for _ in range(60)]
        assert len(set(values)) == 60
        assert all(re.fullmatch("[1-9][0-9]{6}|[A-Z]{5}", one) for one in values)
        begins += len({one[:4] for one in values})
    assert begins < 1000  # of 1,200, nearly all of which differ where values are drawn at random


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
        assert torch.allclose(orthogonal(matrix.mT), mine.mT)


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
    assert torch.allclose(ours, model.model(ids).last_hidden_state, atol=1e-5)


def test_guided_heads_are_the_models_own() -> None:
    model = build(TINY)
    ids = torch.randint(0, 512, (2, 20))
    _, guide = hidden_states(model, ids, torch.arange(20)[None].expand(2, -1), ((0, 3), (1, 0), (1, 2)))
    assert guide is not None
    query, key = guide
    future = torch.ones(20, 20).triu(1).bool()
    ours = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    model.set_attn_implementation("eager")  # only after: without a mask it would look ahead
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    assert torch.allclose(ours, torch.stack([maps[0][:, 3], maps[1][:, 0], maps[1][:, 2]], 1), atol=1e-5)


def test_sources_are_where_the_answers_words_stood() -> None:
    #      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    ids = [9, 1, 2, 3, 4, 8, 1, 2, 5, 6, 7, 1, 2, 5, 6]
    marks = [0] * 11 + [2, 1, 2, 1]
    assert sources(ids, marks) == [(11, [6]), (12, [7]), (13, [8]), (14, [9])]
    # Longer in one place than in the other; then a new piece; two tokens are no piece.
    ids = [1, 2, 3, 0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    marks = [0] * 13 + [1] * 9
    found = sources(ids, marks)
    assert found == [(13 + i, [4 + i]) for i in range(4)] + [(17 + i, [9 + i]) for i in range(3)]
    assert sources([1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3], [0] * 8 + [1] * 3)[0] == (8, [0, 4])


@pytest.mark.parametrize("kind", ["exact", "keys", "needle", "copy"])
def test_sources_hold_the_token(writer: Writer, kind: str) -> None:
    for seed in range(6):
        made = writer.draw(kind, 512, random.Random(seed))
        found = sources(made.ids, made.marks)
        assert len(found) > 0.5 * sum(mark > 0 for mark in made.marks)
        for at, places in found:
            assert places
            assert all(place < at and made.ids[place] == made.ids[at] for place in places)


def test_looks_against_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 2, 3, 12, 8, generator=generator).double()
    told = [[(4, [1, 2]), (9, [6]), (13, [2])], [(7, [0])]]  # 13: after the last query
    weights = [[0.1 * i for i in range(14)], [1.0] * 14]
    total, whole = looks(query, key, told, weights)
    expected = norm = 0.0
    for row, places in enumerate(told):
        for at, before in places:
            if at > 12:
                continue
            norm += weights[row][at]
            for head in range(3):
                scores = [
                    math.exp(
                        sum(
                            float(q * k)
                            for q, k in zip(query[row, head, at - 1], key[row, head, n], strict=True)
                        )
                        / 8**0.5
                    )
                    for n in range(at)
                ]
                missed = -math.log(sum(scores[n] for n in before) / sum(scores))
                expected += weights[row][at] * missed / 3
    assert float(total) == pytest.approx(expected, rel=1e-9)
    assert whole == pytest.approx(norm)


def test_a_stopped_run_goes_on_as_if_never_stopped(data: Path, tmp_path: Path) -> None:
    whole = Training(TINY, [data], tmp_path / "whole")
    for _ in range(8):
        whole.advance()
    first = Training(TINY, [data], tmp_path / "parts")
    for _ in range(5):
        first.advance()
    first.save()
    first.advance()  # killed before the next checkpoint: logged, but lost
    second = Training(TINY, [data], tmp_path / "parts")
    assert second.step == 5
    while second.step < 8:
        second.advance()
    for (name, one), two in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    logged = [json.loads(line)["step"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 9))


def test_a_run_ends_with_its_tokens_and_promotes(data: Path, tmp_path: Path) -> None:
    training = Training(TINY, [data], tmp_path / "run")
    training.run()
    assert training.tokens >= TINY.total_tokens
    lengths = [json.loads(line)["length"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lengths[:4] == [64] * 4  # 1,024 tokens in steps of 256, as no mark was passed
    assert set(lengths[4:]) == {128}


def test_another_models_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    Training(TINY, [data], tmp_path / "run").save()
    with pytest.raises(InputError, match="trained with hidden 32, not 48"):
        Training(replace(TINY, hidden=48), [data], tmp_path / "run")


def test_an_exported_model_loads_and_is_the_same(data: Path, tmp_path: Path) -> None:
    training = Training(TINY, [data], tmp_path / "run")
    training.export(tmp_path / "model")
    model, tokenizer = modicum.load(tmp_path / "model", device="cpu")
    assert model.dtype == torch.float32  # bfloat16 on disk only: it is slow where a CPU lacks it
    ids = torch.tensor([tokenizer("Buster Bear yawned")["input_ids"]])
    with torch.no_grad():
        ours = training.model(ids).logits
        theirs = model(ids).logits
    assert torch.allclose(ours, theirs, atol=0.05)
    assert (tmp_path / "model/model.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in training.model.parameters()
    )


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
