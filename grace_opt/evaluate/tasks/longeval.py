"""LongEval's line retrieval: one number of a record of many lines.

Generator and score follow DachengLi1/LongChat (commit 4b5faa5). What differs is `LongEval.differs`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from grace_opt.evaluate.tasks.base import Family, Prompt, Question
from grace_opt.evaluate.tasks.filling import fill, stream
from grace_opt.evaluate.tasks.haystack import compound, compounds

BEGIN = (
    "Below is a record of lines. Each line begins with its label, as 'line <label>', and ends with a number, its "
    "<REGISTER_CONTENT>. Keep the <REGISTER_CONTENT> of every label in mind: after the record you will be asked for "
    "one of them. The record begins here:\n\n"
)
ANSWER_TOKENS = 100
LINE_TOKENS = 15  # where the prompt begins the answer, as for the published models that only complete text


class LongEval(Family):
    """As many lines as a length holds, with random words (``lines``) or numbers in order (``lrt``) for labels."""

    name = "longeval"
    tasks = ("longeval/lines", "longeval/lrt")
    differs = (
        "Not comparable with published LongEval: the wording and the list of words are our own; the number of lines "
        "follows from the length in tokens; labels differ from each other. Without a chat template the prompt begins "
        "the answer, and only its first line is read. The chat template is the tokenizer's own."
    )

    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        def prompt(number: int, lines: int) -> Prompt:
            context, question = _record(task, length, number, seed, lines, chat)
            return Prompt(task, number, length, context, (question,))

        return fill([partial(prompt, number) for number in range(count)], tokenizer, length, chat)

    def score(self, task: str, question: Question, text: str) -> float:
        """1 if the last number of the text is the line's."""
        if question.prefix:
            text = text.partition("\n")[0]
        numbers = re.findall(r"\d+", text)
        return float(bool(numbers) and int(numbers[-1]) == int(question.answers[0]))


def _record(task: str, length: int, number: int, seed: int, lines: int, chat: bool) -> tuple[str, Question]:
    rng = stream(seed, task, length, number)
    contents = rng.integers(1, 50_001, size=lines)
    if task == "longeval/lrt":
        labels = [str(each) for each in range(1, lines + 1)]
    else:
        labels = [compound(int(each)) for each in rng.choice(compounds(), size=lines, replace=False)]
    asked = int(rng.integers(lines))
    record = "".join(
        f"line {label}: REGISTER_CONTENT is <{content}>\n" for label, content in zip(labels, contents, strict=True)
    )
    label, answers = labels[asked], (str(contents[asked]),)
    text = f"\nThe record ends here. What is the <REGISTER_CONTENT> in line {label}? Give the number."
    if chat:
        return BEGIN + record, Question(text, answers, ANSWER_TOKENS)
    return BEGIN + record, Question(text, answers, LINE_TOKENS, f"\nline {label}: REGISTER_CONTENT is <")
