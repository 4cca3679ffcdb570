"""The one declaration of what is recorded, and that everything that records things agrees with it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from grace_opt import InputError, load_bundle, solve_many
from grace_opt.records import (
    EvaluatedRecord,
    EvaluationRecord,
    InstanceRecord,
    LimitsUsed,
    Record,
    SolutionRecord,
    TaskRecord,
    TimingNs,
    added,
    budget_name,
    budget_words,
    check,
    names,
)
from grace_opt.solution import Limits, Timing
from tests.support import DATA, ROOT

GENERATOR = ROOT / "docs" / "generate_records.py"
LABELS: dict[str, Any] = {"bundle": "b", "ratio": 0.5, "limits": dict.fromkeys(names(LimitsUsed), 1)}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What greedy says of a head."""
    problems = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.5)
    return solve_many(problems[:1], "greedy")[0].record()


def test_a_solution_records_these_fields(record: dict[str, Any]) -> None:
    assert set(record) == set(names(SolutionRecord))
    check(SolutionRecord, record)
    check(SolutionRecord, json.dumps(record))
    assert names(TimingNs) == tuple(asdict(Timing()))
    assert set(names(LimitsUsed)) == set(asdict(Limits())) - {"seed", "threads"}


def test_a_record_may_have_more_but_not_less(record: dict[str, Any]) -> None:
    line = {**record, **LABELS, "colour": "blue"}
    check(InstanceRecord, json.dumps(line))
    check(Record, line)  # what all records say together is not known before the end
    for name in {*names(InstanceRecord)} - {"value_ratio", "budget_bytes"}:
        with pytest.raises(InputError, match=f"^{name}: Field required$"):
            check(InstanceRecord, {key: value for key, value in line.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": float("nan")}, "objective: Input should be a finite number"),
        ({"status": "fine"}, "status: "),
        ({"digest": "abc"}, "digest: "),
        ({"timing_ns": {"total": 1}}, "timing_ns: build: Field required"),
        ({"pruned": ["one"]}, "pruned: 0: "),
    ],
)
def test_what_is_wrong_is_named(record: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(SolutionRecord, {**record, **changes})
    with pytest.raises(InputError, match="Invalid JSON"):
        check(SolutionRecord, '{"problem": ')


def test_the_fields_are_inherited_and_told_apart() -> None:
    assert added(InstanceRecord) == ("bundle", "ratio", "value_ratio", "budget_bytes", "limits")
    assert added(Record) == ("best_known", "over_best", "best_bound", "best_bound_solver", "reference_gap")
    assert added(EvaluatedRecord) == names(EvaluatedRecord)
    assert added(EvaluationRecord) == names(EvaluationRecord)[len(names(EvaluatedRecord)) :]
    assert added(TaskRecord)[:2] == ("protocol", "tasks")


@pytest.mark.parametrize(
    ("budget", "name", "words"),
    [
        ({"ratio": 0.5}, "0.5", "ratio 0.5"),
        ({"ratio": 0.1 + 0.2, "value_ratio": None}, "0.30000000000000004", "ratio 0.30000000000000004"),
        ({"ratio": 0.5, "value_ratio": 0.0}, "0.5,0", "ratios 0.5 and 0"),
        ({"ratio": None, "value_ratio": None, "budget_bytes": 11520}, "11520B", "11520 bytes a token"),
    ],
)
def test_a_budget_has_a_name(budget: dict[str, Any], name: str, words: str) -> None:
    assert (budget_name(budget), budget_words(budget)) == (name, words)


def test_importing_it_loads_no_pydantic() -> None:
    code = "import sys, grace_opt.records; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_columns_of_the_database_are_fields() -> None:
    from grace_opt.service.db import tables

    own = {"id", "run", "budget", "recipe", "time_ns", "body"}  # what SQL needs and a record does not have as such
    columns = {column.name: column for column in tables.Record.__table__.columns if column.name not in own}
    hints = typing.get_type_hints(Record)
    assert set(columns) <= set(names(Record))
    kinds = {str: sqlalchemy.String, float: sqlalchemy.Float}
    for name, column in columns.items():
        classes = set(typing.get_args(hints[name]) or [hints[name]])
        assert column.nullable == (type(None) in classes), name
        (kind,) = classes - {type(None)}
        base = str if issubclass(kind, str) else kind
        assert isinstance(column.type, kinds[base]), name
        if base is str and kind is not str:
            assert all(len(value) <= column.type.length for value in kind), name


def test_the_api_says_the_same() -> None:
    from pydantic import TypeAdapter

    from grace_opt.service import schemas

    schema = TypeAdapter(schemas.Records).json_schema()["$defs"]["Record"]
    assert tuple(sorted(schema["properties"])) == tuple(sorted(names(Record)))
    for each in fields(Record):
        assert schema["properties"][each.name]["description"] == each.metadata["description"]


if GENERATOR.is_file():

    def pages() -> Any:
        """The module that writes the tables of the docs."""
        spec = importlib.util.spec_from_file_location("generate_records", GENERATOR)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_the_docs_say_the_same() -> None:
        module, shown = pages(), ""
        for page in map(Path, module.PAGES):
            text = page.read_text(encoding="utf-8")
            assert module.render(text) == text, "run: python docs/generate_records.py"
            shown += text
        for model in (SolutionRecord, InstanceRecord, Record, EvaluationRecord):
            assert f"<!-- fields: {model.__name__} -->" in shown
