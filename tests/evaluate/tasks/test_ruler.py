"""RULER: what stands where, how often, and the published scores by hand."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks import find
from grace_opt.evaluate.tasks.base import Prompt, Question
from grace_opt.evaluate.tasks.haystack import NOISE
from grace_opt.evaluate.tasks.ruler.chain import BEGIN, EXAMPLE_LINES
from grace_opt.evaluate.tasks.ruler.counted import common_words
from grace_opt.evaluate.tasks.ruler.family import NEEDLES, Ruler
from grace_opt.evaluate.tasks.ruler.needles import DEPTHS

NEEDLE = re.compile(r"A special (number|uuid) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
SHAPES = {"word": r"[a-z]+-[a-z]+", "number": r"[1-9]\d{6}", "uuid": UUID}


def made(task: str, tokenizer: Any, length: int = 1024, count: int = 4, **options: Any) -> list[Prompt]:
    return Ruler().prompts(f"ruler/{task}", tokenizer, length, count, **options)


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_have_the_published_kinds_and_numbers(task: str, tokenizer: Any) -> None:
    what = NEEDLES[task]
    for prompt in made(task, tokenizer):
        [question] = prompt.questions
        found = NEEDLE.findall(prompt.context)
        assert all(kind == what.value for kind, *_ in found)
        assert all(
            re.fullmatch(SHAPES[what.key], key) and re.fullmatch(SHAPES[what.value], value) for _, key, value in found
        )
        keys = Counter(key for _, key, _ in found)
        if what.haystack == "needles":
            assert len(found) > 8
        else:
            assert len(keys) == what.keys
            assert set(keys.values()) == {what.values}
        asked = [key for key in keys if key in question.text]
        assert len(asked) == what.queries
        assert sorted(question.answers) == sorted(value for _, key, value in found if key in asked)
        assert question.new_tokens == 128
        assert question.prefix.endswith(" are" if len(question.answers) > 1 else " is")


def test_several_keys_are_listed_with_a_final_and(tokenizer: Any) -> None:
    [question] = made("niah_multiquery", tokenizer, count=1)[0].questions
    assert re.search(r"for \S+, \S+, \S+, and \S+ in the text above\?$", question.text)
    assert question.text.startswith("\nWhat are all the special numbers for ")


def test_needles_lie_among_sentences_at_forty_depths(tokenizer: Any) -> None:
    assert len(DEPTHS) == 40
    assert (DEPTHS[0], DEPTHS[1], DEPTHS[-1]) == (0, 3, 100)
    depths = []
    for prompt in made("niah_single_2", tokenizer, count=12):
        text = prompt.context.partition("\n")[2]
        before, needle, after = re.split(f"({NEEDLE.pattern})", text)[0], NEEDLE.search(text), NEEDLE.split(text)[-1]
        assert needle is not None
        assert before == "" or before.rstrip().endswith((".", "!", "?")) or after == ""
        depths.append(len(before) / (len(before) + len(after)))
    assert max(depths) - min(depths) > 0.4


def test_filler_is_one_line_over_and_over(tokenizer: Any) -> None:
    for prompt in made("niah_single_1", tokenizer):
        lines = prompt.context.split("\n")[1:]
        assert Counter(line == NOISE for line in lines)[False] == 1
    other = made("niah_single_1", tokenizer)
    assert len({prompt.context.index("A special") for prompt in other}) > 1


def test_values_of_one_key_are_all_asked_for(tokenizer: Any) -> None:
    for prompt in made("niah_multivalue", tokenizer):
        assert len(set(prompt.questions[0].answers)) == 4


def test_the_chain_leads_from_the_number_to_every_name(tokenizer: Any) -> None:
    for prompt in made("vt", tokenizer):
        example, context = prompt.context.split(BEGIN)[1:]
        [question] = prompt.questions
        assert re.findall(r"VAR ([A-Z]{5}) = ", context) == list(question.answers)
        held = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", context))
        for name in question.answers:
            while not name.isdigit():
                name = held[name]  # noqa: PLW2901
            assert name in question.text
        assert "5 variables hold the value" in question.prefix
        assert example.count(NOISE) == EXAMPLE_LINES
        names = re.findall(r"VAR ([A-Z]{3}) = ", example)
        assert len(names) == 5
        assert example.rstrip().endswith(f"namely: {' '.join(names)}")
        assert len(tokenizer(BEGIN + example)["input_ids"]) <= 500
        assert question.new_tokens == 30


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(2048, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))]
)
def test_common_words_repeat_as_published(
    length: int, often: int, seldom: int, example: tuple[int, int, int], tokenizer: Any
) -> None:
    [prompt] = made("cwe", tokenizer, length, 1)
    shown, listed = re.findall(r"Keep those in mind\.\n(.*?)\n?(?:Question|$)", prompt.context, re.DOTALL)

    def counts(text: str) -> Counter[str]:
        numbered = re.findall(r"(\d+)\. (\S+)", text)
        assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
        return Counter(word for _, word in numbered)

    [question] = prompt.questions
    assert {word for word, times in counts(listed).items() if times == often} == set(question.answers)
    assert set(counts(listed).values()) == {often, seldom}
    assert len(question.answers) == 10
    assert sorted(counts(shown).values()) == [example[2]] * (example[0] - 10) + [example[1]] * 10
    assert question.new_tokens == 120


def test_a_list_longer_than_the_packaged_words_goes_on_with_compounds() -> None:
    context, question = common_words(np.random.default_rng(0), 3000, 32768)
    listed = Counter(re.findall(r"\d+\. (\S+)", context.rpartition("Keep those in mind.")[2]))
    assert len(listed) == 3000
    assert {word for word, times in listed.items() if times == 30} == set(question.answers)
    for answer in question.answers:
        assert [word for word in listed if answer in word] == [answer]


def test_coded_words_follow_zipf(tokenizer: Any) -> None:
    for prompt in made("fwe", tokenizer, 2048, 2):
        counts = Counter(prompt.context.partition("appears. ")[2].split())
        ranked = [word for word, _ in counts.most_common(5)]
        assert ranked[0] == "..."
        assert tuple(ranked[1:4]) == prompt.questions[0].answers
        assert counts[ranked[3]] > counts[ranked[4]]
        # rank k appears floor(n / (k^2 zeta(2))) times; n is one of those that give the noise its count
        n = next(n for n in range(10**5) if math.floor(n / (math.pi**2 / 6)) == counts["..."])
        assert any(
            [math.floor(m * k**-2 / (math.pi**2 / 6)) for k in range(1, 5)] == [counts[word] for word in ranked[:4]]
            for m in (n, n + 1)
        )
        assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
        assert len(counts) <= (2048 - 50) // 50
        assert prompt.questions[0].new_tokens == 50


@pytest.mark.parametrize(
    ("answers", "text", "score"),
    [
        (("1234567", "7654321"), "They are 1234567 and 7654321.", 1.0),
        (("1234567", "7654321"), "It is 1234567.", 0.5),
        (("Amber-River",), "AMBER-RIVER", 1.0),
        (("two\nlines",), "two\x07lines", 1.0),  # control characters count as ends of lines
        (("12345",), "123456", 1.0),  # substrings count, as published
        (("a", "b", "c", "d"), "", 0.0),
    ],
)
def test_all_answers_count_by_their_share(answers: tuple[str, ...], text: str, score: float) -> None:
    assert Ruler().score("ruler/niah_multivalue", Question("", answers, 1), text) == score


def test_one_answer_is_enough_in_question_answering() -> None:
    question = Question("", ("the Seine", "Seine"), 1)
    assert Ruler().score("ruler/qa_1", question, " It is the seine") == 1
    assert Ruler().score("ruler/qa_1", question, " It is the Rhine") == 0
    assert Ruler().score("ruler/vt", question, " Seine") == 0.5


SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": f"River number {at} flows through the city of Town{at}.",
                    "qas": [
                        {
                            "question": f"Where does river {at} flow?",
                            "is_impossible": False,
                            "answers": [{"text": f"Town{at}"}, {"text": f"Town{at}"}],
                        },
                        {"question": "What?", "is_impossible": True, "answers": []},
                    ],
                }
                for at in range(start, start + 3)
            ],
        }
        for start in (0, 3, 6)
    ]
}
HOTPOT = [
    {
        "question": f"Which is {at}?",
        "answer": f"Yes{at}",
        "context": [[f"Title {at} {page}", [f"Sentence of {at}.", f" Yes{at}."]] for page in range(10)],
    }
    for at in range(3)
]


def test_questions_on_documents_of_a_local_copy(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    assert "ruler/qa_1" in [task for _, task in find("ruler", str(tmp_path))]
    assert "ruler/qa_2" not in [task for _, task in find("ruler", str(tmp_path))]
    for local in (tmp_path, tmp_path / "squad.json"):
        family = Ruler(str(local))
        prompts = family.prompts("ruler/qa_1", tokenizer, 400, 9)
        assert len({prompt.questions[0].text for prompt in prompts}) == 9
        for prompt in prompts:
            [question] = prompt.questions
            [answer] = question.answers
            at = int(answer.removeprefix("Town"))
            documents = re.findall(r"Document (\d+):\nRiver number (\d+)", prompt.context)
            assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
            near = {str(each) for each in range(at // 3 * 3, at // 3 * 3 + 3)}
            assert near <= {each for _, each in documents}  # its own article comes first
            assert len(documents) > 9  # documents repeat when there are no more
            assert question.new_tokens == 32
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT), encoding="utf-8")
    [prompt] = Ruler(str(tmp_path)).prompts("ruler/qa_2", tokenizer, 800, 1)
    [answer] = prompt.questions[0].answers
    assert prompt.context.count(f" {answer}.") >= 10


def test_missing_and_broken_copies_are_sentences(tmp_path: Path, tokenizer: Any) -> None:
    def ask(local: Path | None) -> None:
        Ruler(None if local is None else str(local)).prompts("ruler/qa_1", tokenizer, 400, 1)

    for local in (None, tmp_path):
        with pytest.raises(
            InputError, match=r"ruler/qa_1 needs squad\.json, which is not packaged; give it or its folder"
        ):
            ask(local)
    file = tmp_path / "squad.json"
    broken: list[Any] = [
        [],
        {"data": [{}]},
        {"data": [{"paragraphs": [{"context": 3, "qas": []}]}]},
        {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b", "answers": []}]}]}]},
    ]
    for value in broken:
        file.write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(
            InputError, match=r"squad\.json is not in the format of squad \(.*give the published dev file"
        ):
            ask(tmp_path)
    file.write_text('{"data": []}', encoding="utf-8")
    with pytest.raises(InputError, match="has no question that can be answered"):
        ask(tmp_path)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"squad\.json is not JSON \(.*; fetch it again"):
        ask(tmp_path)
