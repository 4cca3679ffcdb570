"""Answers from compressed caches: what the model says, once, under both protocols, and what is made of the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace_opt import InputError
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate import answers
from grace_opt.evaluate.capture import capture, extended
from grace_opt.evaluate.measurements import Measurements
from grace_opt.evaluate.tasks.base import Family, Prompt, Question
from grace_opt.evaluate.trial import Trial, trials
from grace_opt.records import Measurement, TaskRecord, check
from grace_opt.records_file import RecordsFile
from tests.support.families import ByteTokenizer, tiny_model
from tests.support.slack import assert_logits

SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}


class Tokenizer(ByteTokenizer):
    """Also the way back; token 4 is written as a blank."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(29 + token) for token in tokens)


class Echo(Family):
    """Two questions on one context; right is an answer with the letter that is asked for."""

    name = "echo"
    tasks = ("echo/one", "echo/two")
    grows = True

    def prompts(
        self, task: str, tokenizer: Any, length: int, count: int, *, seed: int = 0, chat: bool = False
    ) -> list[Prompt]:
        rng = np.random.default_rng((seed, len(task)))
        found = []
        for number in range(count):
            context = "".join(chr(each) for each in rng.integers(40, 90, length - 20))
            questions = tuple(
                Question(f"? {letter}", (letter,), 6, " it is ") for letter in "XY"[: 1 + (task != self.tasks[0])]
            )
            found.append(Prompt(task, number, length, context, questions, {"depth": number / 2}))
        return found

    def score(self, task: str, question: Question, text: str) -> float:
        return float(question.answers[0] in text)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model("Llama")
    made.generation_config.eos_token_id = made.config.eos_token_id = 7
    return made


def of(count: int = 2, length: int = 100, family: Family | None = None) -> list[answers.Asked]:
    family = family or Echo()
    return [
        each
        for task in family.tasks
        for each in answers.asked(family, family.prompts(task, Tokenizer(), length, count), Tokenizer(), False)
    ]


PLANS = trials({name: method(name, SMALL) for name in ("think", "grace-opt")}, [Budget(share=0.7), Budget(0.5)])


def test_the_uncompressed_answers_are_what_generate_gives(model: Any) -> None:
    family = Echo()
    family.grows = False  # type: ignore[misc]
    asked = of(family=family)
    for each, record in zip(asked, answers.measure(model, Tokenizer(), asked, []), strict=True):
        ids = torch.tensor([each.ids.compressed + each.ids.following])
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert record["answer"] == Tokenizer().decode(made)
        assert (record["method"], record["bytes"]) == ("full", record["full_bytes"])


def test_an_answer_ends_where_more_cannot_change_its_score(model: Any) -> None:
    class Longer(Echo):
        def score(self, task: str, question: Question, text: str) -> float:
            return float(len(text) > 1)

    for record in answers.measure(model, Tokenizer(), of(family=Longer()), PLANS[:1]):
        assert len(record["answer"]) == 2 or chr(29 + 7) in record["answer"]


def test_both_protocols_ask_the_same_text_and_compress_another_part_of_it() -> None:
    asked = of(count=1)
    assert [(each.prompt.task, each.ids.protocol, each.number) for each in asked] == [
        *(("echo/one", protocol, 0) for protocol in ("query-aware", "context-only")),
        *(("echo/two", protocol, i) for protocol in ("query-aware", "context-only") for i in (0, 1)),
    ]
    aware, after = asked[:2]
    assert aware.ids.compressed + aware.ids.following == after.ids.compressed + after.ids.following
    assert len(aware.ids.following) == 1
    assert len(after.ids.compressed) == 80
    assert asked[4].ids.compressed == asked[5].ids.compressed  # one context, compressed once


def test_a_whole_cache_in_disguise_answers_as_the_uncompressed_one(model: Any) -> None:
    nothing = [Trial("nothing", method("grace-opt", SMALL), Budget(0.0))]
    found = answers.measure(model, Tokenizer(), of(), nothing)
    for full, ours in zip(found[::2], found[1::2], strict=True):
        assert ours["answer"] == full["answer"]


def test_bytes_are_under_the_share_and_records_say_all(model: Any) -> None:
    found = answers.measure(model, Tokenizer(), of(), PLANS)
    assert len(found) == (2 + 4) * 2 * (1 + len(PLANS))
    for record in found:
        if record["budget_share"] is not None:
            assert record["bytes"] <= 0.7 * record["full_bytes"]
    records = answers.records(found, PLANS)
    for record in records:
        check(TaskRecord, {"model": "m", **record})
    assert [(r["task"], r["protocol"], r["method"]) for r in records[:3]] == [
        ("echo/one", "query-aware", "full"),
        ("echo/one", "query-aware", "think"),
        ("echo/one", "query-aware", "grace-opt"),
    ]
    assert {record["prompts"] for record in records} == {2}
    assert records[0]["places"] == [
        {"depth": each, "score": records[0]["places"][i]["score"], "asked": 1} for i, each in enumerate((0.0, 0.5))
    ]


