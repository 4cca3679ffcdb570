"""Needle in a haystack: exact lengths, places and answers; what counts as found; the real model finds it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt.evaluate.answers import asked, measure
from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.needle import DEPTHS, NEEDLE, QUESTION, VAULTS, Needle, found


def test_the_task_hides_one_number_at_each_depth_in_turn(tokenizer: Any) -> None:
    prompts = Needle().prompts("needle/single", tokenizer, 1024, 6)
    assert [prompt.place["depth"] for prompt in prompts] == [*DEPTHS, DEPTHS[0]]
    for prompt in prompts:
        [question] = prompt.questions
        needle = NEEDLE.format(question.answers[0])
        before, after = prompt.context.split(needle)
        words, all_words = len(before.split()), len(before.split()) + len(after.split())
        assert prompt.place["depth"] * all_words - 101 <= words <= prompt.place["depth"] * all_words + 1
        assert question.text + question.prefix == QUESTION


def test_several_numbers_are_asked_for_one_by_one(tokenizer: Any) -> None:
    for prompt in Needle().prompts("needle/multi", tokenizer, 1024, 3):
        hidden = dict(re.findall(r"The secret number of the (\w+) vault is (\d+)\. Remember it\.", prompt.context))
        assert set(hidden) == set(VAULTS)
        assert len(set(hidden.values())) == len(VAULTS)
        assert [question.answers for question in prompt.questions] == [(hidden[vault],) for vault in VAULTS]
        for vault, question in zip(VAULTS, prompt.questions, strict=True):
            assert question.text == f"\n\nQuestion: What is the secret number of the {vault} vault?"
            assert question.prefix == f"\nAnswer: The secret number of the {vault} vault is"


def test_the_task_scores_the_number_alone() -> None:
    question = Question("", ("48213",), 10)
    assert Needle().score("needle/single", question, " 48,213. Remember it.") == 1
    assert Needle().score("needle/single", question, " 482137") == 0


@given(number=st.integers(10_000, 99_999))
def test_only_the_whole_number_counts(number: int) -> None:
    answer = str(number)
    for text in (f" {answer}.", f"{answer}", f" {answer[:2]},{answer[2:]}, I think", f"**{answer}**\n"):
        assert found(text, answer)
    for text in (
        "",
        "I do not know",
        f"{answer}7",
        f"1{answer}",
        answer[:4],
        f" {number + 1 if number < 99_999 else 1}",
    ):
        assert not found(text, answer)


@pytest.mark.slow
@pytest.mark.model
def test_the_uncompressed_model_finds_it(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    questions = [
        each
        for length in (512, 1024)
        for each in asked(Needle(), Needle().prompts("needle/single", tokenizer, length, 3), tokenizer, False)
    ]
    assert [record["score"] for record in measure(model, tokenizer, questions, [])] == [1.0] * 12
