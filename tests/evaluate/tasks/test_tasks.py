"""All families: names, lengths, one text under both protocols, the same prompts in another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks import FAMILIES, find
from grace_opt.evaluate.tasks.base import PROTOCOLS, Prompt, Question, rendered, uses_chat
from grace_opt.evaluate.tasks.filling import fill, size, stream
from grace_opt.evaluate.tasks.haystack import Haystack, compound, compounds, distinct, hide, sentence_ends, words
from grace_opt.models.texts import prose
from tests.support import ROOT

MADE = [(family, task) for name in ("needle", "ruler", "longeval") for family, task in find(name)]
LENGTHS = (1024, 1500)

DIGEST = """
import sys
from transformers import AutoTokenizer
from tests.evaluate.tasks.test_tasks import digest
print(digest(AutoTokenizer.from_pretrained(sys.argv[1])))
"""


def digest(tokenizer: Any) -> str:
    made = [family.prompts(task, tokenizer, 1024, 1, seed=3, chat=True) for family, task in MADE]
    return hashlib.sha256(repr(made).encode()).hexdigest()


@pytest.mark.parametrize(("family", "task"), MADE, ids=[task for _, task in MADE])
def test_prompts_fill_their_length(family: Any, task: str, tokenizer: Any) -> None:
    for length in LENGTHS:
        for chat in (False, True):
            for prompt in family.prompts(task, tokenizer, length, 2, chat=chat):
                assert length - 90 <= size(prompt, tokenizer, chat) <= length  # 90: more than a line of any task
                assert (prompt.task, prompt.length) == (task, length)


@pytest.mark.parametrize(("family", "task"), MADE, ids=[task for _, task in MADE])
def test_answers_are_in_the_context_and_score_one(family: Any, task: str, tokenizer: Any) -> None:
    for prompt in family.prompts(task, tokenizer, 1024, 2):
        for question in prompt.questions:
            assert question.answers
            for answer in question.answers:
                assert answer in prompt.context
                assert answer not in question.text + question.prefix
            assert family.score(task, question, f" {' '.join(question.answers)}.") == 1
            assert family.score(task, question, "I do not know") == 0


@pytest.mark.parametrize(("family", "task"), MADE, ids=[task for _, task in MADE])
def test_a_length_that_is_too_short_names_one_that_is_not(family: Any, task: str, tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^{task} needs prompts of at least \d+ tokens, got a length of 20$"
    ) as caught:
        family.prompts(task, tokenizer, 20, 2)
    # Random numbers of a prompt depend on its length, so the least may be a few tokens off.
    least = int(str(caught.value).split(" tokens")[0].rpartition(" ")[2])
    assert len(family.prompts(task, tokenizer, least + 20, 2)) == 2
    with pytest.raises(InputError, match="needs prompts of at least"):
        family.prompts(task, tokenizer, least - 20, 2)


def test_a_prompt_depends_on_nothing_but_seed_task_length_and_number(tokenizer: Any) -> None:
    for family, task in MADE[:4]:
        many = family.prompts(task, tokenizer, 1024, 3)
        assert family.prompts(task, tokenizer, 1024, 1) == many[:1]
        assert len({prompt.context for prompt in many}) == 3
        assert family.prompts(task, tokenizer, 1024, 1, seed=1) != many[:1]


def test_the_same_prompts_in_another_process(tokenizer: Any) -> None:
    told = subprocess.run(
        [sys.executable, "-c", DIGEST, tokenizer.name_or_path],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solvers")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == digest(tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_both_protocols_are_one_text_with_one_bos(chat: bool, tokenizer: Any) -> None:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "<|endoftext|>[{{ messages[0]['content'] }}]"  # writes its own BOS, as Llama's does
    question = Question("\nWhat is it?", ("7",), 5, prefix=" It is")
    prompt = Prompt("t", 0, 100, "A text. It is 7.", (question,))
    aware, after = (rendered(prompt, question, protocol, tokenizer, chat) for protocol in PROTOCOLS)
    assert aware.compressed + aware.following == after.compressed + after.following
    assert len(aware.following) == 1
    text = tokenizer.decode(after.compressed), tokenizer.decode(after.following)
    if chat:
        assert text == ("<|endoftext|>[A text. It is 7.", "\nWhat is it?]It is")
    else:
        assert text == ("A text. It is 7.", "\nWhat is it? It is")
    assert size(prompt, tokenizer, chat) == len(after.compressed) + len(after.following) + 5


def test_a_bos_of_the_tokenizer_stands_once(tokenizer: Any) -> None:
    tokenizer = deepcopy(tokenizer)

    class Begun:
        """A tokenizer that begins every text."""

        bos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    question = Question("\nWhat?", ("7",), 5)
    for protocol in PROTOCOLS:
        ids = rendered(Prompt("t", 0, 100, "A text.", (question,)), question, protocol, Begun())
        assert (ids.compressed + ids.following).count(0) == 1
        assert ids.compressed[0] == 0


def test_a_plain_prompt_takes_no_template(tokenizer: Any) -> None:
    question = Question("\nWhat?", ("7",), 5, prefix=" It is")
    plain = Prompt("t", 0, 100, "A text.", (question,), plain=True)
    assert rendered(plain, question, "context-only", tokenizer, True) == rendered(
        plain, question, "context-only", tokenizer, False
    )


def test_a_template_that_is_asked_for_must_be_there(tokenizer: Any) -> None:
    assert uses_chat(tokenizer, None)
    assert not uses_chat(tokenizer, False)
    without = deepcopy(tokenizer)
    without.chat_template = None
    assert not uses_chat(without, None)
    with pytest.raises(InputError, match="the tokenizer has no chat template; leave out --chat"):
        uses_chat(without, True)
    changing = deepcopy(tokenizer)
    changing.chat_template = "{{ messages[0]['content'] | replace('\\x00', '') }}"
    question = Question("\nWhat?", ("7",), 5)
    with pytest.raises(InputError, match="chat template changes what a user says"):
        rendered(Prompt("t", 0, 100, "A text.", (question,)), question, "context-only", changing, True)


def test_names() -> None:
    assert [task for _, task in find("needle")] == ["needle/single", "needle/multi"]
    assert [task for _, task in find("ruler/vt")] == ["ruler/vt"]
    ruler = [task for _, task in find("ruler")]
    assert len(ruler) == 11
    assert not {"ruler/qa_1", "ruler/qa_2"} & set(ruler)  # no data here
    assert len(FAMILIES["ruler"].tasks) == 13
    assert [task for _, task in find("longbench-e/qasper")] == ["longbench-e/qasper"]
    assert len(find("longbench")) == 21
    assert len(find("longbench-e")) == 13
    for name, nearest in (
        ("rulr", "'ruler'"),
        ("ruler/niah_single1", "'ruler/niah_single_1'"),
        ("longbench/quasper", "'longbench/qasper'"),
        ("needles/multi", "'needle'"),
    ):
        with pytest.raises(InputError, match=f"unknown task '{name}'; did you mean {nearest}"):
            find(name)
    for name in FAMILIES:
        family = FAMILIES[name](None)
        assert family.name == name
        assert family.differs.endswith(".")
        assert all(task.startswith(f"{name}/") for task in family.tasks)


def test_packaged_words() -> None:
    every = [word for kind in ("adjectives", "nouns", "verbs") for word in words(kind)]
    assert len(every) == len(set(every)) > 1000
    joined = " ".join(every)
    assert all(joined.count(word) == 1 for word in every)  # none is part of another one
    assert compounds() > 200_000
    assert len({compound(number) for number in range(0, compounds(), 1000)}) == len(range(0, compounds(), 1000))
    assert compound(compounds() - 1) == f"{words('adjectives')[-1]}-{words('nouns')[-1]}"


def test_haystacks() -> None:
    text = Haystack("One two. Three\n\nfour! Five")
    assert len(text) == 5
    assert text.stretch(3, 7) == ["four! ", "Five", "One ", "two. ", "Three\n\n", "four! ", "Five"]
    assert sentence_ends(text.stretch(0, 5)) == [2, 4, 5]
    assert sentence_ends(text.stretch(0, 4)) == [2, 4]
    assert hide(text.stretch(0, 5), ["A.", "B."], [2, 4]) == "One two. A. Three\n\nfour! B. Five"
    assert hide(text.stretch(0, 2), ["A.", "B."], [0, 2]) == "A. One two. B."
    with pytest.raises(InputError, match="there is no text to hide anything in"):
        Haystack(" \n")


def test_a_text_of_ones_own_is_the_haystack(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "own.txt").write_text("Zebras graze here. " * 200, encoding="utf-8")
    for name in ("needle/single", "ruler/niah_single_2"):
        for source in (tmp_path, tmp_path / "own.txt"):
            [(family, task)] = find(name, str(source))
            assert "Zebras graze here. Zebras" in family.prompts(task, tokenizer, 512, 1)[0].context


def test_filling_finds_the_most_that_fits(tokenizer: Any) -> None:
    def make(amount: int) -> Prompt:
        return Prompt("t", 0, 50, " a" * amount, (Question(" b", ("c",), 3),))

    for length in range(5, 40):
        [prompt] = fill([make], tokenizer, length, False)
        assert size(prompt, tokenizer, False) == length
    with pytest.raises(InputError, match="t needs prompts of at least 5 tokens, got a length of 4"):
        fill([make], tokenizer, 4, False)


def test_a_prompt_is_as_long_as_with_its_longest_question(tokenizer: Any) -> None:
    questions = (Question(" b", ("c",), 3), Question(" b b b", ("c",), 2), Question(" b", ("c",), 2, prefix=" d"))
    assert size(Prompt("t", 0, 50, " a a", questions), tokenizer, False) == 2 + 3 + 2


def test_prose_of_a_python_without_tk() -> None:
    assert list(prose(["no_module_of_this_name", "heapq"])) == list(prose(["heapq"]))


def test_streams_of_random_numbers_differ() -> None:
    places = [(0, "a", 1, 0), (1, "a", 1, 0), (0, "b", 1, 0), (0, "a", 2, 0), (0, "a", 1, 1)]
    assert len({int(stream(*place).integers(2**60)) for place in places}) == len(places)
    numbers = iter([1, 1, 2, 3])
    assert distinct(lambda: str(next(numbers)), 2, {"2"}) == ["1", "3"]