def line(task: str, number: int, score: float, protocol: str = "query-aware", question: int = 0) -> dict[str, Any]:
    return {
        "task": task,
        "family": "echo",
        "length": 9,
        "number": number,
        "question": question,
        "protocol": protocol,
        "place": {},
        "bytes": 50,
        "full_bytes": 100,
        "tokens": 10,
        "score": score,
        **answers.FULL,
    }


def test_scores_of_a_prompt_are_one_observation_and_a_family_is_the_mean_of_what_is_solved() -> None:
    """Full and one trial, by hand: two prompts with two questions each, of three tasks, the last of them not solved."""
    trial = [Trial("half", method("think"), Budget(0.5))]
    scores = {
        "echo/a": [1, 0, 1, 1, 0.5, 0, 1, 1],
        "echo/b": [1, 1, 1, 0, 1, 1, 1, 0],
        "echo/c": [0, 0, 0, 0, 0, 0, 1, 0],
    }
    measured = []
    for task, of_task in scores.items():
        rows = iter(of_task)
        for number in range(2):
            for question in range(2):
                full, half = next(rows), next(rows)
                measured += [line(task, number, full, question=question), line(task, number, half, question=question)]
    records = answers.records(measured, trial)
    means = {(r["task"], r["method"], i % 2): r["score"]["mean"] for i, r in enumerate(records)}
    # full: a (1+1)/2, (.5+1)/2; half: a (0+1)/2, (0+1)/2
    assert means["echo/a", "full", 0] == pytest.approx(0.875)
    assert means["echo/a", "full", 1] == pytest.approx(0.5)
    assert [r["solved"] for r in records[::2]] == [True, True, False, True]
    family = records[-2:]
    assert family[0]["task"] == "echo"
    assert family[0]["tasks"] == ["echo/a", "echo/b"]
    assert family[0]["score"]["mean"] == pytest.approx((0.875 + 1) / 2)
    assert family[1]["score"]["mean"] == pytest.approx((0.5 + 0.5) / 2)
    assert family[1]["full_score"] == family[0]["full_score"]
    assert family[1]["against_full"] == 0.5  # two prompts tell no more


def test_a_killed_run_goes_on_and_says_the_same(model: Any, tmp_path: Path) -> None:
    asked, place = of(), tmp_path / "measurements.jsonl"
    whole = answers.measure(model, Tokenizer(), asked, PLANS)
    counted = 0

    class KilledError(Exception):
        pass

    def killed() -> None:
        nonlocal counted
        counted += 1
        if counted == 17:
            raise KilledError

    with pytest.raises(KilledError), RecordsFile(place, Measurement, print) as file:
        answers.measure(model, Tokenizer(), asked, PLANS, measurements=Measurements(file), progress=killed)
    text = place.read_bytes()
    place.write_bytes(text[:-30])  # the last line was being written
    heard: list[str] = []
    with RecordsFile(place, Measurement, heard.append) as file:
        known = Measurements(file)
        again = answers.measure(model, Tokenizer(), asked, PLANS, measurements=known)
    assert "cut off" in heard[0]
    assert [{**each, "key": 0} for each in again] == [{**each, "key": 0} for each in whole]
    lines = place.read_text().splitlines()
    assert len(lines) == len(set(lines)) <= len(whole)
    with RecordsFile(place, Measurement, print) as file:  # nothing is left to do: the model is not asked
        assert answers.measure(model, Tokenizer(), asked, PLANS, measurements=Measurements(file)) == again
    assert place.read_text().splitlines() == lines
    other = [Trial("think", method("think", {**SMALL, "sinks": 3}), Budget(0.5))]
    with RecordsFile(place, Measurement, print) as file:
        answers.measure(model, Tokenizer(), asked, other, measurements=Measurements(file))
    assert len(place.read_text().splitlines()) > len(lines)


def test_prompts_longer_than_the_context_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="300 tokens are more than the model's context of 256"):
        answers.require_context(model, [100, 300])


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_a_share_that_windows_alone_exceed_names_the_least(model: Any, share: float) -> None:
    wide = trials({"think": method("think", {**SMALL, "recent_window": 30})}, [Budget(share=share)])
    with pytest.raises(InputError, match=r"holds at least 0\.\d+ of the uncompressed bytes"):
        answers.measure(model, Tokenizer(), of(1), wide)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("more", [3, 20])
def test_a_context_that_is_read_once_is_seen_as_if_all_were_read_at_once(family: str, more: int) -> None:
    model = tiny_model(family)
    ids = np.random.default_rng(0).integers(3, 99, 120).tolist()
    first = capture(model, ids[:-more], len(ids) - more, 8)
    longer, whole = extended(first, ids[-more:]), capture(model, ids, len(ids), 8)
    assert longer.prefix == 120
    assert longer.ids.tolist() == whole.ids.tolist()
    for layer, queries in whole.queries.items():
        assert_logits(longer.queries[layer], queries)
        for name in ("keys", "values"):
            mine, theirs = (getattr(each.past.layers[layer], name) for each in (longer, whole))
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert first.past.get_seq_length() == 120 - more
