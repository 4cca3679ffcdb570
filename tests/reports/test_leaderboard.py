"""Folders as kvpress's leaderboard has them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate import answers
from grace_opt.evaluate.tasks.base import Prompt, Question, Rendered
from grace_opt.evaluate.tasks.longeval import LongEval
from grace_opt.evaluate.tasks.ruler.family import Ruler
from grace_opt.evaluate.trial import Trial
from grace_opt.reports import leaderboard


def asked(family: Any, task: str, number: int, protocol: str = "context-only") -> answers.Asked:
    question = Question("What is it?\nSay", ("one", 'tw"o'), 128, " It is")
    prompt = Prompt(task, number, 4096, "a context", (question,))
    return answers.Asked(family, prompt, 0, Rendered(protocol, [1, 2], [3]))


def measured(of: answers.Asked, trial: Trial | None, score: float, held: int) -> dict[str, Any]:
    about = answers.FULL if trial is None else trial.asked()
    where = {"family": of.family.name, "task": of.prompt.task, "length": 4096, "protocol": of.ids.protocol}
    return {**about, **where, "answer": "one, é\n2", "score": score, "bytes": held, "full_bytes": 100}


def test_answers_of_ruler_are_written_by_method_budget_and_protocol(tmp_path: Path) -> None:
    trial = Trial("grace-opt", method("grace-opt"), Budget(share=0.25))
    questions = [
        asked(Ruler(), "ruler/vt", 0),
        asked(Ruler(), "ruler/vt", 1),
        asked(Ruler(), "ruler/cwe", 0),
        asked(Ruler(), "ruler/vt", 0, "query-aware"),
        asked(LongEval(), "longeval", 0),
    ]
    found = []
    for at, each in enumerate(questions):
        found += [measured(each, None, 1.0, 100), measured(each, trial, 0.5 * (at != 1), 24)]
    leaderboard.write(questions, found, tmp_path, "org/model", 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "ruler__4096__org--model__grace-opt__0.75",
        "ruler__4096__org--model__grace-opt__0.75__query_aware",
        "ruler__4096__org--model__no_press__0.00",
        "ruler__4096__org--model__no_press__0.00__query_aware",
    ]
    place = tmp_path / "ruler__4096__org--model__grace-opt__0.75"
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert {config[name] for name in ("dataset", "data_dir", "model", "press_name")} == {
        "ruler",
        "4096",
        "org/model",
        "grace-opt",
    }
    assert (config["compression_ratio"], config["query_aware"], config["seed"]) == (0.75, False, 3)
    assert json.loads(config["press_init_command"])["method"] == "grace-opt"
    assert json.loads((place / "metrics.json").read_text()) == {
        "vt": {"string_match": 25.0},
        "cwe": {"string_match": 50.0},
    }
    with (place / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["vt", "vt", "cwe"]
    assert rows[0]["question"] == "What is it?\nSay"
    assert json.loads(rows[0]["answer"]) == ["one", 'tw"o']
    assert (rows[0]["predicted_answer"], rows[0]["answer_prefix"]) == ("one, é\n2", " It is")
    assert (rows[0]["max_new_tokens"], rows[0]["compression_ratio"]) == ("128", "0.7600")
