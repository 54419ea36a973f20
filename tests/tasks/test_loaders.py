"""Samples from files and datasets: rows of ours and real ones, broken rows, and the benchmarks' prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modicum.errors import InputError
from modicum.tasks import METRICS, parse_task
from modicum.tasks.longbench import SETS_E
from modicum.tasks.prompts import PROMPTS
from modicum.tasks.rows import shortened
from tests.tasks.counting import only, taken, tokens

DATA = Path(__file__).resolve().parent.parent / "data"
RULER = DATA / "ruler_rows.jsonl"
GSM8K = DATA / "gsm8k_rows.jsonl"
"""Rows of our own, in the form of these data sets."""


def write(path: Path, rows: list[Any]) -> Path:
    """Rows as JSONL; texts as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """A `datasets` package that holds what is put here: (name, config, split) to rows."""
    held: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        if (*names, split) not in held:
            raise FileNotFoundError(f"no {names}\n  on the Hub")
        return held[(*names, split)]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return held


# ---------------------------------------- RULER


@pytest.mark.parametrize("real", [False, True], ids=["ours", "real"])
def test_a_file_as_rulers_scripts_write_it(real: bool, tiny: Any, real_data: Callable[[str], Path]) -> None:
    path = real_data("ruler/niah_multikey_3.jsonl") if real else RULER
    task = only(f"ruler-file:path={path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(task) == len(rows) >= 5
    assert task.skipped == []
    assert task.metric == "string_match_all"
    for i, row in enumerate(rows[:20]):
        sample = task.sample(i, None, tiny)
        assert sample.context + sample.question == row["input"]
        assert sample.question.startswith("\nWhat is the special magic uuid for ")
        assert sample.answers == tuple(row["outputs"])
        ((start, end),) = sample.needles
        assert sample.context[start:end].endswith(f" is: {row['outputs'][0]}.")
        assert sample.max_new_tokens == 128
        assert METRICS[sample.metric](row["outputs"][0], sample.answers) == 1
    assert {task.sample(i, None, tiny).depth for i in range(5)} != {None}


def test_a_context_too_long_loses_its_middle(tokenizer: Any) -> None:
    task = only(f"ruler-file:path={RULER},max_new_tokens=40")
    whole, cut = task.sample(0, None, tokenizer), task.sample(0, 1500, tokenizer)
    assert taken(tokenizer, whole) > 3000
    assert 1480 < taken(tokenizer, cut) <= 1500
    half = len(cut.context) // 2 - 60
    assert cut.context[:half] == whole.context[:half]
    assert cut.context[-half:] == whole.context[-half:]
    assert cut.question == whole.question
    assert task.sample(0, 100_000, tokenizer) == whole
    with pytest.raises(InputError, match="give a longer one"):
        task.sample(0, 100, tokenizer)
    with pytest.raises(InputError, match="samples 0 to 4, not 5"):
        task.sample(5, None, tokenizer)


def test_halves_are_of_equal_tokens(tiny: Any) -> None:
    text = " ".join(f"word{i}" for i in range(200))
    made = shortened(text, 101, tiny)
    ids = tiny(text, add_special_tokens=False)["input_ids"]
    assert made == tiny.decode(ids[:50]) + tiny.decode(ids[-50:])
    assert tokens(tiny, made, special=True) <= 101
    assert shortened(text, 1, tiny) == ""


def test_later_files_and_rows_apart(tmp_path: Path, tiny: Any) -> None:
    vt = only("vt:shots=0").sample(0, 900, tiny)
    cut = vt.question.index(" Answer:")
    rows = [
        {
            "input": vt.context + vt.question[:cut],
            "answer_prefix": vt.question[cut:] + " ",
            "outputs": [*vt.answers],
        },
        {
            "context": vt.context + "\n",
            "question": vt.question[1:cut],
            "answer_prefix": vt.question[cut:],
            "answer": list(vt.answers),
            "task": "vt",
        },
    ]
    task = only(f"ruler-file:path={write(tmp_path / 'vt.jsonl', rows)}")
    for i in range(2):
        sample = task.sample(i, None, tiny)
        assert (sample.context, sample.question, sample.answers) == (vt.context, vt.question, vt.answers)
        assert sample.max_new_tokens == 30
    assert len(only(f"ruler-file:path={tmp_path / 'vt.jsonl'},task=vt")) == 1


def test_each_kind_of_question_is_found(tmp_path: Path, tiny: Any) -> None:
    samples = [t.sample(0, 4000, tiny) for t in parse_task("niah_multiquery,cwe:rare=1,repeats=6,fwe")]
    asked = (
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nQuestion: Who? Answer:"
    )
    context = asked[2:115] + "\n\nThe following are given documents.\n\nDocument 1:\nHe."
    rows = [{"input": s.context + s.question, "outputs": s.answers} for s in samples]
    rows.append({"input": context + asked, "outputs": ["He", "Him"]})
    task = only(f"ruler-file:path={write(tmp_path / 'all.jsonl', rows)}")
    for i, sample in enumerate(samples):
        read = task.sample(i, None, tiny)
        assert (read.context, read.question) == (sample.context, sample.question)
        assert (read.metric, read.max_new_tokens) == (sample.metric, sample.max_new_tokens)
    read = task.sample(3, None, tiny)
    assert (read.context, read.question) == (context, asked)
    assert (read.metric, read.max_new_tokens) == ("string_match_part", 32)


# ---------------------------------------- broken


def test_broken_lines_are_left_out_and_named(tmp_path: Path) -> None:
    good = json.loads(RULER.read_text().splitlines()[0])
    path = tmp_path / "rows.jsonl"
    write(
        path,
        [
            good,
            '{"input": "cut',
            "",
            [1, 2],
            {"input": "no question here", "outputs": ["x"]},
            {"input": 5, "outputs": ["x"]},
            {"outputs": ["x"]},
            {**good, "outputs": []},
            good,
        ],
    )
    path.write_bytes(path.read_bytes() + b'{"input": "\xff"}\n')
    task = only(f"ruler-file:path={path}")
    with pytest.warns(UserWarning, match=r"7 rows left out: line 2: not JSON .*and 2 more"):
        assert len(task) == 2
    assert [one.line for one in task.skipped] == [2, 4, 5, 6, 7, 8, 10]
    assert [one.reason.split()[0] for one in task.skipped] == ["not", "not", "no", "the", "no", "the", "not"]
    assert "'input' is int" in task.skipped[3].reason
    assert task.skipped[-1].reason == "not UTF-8"


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", ["{", "]"])
    with pytest.raises(InputError, match=r"no row that can be used \(line 1: not JSON"):
        len(only(f"gsm8k:path={path}"))
    path.write_text("")
    with pytest.raises(InputError, match=r"no row that can be used$"):
        len(only(f"gsm8k:path={path}"))
    with pytest.raises(InputError, match=r"nowhere\.jsonl' cannot be read: No such file"):
        len(only("gsm8k:path=nowhere.jsonl"))


# ---------------------------------------- datasets


def test_a_dataset_by_name(hub: dict[tuple[str, ...], list[dict[str, Any]]], tiny: Any) -> None:
    rows = [json.loads(line) for line in RULER.read_text().splitlines()]
    hub["some/ruler", "4096", "test"] = [rows[0], {"input": "x"}, rows[1]]
    task = only("ruler-file:dataset=some/ruler,config=4096")
    with pytest.warns(UserWarning, match="some/ruler: 1 rows left out: line 2"):
        assert len(task) == 2
    assert task.sample(1, None, tiny).answers == tuple(rows[1]["outputs"])
    with pytest.raises(InputError, match=r"some/ruler, 8192, split test, cannot be had: no .* on the Hub"):
        len(only("ruler-file:dataset=some/ruler,config=8192"))


def test_datasets_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install datasets \(or give path=FILE"):
        len(only("longbench:task=qasper"))


# ---------------------------------------- LongBench


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "context": "Some {input} text.",
        "input": "Who was it?",
        "answers": ["Paragraph 3", "she"],
        "length": 4,
        "dataset": name,
        "all_classes": None,
        **more,
    }


def test_prompts_are_longbenchs(tiny: Any, tmp_path: Path) -> None:
    def prompt(name: str, **more: Any) -> str:
        path = write(tmp_path / "one.jsonl", [row(name, **more)])
        sample = only(f"longbench:path={path}").sample(0, None, tiny)
        assert sample.context.endswith("Some {input} text.")
        return f"{sample.context}|{sample.question}"

    assert prompt("hotpotqa") == (
        "Answer the question based on the given passages. Only give me the answer and do not output any "
        "other words.\n\nThe following are given passages.\nSome {input} text.|\n\nAnswer the question based "
        "on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: Who "
        "was it?\nAnswer:"
    )
    assert prompt("repobench-p") == (
        "Please complete the code given below. \nSome {input} text.|Who was it?Next line of code:\n"
    )
    assert prompt("passage_count", input="").endswith("such as 1, 2, 3, and so on.\n\nThe final answer is:")
    assert prompt("vcsum").endswith("会议记录：\nSome {input} text.|\n\n会议总结：")
    assert prompt("multifieldqa_zh").endswith(
        "|\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。"
        "\n\n问题：Who was it?\n回答："
    )
    assert prompt("trec", all_classes=["a"]) == (
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "Some {input} text.|\nWho was it?"
    )


def test_lengths_and_metrics_are_longbenchs() -> None:
    assert len(PROMPTS) == 21
    assert set(SETS_E) <= set(PROMPTS)
    lengths: dict[int, set[str]] = {}
    metrics: dict[str, int] = {}
    for name, prompt in PROMPTS.items():
        lengths.setdefault(prompt.max_new_tokens, set()).add(name)
        metrics[prompt.metric] = metrics.get(prompt.metric, 0) + 1
        assert prompt.after.count("{input}") == (
            0 if name in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc") else 1
        )
    assert lengths == {
        128: {"narrativeqa", "qasper", "dureader", "samsum"},
        64: {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"},
        32: {
            "hotpotqa",
            "2wikimqa",
            "musique",
            "triviaqa",
            "passage_count",
            "passage_retrieval_en",
            "passage_retrieval_zh",
        },
        512: {"gov_report", "qmsum", "multi_news", "vcsum"},
    }
    assert metrics == {
        "qa_f1": 6,
        "qa_f1_line": 1,
        "qa_f1_zh": 1,
        "rouge_l": 3,
        "rouge_l_line": 1,
        "rouge_l_zh": 2,
        "classification": 2,
        "retrieval": 1,
        "retrieval_zh": 1,
        "count": 1,
        "code_sim": 2,
    }
    assert set(metrics) <= set(METRICS)


def test_a_folder_of_longbench(tmp_path: Path, tiny: Any) -> None:
    write(tmp_path / "trec.jsonl", [row("trec", answers=["City"], all_classes=["City", "Food"])])
    write(tmp_path / "qasper.jsonl", [row("qasper"), row("qasper")])
    write(tmp_path / "qasper_e.jsonl", [row("qasper_e")])
    first, second = parse_task(f"longbench:path={tmp_path}")
    assert (first.metric, len(first)) == ("qa_f1", 2)
    sample = second.sample(0, None, tiny)
    assert sample.answers == ("City", "", "City", "Food")
    assert METRICS[sample.metric]("City or Food\nCity", sample.answers) == 0.5
    e = only(f"longbench-e:path={tmp_path}")
    assert e.name == f"longbench-e:path={tmp_path},task=qasper"
    assert len(e) == 1
    assert only(e.name) == e
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"no set of longbench-e, such as qasper_e\.jsonl"):
        parse_task(f"longbench-e:path={tmp_path / 'none'}")


def test_a_file_says_which_set_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row("lcc_e"), row("unknown"), row("trec")])
    task = only(f"longbench:path={path}")
    with pytest.warns(UserWarning, match=r"line 2: .*'unknown', which is no set.*line 3: .*all_classes"):
        assert task.metric == "code_sim"
    assert len(task) == 1


