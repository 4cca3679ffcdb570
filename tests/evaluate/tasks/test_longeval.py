"""LongEval: a record of lines, one question, and its last number."""

from __future__ import annotations

import re
from typing import Any

import pytest

from grace_opt.evaluate.tasks.base import Question
from grace_opt.evaluate.tasks.longeval import LongEval

LINE = re.compile(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)


@pytest.mark.parametrize("task", LongEval.tasks)
def test_the_record_holds_the_line_that_is_asked_for(task: str, tokenizer: Any) -> None:
    asked = []
    for chat in (False, True):
        for prompt in LongEval().prompts(task, tokenizer, 1024, 6, chat=chat):
            [question] = prompt.questions
            lines = dict(LINE.findall(prompt.context))
            assert len(lines) == prompt.context.count("\nline ") > 20
            label = re.search(r"in line (\S+)\? Give the number\.$", question.text)
            assert label is not None
            assert question.answers == (lines[label[1]],)
            assert all(1 <= int(content) <= 50_000 for content in lines.values())
            assert question.new_tokens == (100 if chat else 15)
            assert question.prefix == ("" if chat else f"\nline {label[1]}: REGISTER_CONTENT is <")
            if task == "longeval/lrt":
                assert list(lines) == [str(each) for each in range(1, len(lines) + 1)]
            else:
                assert all(re.fullmatch("[a-z]+-[a-z]+", each) for each in lines)
            asked.append(list(lines).index(label[1]) / len(lines))
    assert max(asked) - min(asked) > 0.3


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The number is 24169.", 1),
        ("In line 7 the <REGISTER_CONTENT> is <24169>", 1),
        ("It is 024169", 1),  # numbers are compared, not digits
        ("24169, in line 7", 0),  # the last number counts
        ("241690", 0),
        ("24169\nline 8: REGISTER_CONTENT is <17>", 0),
        ("I do not know", 0),
        ("", 0),
    ],
)
def test_the_last_number_counts(text: str, score: int) -> None:
    assert LongEval().score("longeval/lines", Question("", ("24169",), 100), text) == score


def test_only_the_line_that_the_prompt_began_is_read() -> None:
    begun = Question("", ("24169",), 15, prefix="\nline 7: REGISTER_CONTENT is <")
    assert LongEval().score("longeval/lrt", begun, "24169>\nline 8: REGISTER_CONTENT is <17>") == 1
    assert LongEval().score("longeval/lrt", begun, "17>\nline 8: REGISTER_CONTENT is <24169>") == 0
