"""LongBench's metrics, from 0 to 1, of one text against one answer, by the rules of THUDM/LongBench.

Rouge and the cutting of Chinese into words are those of the packages that it uses: rouge and jieba.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from grace_opt.errors import InputError

Metric = Callable[[str, str, Sequence[str]], float]

CHINESE_PUNCTUATION = (
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a\uff1b"
    "\uff1c\uff1d\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62\uff63\uff64"
    "\u3001\u3003\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d"
    "\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\ufe4f."
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def qa_f1(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles."""
    return _f1(_normalised(text).split(), _normalised(answer).split())


def qa_f1_zh(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """F1 of the words that jieba cuts, without case and punctuation."""
    return _f1(_chinese_words(text), _chinese_words(answer))


def rouge_l(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """F of the longest common subsequence of words; 0 where the package makes none, as of a text without words."""
    rouge = _package("rouge").Rouge()
    try:
        return float(rouge.get_scores([text], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_zh(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """`rouge_l` of the words that jieba cuts."""
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(answer)))


def classification(text: str, answer: str, choices: Sequence[str]) -> float:
    """One over the number of classes that the text names, if the right one is among them.

    A class that is part of the right one's name does not count. As published, the class after one that was left out is
    not looked at.
    """
    named = [each for each in choices if each in text]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """The share of the text's numbers that are the number of the right paragraph."""
    return count(text, paragraph(answer))


def count(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """The share of the text's numbers that are the answer."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(text: str, answer: str, _: Sequence[str] = ()) -> float:
    """Likeness in hundredths of the first line that holds no comment: difflib's ratio, as fuzzywuzzy takes it."""
    lines = text.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def paragraph(answer: str) -> str:
    """The number in "Paragraph 12", in English or Chinese. Raises InputError if there is none."""
    found = re.search(r"(?:Paragraph |\u6bb5\u843d)(\d+)", answer)
    if found is None:
        raise InputError(f'the answer {answer!r} names no paragraph; it must be like "Paragraph 12"')
    return found[1]


def require(metric: Metric) -> None:
    """Raise InputError if a package that the metric needs is missing."""
    for package, users in {"rouge": (rouge_l, rouge_l_zh), "jieba": (rouge_l_zh, qa_f1_zh)}.items():
        if metric in users:
            _package(package)


def _package(name: str) -> Any:
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"this LongBench task is scored with the package {name}, which is not installed here; "
            "pip install 'grace-opt[tasks]'"
        ) from None
    if name == "jieba":
        package.setLogLevel(logging.WARNING)  # it tells on stderr how it loads its dictionary
    return package


def _cut(text: str) -> list[str]:
    return list(_package("jieba").cut(text, cut_all=False))


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_ANY_PUNCTUATION).split()) for word in _cut(text))
    return [word for word in words if word]


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(found) & Counter(right)).total()
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(right)
    return 2 * precision * recall / (precision + recall)
