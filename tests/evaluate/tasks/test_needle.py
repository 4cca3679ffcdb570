"""Needle in a haystack: exact lengths, places and answers; what counts as found; the real model finds it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import read_documents
from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.needle import (
    ANSWER_TOKENS,
    NEEDLE,
    QUESTION,
    VAULTS,
    Needle,
    found,
    needle_prompts,
)
from grace_opt.evaluate.tasks.needle import (
    DEPTHS as TASK_DEPTHS,
)

DEPTHS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> list[int]:
    text = "\n".join(document.text for document in read_documents(None)[:4])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def test_prompts_have_their_length_number_and_question(tokenizer: Any, haystack: list[int]) -> None:
    prompts = needle_prompts(haystack, tokenizer, [256, 1024], DEPTHS, repeats=2)
    assert [(p.length, p.depth) for p in prompts] == [(n, d) for n in (256, 1024) for d in DEPTHS for _ in range(2)]
    assert len({p.answer for p in prompts}) == len(prompts)
    for prompt in prompts:
        assert len(prompt.ids) == prompt.length
        text = tokenizer.decode(prompt.ids)
        assert re.fullmatch(r"[1-9]\d{4}", prompt.answer)
        assert text.count(NEEDLE.format(prompt.answer)) == 1
        assert text.count(prompt.answer) == 1
        assert text.endswith(QUESTION)


def test_the_needle_is_at_its_depth_after_a_sentence(tokenizer: Any, haystack: list[int]) -> None:
    for prompt in needle_prompts(haystack, tokenizer, [1024], DEPTHS, repeats=3):
        before = tokenizer.decode(prompt.ids).partition(NEEDLE.format(prompt.answer))[0]
        place = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        text = 1024 - len(tokenizer(NEEDLE.format(prompt.answer) + QUESTION)["input_ids"])
        assert prompt.depth * text - 110 <= place <= prompt.depth * text + 5
    ends = [" One.", " Two.", " and", " then", " more"]
    ids = [token for end in ends for token in tokenizer(end, add_special_tokens=False)["input_ids"]]
    prompt = needle_prompts(ids * 40, tokenizer, [120], [0.5])[0]
    before = tokenizer.decode(prompt.ids).partition(NEEDLE.format(prompt.answer))[0]
    assert before.endswith(".")


def test_the_rest_of_the_prompt_is_the_haystack(tokenizer: Any, haystack: list[int]) -> None:
    prompt = needle_prompts(haystack, tokenizer, [300], [0.5])[0]
    before, after = tokenizer.decode(prompt.ids).split(NEEDLE.format(prompt.answer))
    assert before + after.removesuffix(QUESTION) in tokenizer.decode(haystack)


def test_a_prompt_does_not_depend_on_what_else_is_asked_for(tokenizer: Any, haystack: list[int]) -> None:
    many = needle_prompts(haystack, tokenizer, [256, 512], DEPTHS, repeats=2)
    assert (
        needle_prompts(haystack, tokenizer, [512], [0.5]) == [p for p in many if (p.length, p.depth) == (512, 0.5)][:1]
    )
    assert needle_prompts(haystack, tokenizer, [256, 512], DEPTHS, repeats=2) == many
    assert needle_prompts(haystack, tokenizer, [512], [0.5], seed=1) != needle_prompts(
        haystack, tokenizer, [512], [0.5]
    )


def test_what_cannot_be_hidden_is_a_sentence(tokenizer: Any, haystack: list[int]) -> None:
    with pytest.raises(InputError, match=r"depth 1\.5 is outside the text"):
        needle_prompts(haystack, tokenizer, [256], [1.5])
    with pytest.raises(
        InputError, match=r"10 tokens hold no needle and its question; use lengths of at least (\d+)"
    ) as e:
        needle_prompts(haystack, tokenizer, [10], [0.5])
    least = int(str(e.value).rpartition(" ")[2])
    assert len(needle_prompts(haystack, tokenizer, [least], [0.5])[0].ids) == least
    with pytest.raises(InputError, match=r"the haystack has 100 tokens and 256 need \d+; give a longer text"):
        needle_prompts(haystack[:100], tokenizer, [256], [0.5])


def test_the_task_hides_one_number_at_each_depth_in_turn(tokenizer: Any) -> None:
    prompts = Needle().prompts("needle/single", tokenizer, 1024, 6)
    assert [prompt.place["depth"] for prompt in prompts] == [*TASK_DEPTHS, TASK_DEPTHS[0]]
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
def test_the_uncompressed_model_finds_it(smollm2: tuple[Any, Any], haystack: list[int]) -> None:
    import torch

    model, tokenizer = smollm2
    for prompt in needle_prompts(haystack, tokenizer, [512, 1024], [0.1, 0.5, 0.9]):
        ids = torch.tensor([prompt.ids])
        with torch.inference_mode():
            every = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
            )
        assert found(tokenizer.decode(every[0, prompt.length :]), prompt.answer), prompt.depth
