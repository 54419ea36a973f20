"""Metrics: how a generated answer is judged, each as its benchmark defines it: 0 to 1, higher is better.

Definitions (facts; the code is ours): RULER, scripts/eval/synthetic/constants.py; LongBench, metrics.py and
eval.py; LongBench v2, pred.py; GSM8K, its paper's "#### n". The metric "loss" is not one of them: no answer
is generated for it.
"""

from __future__ import annotations

import difflib
import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from modicum.errors import InputError

Metric = Callable[[str, Sequence[str]], float]
"""From what was generated and the sample's answers to a score."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)
_NUMBER = re.compile(r"\d+")
_GSM8K = re.compile(r"####\s*(-?[0-9.,]*[0-9])")
_CHOICE = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand somewhere in the prediction, whatever the case (RULER)."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the answers stands somewhere in the prediction, whatever the case (RULER's questions)."""
    text = prediction.lower()
    return float(any(answer.lower() in text for answer in answers))


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, after SQuAD's normalisation: lower case, no punctuation, no
    articles, white space made single spaces."""
    return float(any(_normal(prediction) == _normal(answer) for answer in answers))


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of words after the same normalisation; the best of the answers."""
    words = _normal(prediction).split()
    return max(_f1(words, _normal(answer).split()) for answer in answers)


def qa_f1_line(prediction: str, answers: Sequence[str]) -> float:
    """`qa_f1` of the prediction's first line (LongBench's few-shot questions)."""
    return qa_f1(_first_line(prediction), answers)


def qa_f1_zh(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words that `jieba` cuts, lower case and without punctuation; the best of the answers."""

    def words(text: str) -> list[str]:
        cut = ("".join(w.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for w in _cut(text))
        return [word for word in cut if word]

    wanted = words(prediction)
    return max(_f1(wanted, words(answer)) for answer in answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, by `rouge-score` without stemming; the best answer's.

    LongBench has it from the package `rouge`, which keeps case and punctuation, cuts at full stops, counts a
    word once a sentence and joins the sentences' subsequences: its numbers are a little different.
    """
    return _rouge(prediction, answers, chinese=False)


def rouge_l_line(prediction: str, answers: Sequence[str]) -> float:
    """`rouge_l` of the prediction's first line (LongBench's samsum)."""
    return rouge_l(_first_line(prediction), answers)


def rouge_l_zh(prediction: str, answers: Sequence[str]) -> float:
    """`rouge_l` of the words that `jieba` cuts."""
    return _rouge(prediction, answers, chinese=True)


def classification(prediction: str, answers: Sequence[str]) -> float:
    """1 / n if the right class is among the n classes named in the prediction's first line (LongBench).

    Args:
        answers: the right classes, an empty string, then all classes there are.

    A class whose name is part of the right one's does not count; as in the benchmark, the class named right
    after one that was so left out is not looked at.
    """
    cut = list(answers).index("") if "" in answers else len(answers)
    right, known = answers[:cut], answers[cut + 1 :] or answers
    line = _first_line(prediction)
    best = 0.0
    for answer in right:
        named = [name for name in known if name in line]
        i = 0
        while i < len(named):
            if named[i] in answer and named[i] != answer:
                del named[i]
            i += 1
        if answer in named:
            best = max(best, 1 / len(named))
    return best


def retrieval(prediction: str, answers: Sequence[str]) -> float:
    """The share of the prediction's numbers that are the right one, as in "Paragraph 7" (LongBench)."""
    return max(_numbers(prediction, _paragraph(answer, r"Paragraph (\d+)")) for answer in answers)


def retrieval_zh(prediction: str, answers: Sequence[str]) -> float:
    """The same for "段落7"."""
    return max(_numbers(prediction, _paragraph(answer, r"段落(\d+)")) for answer in answers)


def count(prediction: str, answers: Sequence[str]) -> float:
    """The share of the prediction's numbers that are the answer (LongBench's passage_count)."""
    return max(_numbers(prediction, answer) for answer in answers)


def code_sim(prediction: str, answers: Sequence[str]) -> float:
    """Likeness of the first line of code (no line with "`", "#" or "//"), by difflib, in whole percent.

    LongBench takes `fuzz.ratio` of fuzzywuzzy, which is this where python-Levenshtein is not installed; with
    it (or with rapidfuzz) a line may differ by a few percent, as other blocks are matched.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(_ratio(code, answer) for answer in answers)


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if "The correct answer is (A)" names the right letter; asterisks and the brackets may be left out
    (LongBench v2)."""
    text = prediction.strip().replace("*", "")
    found = _CHOICE[0].search(text) or _CHOICE[1].search(text)
    return float(found is not None and found[1] in answers)


def gsm8k(prediction: str, answers: Sequence[str]) -> float:
    """1 if the number after the first "####" is the answer's; commas and a last full stop do not count."""
    found = _GSM8K.search(prediction)
    return float(found is not None and any(_plain(found[1]) == _plain(answer) for answer in answers))


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (
        string_match_all,
        string_match_part,
        exact,
        qa_f1,
        qa_f1_line,
        qa_f1_zh,
        rouge_l,
        rouge_l_line,
        rouge_l_zh,
        classification,
        retrieval,
        retrieval_zh,
        count,
        code_sim,
        multiple_choice,
        gsm8k,
    )
}
"""By name; `Sample.metric` is one of these, or "loss"."""


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none (near ones are named), or it is "loss", which no answer has.
    """
    if name in METRICS:
        return METRICS[name]
    if name == "loss":
        raise InputError("the metric 'loss' judges no answer: take the mean loss of the sample's target")
    near = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5)
    tail = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(METRICS)} and loss"
    raise InputError(f"there is no metric {name!r}; {tail}")


def _normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(words: list[str], wanted: list[str]) -> float:
    same = sum((Counter(words) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _numbers(prediction: str, wanted: str) -> float:
    found = _NUMBER.findall(prediction)
    return sum(number == wanted for number in found) / len(found) if found else 0.0


def _paragraph(answer: str, pattern: str) -> str:
    found = re.search(pattern, answer)
    if not found:
        raise InputError(f"the answer {answer!r} names no paragraph, such as 'Paragraph 7'")
    return found[1]


def _ratio(one: str, other: str) -> float:
    if one == other:
        return 1.0
    if not one or not other:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, one, other).ratio()) / 100


def _plain(number: str) -> str:
    return number.replace(",", "").strip()


class _JiebaWords:
    """A tokenizer as `rouge-score` takes it."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in _cut(text) if word.strip()]


def _rouge(prediction: str, answers: Sequence[str], *, chinese: bool) -> float:
    scorer = _scorer(chinese)
    return max(float(scorer.score(answer, prediction)["rougeL"].fmeasure) for answer in answers)


@cache
def _scorer(chinese: bool) -> Any:
    package: Any = _needed("rouge_score.rouge_scorer", "rouge-score")
    return package.RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_JiebaWords() if chinese else None)


def _cut(text: str) -> list[str]:
    package: Any = _needed("jieba", "jieba")
    return list(package.cut(text, cut_all=False))


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"this metric needs the package {package}: pip install {package}") from error
