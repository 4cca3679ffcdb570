"""Answers as kvpress's leaderboard has them: predictions.csv, metrics.json and config.yaml of each method and budget.

The names of folders, columns and keys are those of kvpress 0.5 (evaluation/evaluate.py), for whoever lays results
beside its own. Its tasks are RULER's and LongBench's; what differs from the published ones is said in docs/tasks.md.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grace_opt.files import json_text, write_json, write_text

if TYPE_CHECKING:
    from grace_opt.evaluate.answers import Asked

Record = Mapping[str, Any]
FAMILIES = ("ruler", "longbench", "longbench-e")
COLUMNS = ("task", "question", "answer_prefix", "answer", "max_new_tokens", "predicted_answer", "compression_ratio")


def write(questions: Sequence[Asked], measured: Sequence[Record], folder: str | Path, model: str, seed: int) -> None:
    """A folder for each method, budget, length and protocol; nothing for other families than `FAMILIES`.

    ``measured``: of each question, as many records as trials, in order. Raises InputError if a file cannot be written.
    """
    each = len(measured) // max(len(questions), 1)
    runs: dict[tuple[Any, ...], list[tuple[Asked, Record]]] = defaultdict(list)
    for at, record in enumerate(measured):
        if record["family"] in FAMILIES:
            asked = questions[at // each]
            runs[asked.family.name, asked.prompt.length, asked.ids.protocol, at % each].append((asked, record))
    for rows in runs.values():
        config = _config(rows, model, seed)
        place = Path(folder) / _name(config)
        write_text(place / "predictions.csv", _predictions(rows))
        write_json(place / "metrics.json", _metrics(record for _, record in rows))
        write_text(place / "config.yaml", "".join(f"{key}: {json_text(value)}\n" for key, value in config.items()))


def _config(rows: Sequence[tuple[Asked, Record]], model: str, seed: int) -> dict[str, Any]:
    """What was asked for, by kvpress's keys; a value of YAML is one of JSON."""
    asked, record = rows[0]
    share = record["budget_share"]
    removed = fmean(_removed(each) for _, each in rows) if share is None else 1 - share
    return {
        "dataset": record["family"],
        "data_dir": str(asked.prompt.length) if record["family"] == "ruler" else None,
        "model": model,
        "device": None,
        "press_name": "no_press" if record["method"] == "full" else record["method"],
        "compression_ratio": round(removed, 4),
        "key_channel_compression_ratio": None,
        "fraction": 1.0,
        "max_new_tokens": None,
        "max_context_length": None if record["family"] == "ruler" else asked.prompt.length,
        "query_aware": asked.ids.protocol == "query-aware",
        "needle_depth": None,
        "model_kwargs": {},
        "press_init_command": json_text({"method": record["method"], **record["options"]}, default=str),
        "seed": seed,
    }


def _name(config: Mapping[str, Any]) -> str:
    """Of a run's folder."""
    parts = [
        config["dataset"],
        config["data_dir"],
        config["model"].replace("/", "--"),
        config["press_name"].replace("/", "--"),
        f"{config['compression_ratio']:.2f}",
        config["max_context_length"] and f"max_context{config['max_context_length']}",
        config["query_aware"] and "query_aware",
    ]
    return "__".join(str(part) for part in parts if part)


def _predictions(rows: Iterable[tuple[Asked, Record]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for asked, record in rows:
        question = asked.question
        table.writerow(
            [
                record["task"].partition("/")[2],
                question.text,
                question.prefix,
                json_text(list(question.answers)),
                question.new_tokens,
                record["answer"],
                f"{_removed(record):.4f}",
            ]
        )
    return text.getvalue()


def _removed(record: Record) -> float:
    """The share of the bytes that is not held."""
    return 1 - float(record["bytes"]) / float(record["full_bytes"])


def _metrics(measured: Iterable[Record]) -> dict[str, Any]:
    """Mean scores in percent: of RULER's tasks under ``string_match``."""
    scores: dict[str, list[float]] = defaultdict(list)
    family = ""
    for record in measured:
        family = record["family"]
        scores[record["task"].partition("/")[2]].append(record["score"])
    means = {task: round(100 * fmean(of), 2) for task, of in scores.items()}
    return {task: {"string_match": mean} for task, mean in means.items()} if family == "ruler" else means
