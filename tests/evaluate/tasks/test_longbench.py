"""LongBench: metrics by hand, rows of a local copy, what is cut, and what is wrong with a copy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grace_opt.errors import InputError
from grace_opt.evaluate.tasks import find
from grace_opt.evaluate.tasks.base import rendered
from grace_opt.evaluate.tasks.filling import size
from grace_opt.evaluate.tasks.longbench import metrics
from grace_opt.evaluate.tasks.longbench.family import LongBench, LongBenchE
from grace_opt.evaluate.tasks.longbench.wording import EVEN, WORDING


def row(**fields: Any) -> dict[str, Any]:
    return {
        "context": "The fox lives in the forest. ",
        "input": "Where does the fox live?",
        "answers": ["in the forest"],
        "all_classes": None,
        "length": 4500,
        **fields,
    }


def copy(folder: Path, split: str, *rows: dict[str, Any]) -> str:
    text = "".join(f"{json.dumps(each)}\n" for each in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The forest.", "a FOREST", 1),
        ("in the dark forest", "the forest", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # 1 of 3 words, 1 of 1
        (
            "north north south",
            "north east",
            2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2),
        ),  # a word counts as often as in both
        ("e-mail", "email", 1),  # punctuation is taken out, not replaced
        ("", "forest", 0),
        ("the", "a", 0),
    ],
)
def test_f1_of_words(text: str, answer: str, score: float) -> None:
    assert metrics.qa_f1(text, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"), [("7", 1), ("There are 7 or 8.", 0.5), ("17", 0), ("seven", 0), ("7, 7 and 3", 2 / 3)]
)
def test_numbers_count_by_their_share(text: str, score: float) -> None:
    assert metrics.count(text, "7") == pytest.approx(score)
    assert metrics.retrieval(text, "Paragraph 7") == pytest.approx(score)
    assert metrics.retrieval(text, "\u6bb5\u843d7") == pytest.approx(score)


def test_classes_by_how_many_are_named() -> None:
    choices = ["Food", "Food sort", "Animal", "Sport"]
    assert metrics.classification("Type: Animal", "Animal", choices) == 1
    assert metrics.classification("Animal or Sport", "Animal", choices) == 0.5
    assert metrics.classification("Food sort", "Food sort", choices) == 1  # part of the right one's name
    assert metrics.classification("Food sort", "Food", choices) == 0.5  # and not the other way round
    assert metrics.classification("Sport", "Animal", choices) == 0
    # The class after one that was left out is kept, as published: "o" is part of the right one too.
    assert metrics.classification("Food", "Food", ["F", "o", "Food"]) == 0.5


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("return a + b", 1),
        ("\n\nreturn a + b\nmore", 1),
        ("# comment\nreturn a + b", 1),
        ("```python\n// so\nreturn a + b", 1),
        ("return a - b", 0.92),  # 11 of 12 characters on both sides: 22 / 24
        ("# only a comment", 0),
        ("", 0),
        ("xyz", 0),
    ],
)
def test_likeness_of_code(text: str, score: float) -> None:
    assert metrics.code_similarity(text, "return a + b") == score


def test_rouge() -> None:
    pytest.importorskip("rouge")
    # 4 different words of 5 on both sides are a common subsequence; the package adds 1e-8
    assert metrics.rouge_l("the cat sat on the mat", "the cat is on the mat") == pytest.approx(0.8, abs=1e-6)
    assert metrics.rouge_l("a b", "a b") == pytest.approx(1)
    assert metrics.rouge_l("", "a b") == 0


def test_chinese() -> None:
    pytest.importorskip("jieba")
    pytest.importorskip("rouge")
    same = "\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002"  # Beijing is China's capital.
    assert metrics.qa_f1_zh(same, same) == 1
    assert metrics.qa_f1_zh(same, same.rstrip("\u3002")) == 1  # punctuation does not count
    assert 0 < metrics.qa_f1_zh("\u4e2d\u56fd", same) < 1
    assert metrics.rouge_l_zh(same, same) == pytest.approx(1)


def test_a_missing_package_is_a_sentence_before_anything_runs(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    local = copy(tmp_path, "gov_report", row())
    with pytest.raises(
        InputError, match=r"package rouge, which is not installed here; pip install 'grace-opt\[tasks\]'"
    ):
        LongBench(local).prompts("longbench/gov_report", tokenizer, 2048, 1)


def test_every_task_asks_and_is_scored_by_its_metric(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(metrics, "require", lambda metric: None)
    for task in WORDING:
        copy(
            tmp_path,
            task,
            row(all_classes=["in the forest", "elsewhere"], answers=["in the forest", "Paragraph 3 \u6bb5\u843d3"]),
        )
    found = find("longbench", str(tmp_path))
    assert [task for _, task in found] == [f"longbench/{task}" for task in WORDING]
    for family, task in found:
        if WORDING[task.partition("/")[2]].metric is metrics.retrieval:
            copy(tmp_path, task.partition("/")[2], row(answers=["Paragraph 3"]))
        [prompt] = family.prompts(task, tokenizer, 2048, 5)  # there is one row
        [question] = prompt.questions
        assert "The fox lives in the forest." in prompt.context
        asks = "input" in WORDING[task.partition("/")[2]].after
        assert ("Where does the fox live?" in question.text) == asks
        assert question.new_tokens in (32, 64, 128, 512)
        assert size(prompt, tokenizer, False) < 2048
    lengths = {task: wording.new_tokens for task, wording in WORDING.items()}
    assert (lengths["qasper"], lengths["hotpotqa"], lengths["gov_report"], lengths["samsum"]) == (128, 32, 512, 128)
    assert {task for task, wording in WORDING.items() if wording.plain} == {
        *("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    }


def test_the_best_answer_counts_and_one_line_of_tasks_with_examples(tmp_path: Path, tokenizer: Any) -> None:
    local = copy(tmp_path, "triviaqa", row(answers=["the Seine", "the Rhine"], input="Which river?\nAnswer:"))
    family = LongBench(local)
    [prompt] = family.prompts("longbench/triviaqa", tokenizer, 2048, 1)
    assert prompt.plain
    assert prompt.questions[0].text.endswith("Which river?\nAnswer:")
    assert family.score("longbench/triviaqa", prompt.questions[0], "\nRhine\nPassage: another one") == 1
    assert family.score("longbench/qasper", prompt.questions[0], "\nRhine\nthat") == pytest.approx(2 / 3)
    local = copy(tmp_path, "trec", row(answers=["Sport"], all_classes=["Sport", "Food"], input="Type:"))
    [prompt] = family.prompts("longbench/trec", tokenizer, 2048, 1)
    assert family.score("longbench/trec", prompt.questions[0], "Sport\nFood") == 1


def test_a_long_document_loses_its_middle(tmp_path: Path, tokenizer: Any) -> None:
    text = " ".join(f"Sentence {number} stands here." for number in range(1000))
    family = LongBench(copy(tmp_path, "qasper", row(context=text)))
    for chat in (False, True):
        for length in (400, 1000):
            [prompt] = family.prompts("longbench/qasper", tokenizer, length, 1, chat=chat)
            assert length - 10 <= size(prompt, tokenizer, chat) <= length
            ids = rendered(prompt, prompt.questions[0], "context-only", tokenizer, chat)
            whole = tokenizer.decode(ids.compressed + ids.following)
            front, back = whole.split("Sentence 0 ")[0], whole.split("Sentence 999 ")[1]
            assert WORDING["qasper"].before in front
            assert "Where does the fox live?" in back
            # Half of what is kept is from each end of the whole, as published.
            kept = LongBench(copy(tmp_path, "qasper", row(context=text))).prompts(
                "longbench/qasper", tokenizer, 10**6, 1, chat=chat
            )[0]
            full = rendered(kept, kept.questions[0], "context-only", tokenizer, chat)
            half = (length - 128) // 2
            every = full.compressed + full.following
            assert tokenizer.decode(every[: half - 8]) == tokenizer.decode((ids.compressed + ids.following)[: half - 8])
            assert tokenizer.decode(every[8 - half :]) == tokenizer.decode((ids.compressed + ids.following)[8 - half :])
    with pytest.raises(InputError, match=r"longbench/qasper needs prompts of at least \d+ tokens, got a length of 150"):
        family.prompts("longbench/qasper", tokenizer, 150, 1)


def test_rows_are_drawn_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    family = LongBench(copy(tmp_path, "hotpotqa", *(row(input=f"Question {at}?") for at in range(20))))

    def asked(count: int, seed: int = 0) -> list[str]:
        return [
            each.questions[0].text for each in family.prompts("longbench/hotpotqa", tokenizer, 512, count, seed=seed)
        ]

    assert asked(8)[:3] == asked(3)
    assert asked(8) != asked(8, seed=1)
    assert len(set(asked(50))) == 20


def test_rows_of_the_hub_keep_their_own_questions(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row(context="Read. The fox.\n\n"), "question": "Question: Who?\n", "answer_prefix": "Answer:"}]
    asked: list[Any] = []

    def load_dataset(*names: str, **options: str) -> Any:
        asked.append((names, options))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __version__="4.0"))
    [prompt] = LongBenchE().prompts("longbench-e/qasper", tokenizer, 512, 1)
    assert asked == [(("Xnhyacinth/LongBench", "qasper_e"), {"split": "test"})]
    assert prompt.context == "Read. The fox.\n\n"
    assert (prompt.questions[0].text, prompt.questions[0].prefix) == ("Question: Who?\n", "Answer:")


def test_longbench_e_has_ranges_of_length(tmp_path: Path, tokenizer: Any) -> None:
    assert len(EVEN) == 13
    for words, start in ((0, 0), (3999, 0), (4000, 4000), (7999, 4000), (8000, 8000), (20_000, 8000)):
        family = LongBenchE(copy(tmp_path, "qasper_e", row(length=words)))
        [prompt] = family.prompts("longbench-e/qasper", tokenizer, 512, 1)
        assert prompt.place == {"words_from": start}
    assert [task for _, task in find("longbench-e", str(tmp_path))] == ["longbench-e/qasper"]


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("qasper", {"context": None}, 'row 2 of qasper has no string field "context"; every line needs one'),
        ("qasper", {"input": 3}, 'row 2 of qasper has no string field "input"'),
        ("qasper", {"answers": []}, 'row 2 of qasper has no list of strings "answers"'),
        ("qasper", {"answers": "in the forest"}, 'row 2 of qasper has no list of strings "answers"'),
        ("qasper", {"answers": ["\ud800"]}, "row 2 of qasper holds half of a surrogate pair"),
        ("qasper", {"answer_prefix": "Answer:"}, 'row 2 of qasper has no string field "question"'),
        ("trec", {"all_classes": None}, 'row 2 of trec has no list of strings "all_classes"'),
        ("passage_retrieval_en", {"answers": ["seven"]}, "the answer 'seven' names no paragraph"),
        ("qasper_e", {"length": "long"}, 'row 2 of qasper_e has no whole number "length"'),
        ("qasper_e", {"length": -1}, 'row 2 of qasper_e has no whole number "length"'),
    ],
)
def test_rows_that_lack_fields_are_named(
    task: str, fields: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = row(all_classes=["in the forest"], answers=["Paragraph 3"])
    local = copy(tmp_path, task, good, {**good, **fields})
    family = (LongBenchE if task.endswith("_e") else LongBench)(local)
    with pytest.raises(InputError, match=message):
        family.prompts(f"{family.name}/{task.removesuffix('_e')}", tokenizer, 512, 2)


def test_a_copy_without_the_task_is_a_sentence(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"holds nothing of longbench; give a folder with files such as qasper\.jsonl"):
        find("longbench", str(tmp_path))
    with pytest.raises(InputError, match=r"no such file: .*musique\.jsonl or .*validation\.jsonl; give a \.jsonl file"):
        LongBench(str(tmp_path)).prompts("longbench/musique", tokenizer, 512, 1)
    file = copy(tmp_path, "qasper", row()) + "/qasper.jsonl"
    assert [task for _, task in find("longbench", file)] == ["longbench/qasper"]
    (tmp_path / "qasper.jsonl").write_text("no JSON", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 of .*qasper\.jsonl is not JSON"):
        LongBench(file).prompts("longbench/qasper", tokenizer, 512, 1)