def test_longbench_by_name(hub: dict[tuple[str, ...], list[dict[str, Any]]]) -> None:
    hub["THUDM/LongBench", "qasper", "test"] = [row("qasper")]
    hub["THUDM/LongBench", "qasper_e", "test"] = [row("qasper")] * 2
    assert len(only("longbench:task=qasper")) == 1
    assert len(only("longbench-e:task=qasper")) == 2


def test_longbench_v2(hub: dict[tuple[str, ...], list[dict[str, Any]]], tiny: Any) -> None:
    one = {
        "context": " A text. ",
        "question": "Which?",
        **{f"choice_{letter}": f"{letter.lower()} it is " for letter in "ABCD"},
        "answer": "C",
        "domain": "Code",
        "difficulty": "easy",
        "length": "short",
    }
    hub["THUDM/LongBench-v2", "train"] = [one, {**one, "answer": "E"}, {**one, "length": "long"}]
    task = only("longbench-v2:size=short,domain=Code")
    with pytest.warns(UserWarning, match="line 2: the field 'answer' is 'E'"):
        assert len(task) == 1
    sample = task.sample(0, None, tiny)
    assert sample.context + sample.question == (
        "Please read the following text and answer the question below.\n\n<text>\nA text.\n</text>\n\nWhat "
        "is the correct answer to this question: Which?\nChoices:\n(A) a it is\n(B) b it is\n(C) c it is\n"
        "(D) d it is\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.context.endswith("</text>")
    assert METRICS[sample.metric]("The correct answer is (C)", sample.answers) == 1


# ---------------------------------------- GSM8K


@pytest.mark.parametrize("real", [False, True], ids=["ours", "real"])
def test_gsm8k_with_examples(real: bool, tokenizer: Any, real_data: Callable[[str], Path]) -> None:
    path = real_data("gsm8k/grade_school_math/data/test.jsonl") if real else GSM8K
    task = only(f"gsm8k:path={path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(task) == len(rows) >= 5
    for i, one in enumerate(rows[:20]):
        sample = task.sample(i, None, tokenizer)
        assert sample.question == f"\n\nQuestion: {one['question'].strip()}\nAnswer:"
        assert one["question"] not in sample.context
        shown = sample.context.split("\n\n")
        assert len(shown) == (8 if real else 4)  # ours: all the other rows
        assert set(shown) <= {
            f"Question: {r['question'].strip()}\nAnswer: {r['answer'].strip()}" for r in rows
        }
        assert METRICS["gsm8k"](one["answer"], sample.answers) == 1
        assert METRICS["gsm8k"]("#### 12345", sample.answers) == 0
    assert task.sample(0, None, tokenizer, seed=1).context != task.sample(0, None, tokenizer).context
    assert task.sample(0, None, tokenizer) == task.sample(0, None, tokenizer)


def test_gsm8k_takes_as_many_examples_as_fit(tokenizer: Any) -> None:
    task = only(f"gsm8k:path={GSM8K},max_new_tokens=64")
    whole = task.sample(2, None, tokenizer)
    size = taken(tokenizer, whole)
    assert task.sample(2, size, tokenizer) == whole
    less = task.sample(2, size - 1, tokenizer)
    assert less.context == whole.context.rsplit("\n\nQuestion: ", 1)[0]
    assert only(f"gsm8k:path={GSM8K},shots=1").sample(2, None, tokenizer).context.count("Question:") == 1
    with pytest.raises(InputError, match=r"takes \d+ tokens with one example, the length is 150"):
        task.sample(2, 150, tokenizer)


def test_gsm8ks_examples_come_from_train(
    hub: dict[tuple[str, ...], list[dict[str, Any]]], tmp_path: Path, tiny: Any
) -> None:
    hub["openai/gsm8k", "main", "test"] = [{"question": "1+1?", "answer": "It is 2.\n#### 2"}]
    hub["openai/gsm8k", "main", "train"] = [
        {"question": "2+2?", "answer": "It is 4.\n#### 4"},
        {"question": "3+3?", "answer": "It is 6."},
    ]
    with pytest.warns(UserWarning, match="line 2: the field 'answer' has no '#### number'"):
        sample = only("gsm8k").sample(0, None, tiny)
    assert sample.context == "Question: 2+2?\nAnswer: It is 4.\n#### 4"
    path = write(tmp_path / "one.jsonl", hub["openai/gsm8k", "main", "test"])
    with pytest.raises(InputError, match="no row to take as an example"):
        only(f"gsm8k:path={path}").sample(0, None, tiny)
    sample = only(f"gsm8k:path={path},examples={GSM8K},shots=2").sample(0, None, tiny)
    assert sample.context.count("Question:") == 2
