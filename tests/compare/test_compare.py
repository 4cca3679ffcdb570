"""grace-opt compare: one record a head, ratio and solver; nothing finished is lost or run twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grace_opt.compare.run
from grace_opt import BoundKind, GraphBundle, HeadGraph, InputError, Limit, Limits, SubsetProblem, save_bundle
from grace_opt.cli.config import named_options
from grace_opt.compare import compare as compare_by_method
from grace_opt.compare import shifted_geometric_mean, stands, summarise, with_references
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import problems_of
from grace_opt.compression.method import METHODS, method
from grace_opt.records import Record as FullRecord
from grace_opt.records import check
from grace_opt.registry import create
from grace_opt.reports.report import gap_over_time, over_best, own_gap, performance_profile, steps
from grace_opt.solution import Capabilities, RawResult
from tests.support import DATA
from tests.support.command import inside
from tests.support.patience import PATIENCE, until

HEADS = DATA / "heads-smollm2-135m.safetensors"
PLAIN: dict[str, dict[str, Any]] = {"independent": {}, "greedy": {}}
Record = dict[str, Any]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of eight heads with n = 10: the oracle solves them."""
    rng = np.random.default_rng(0)
    heads = []
    for layer in range(4):
        for kv_head in range(2):
            q, k = rng.normal(size=(20, 10)), rng.normal(size=(20, 10)) + 0.5
            heads.append(HeadGraph(layer, kv_head, "key", (q.T @ q) * (k.T @ k)))
    path = tmp_path / "small.safetensors"
    save_bundle(GraphBundle(tuple(heads), {"model": "random"}), path)
    return path


class Scripted:
    """A solver that does what a test wants with a head."""

    name = "scripted"
    capabilities = Capabilities(bounds=True)

    def __init__(self, behave: Callable[[SubsetProblem], RawResult]) -> None:
        self.behave = behave

    def supports(self, problem: SubsetProblem) -> bool | str:
        return True

    def solve(self, problem: SubsetProblem, *rest: Any) -> RawResult:
        return self.behave(problem)


def first(problem: SubsetProblem) -> RawResult:
    """Prunes the first channels."""
    return RawResult(np.arange(problem.n) < problem.prune)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[SubsetProblem], RawResult]], None]:
    def use(behave: Callable[[SubsetProblem], RawResult]) -> None:
        solver = Scripted(behave)
        monkeypatch.setattr(
            grace_opt.compare.run,
            "create",
            lambda name, options: solver if name == "scripted" else create(name, options),
        )

    return use


# Most tests compare with the problems of `GraphBundle.problems`: every head prunes the same, protected channels stay.
UNIFORM = method("grace-opt", {"budget": "uniform", "protection": "default"})
UNIFORM_FLAGS = ("--budget", "uniform", "--protect")
compare = partial(compare_by_method, method=UNIFORM)


def cli(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grace_opt", "compare", *map(str, arguments), *UNIFORM_FLAGS],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def here(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return inside("compare", *arguments, *UNIFORM_FLAGS)


def lines(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def without_references(record: Record) -> Record:
    added = ("best_known", "over_best", "best_bound", "best_bound_solver", "reference_gap")
    return {name: value for name, value in record.items() if name not in added}


# ---------------------------------------------------------------- records and files


def test_one_record_a_head_ratio_and_solver(small: Path, tmp_path: Path) -> None:
    solvers = ("independent", "greedy", "exhaustive")
    flags = [flag for name in solvers for flag in ("--solver", name)]
    arguments = [small, "--ratio", 0.3, "--ratio", 0.6, *flags, "--solver-option", "greedy.direction=best", "--seed", 3]
    done = cli(*arguments, "-o", tmp_path / "r", "-f", "json")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    heads = [f"layers.{layer}.kv_heads.{head}.key" for layer in range(4) for head in range(2)]
    assert [(r["ratio"], r["problem"], r["solver"]) for r in records] == [
        (ratio, head, solver) for ratio in (0.3, 0.6) for head in heads for solver in solvers
    ]
    problems = {(ratio, p.name): p for ratio in (0.3, 0.6) for p in grace_opt.load_bundle(small).problems(ratio)}
    for record in records:
        problem = problems[record["ratio"], record["problem"]]
        optimum = grace_opt.solve(problem, "exhaustive").objective
        plain = grace_opt.solve(problem, record["solver"], options=record["options"], limits=Limits(seed=3)).record()
        assert {**plain, "timing_ns": 0}.items() <= {**record, "timing_ns": 0}.items()
        assert set(record) - set(plain) == {
            *(
                "bundle",
                "ratio",
                "value_ratio",
                "budget_bytes",
                "limits",
                "best_known",
                "over_best",
                "best_bound",
                "best_bound_solver",
            ),
            "reference_gap",
        }
        assert record["bundle"] == str(small)
        assert record["best_known"] == record["best_bound"] == optimum
        assert record["best_bound_solver"] == "exhaustive"
        assert record["over_best"] == pytest.approx(record["objective"] / optimum - 1, abs=1e-12)
        assert record["reference_gap"] == pytest.approx((record["objective"] - optimum) / record["objective"])
    assert {r["options"].get("direction") for r in records} == {None, "best"}
    stored = lines(tmp_path / "r")
    assert sorted(map(json.dumps, stored)) == sorted(json.dumps(without_references(record)) for record in records)
    (run,) = json.loads((tmp_path / "r" / "run.json").read_text())["runs"]
    assert run["state"] == "complete"
    assert run["command"][:2] == ["grace-opt", "compare"]
    assert run["options"]["ratio"] == {"value": [0.3, 0.6], "source": "flag"}
    assert (run["seed"], run["solvers"]["greedy"]) == (3, {"direction": "best"})
    assert {"python", "numpy", "grace-opt"} <= set(run["versions"])
    assert run["bundles"][str(small)]["model"] == "random"
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())["summary"]
    assert summary == summarise(records)
    assert (tmp_path / "r" / "report.html").stat().st_size > 1_000_000

    table = cli(*arguments, "-o", tmp_path / "r")
    assert [line.split()[1] for line in table.stdout.splitlines()[-6:]] == [*solvers, *solvers]
    assert len(json.loads((tmp_path / "r" / "run.json").read_text())["runs"]) == 2
    assert lines(tmp_path / "r") == stored


def test_the_table_has_a_row_a_solver(tmp_path: Path) -> None:
    solvers = ["--solver", "independent", "--solver", "greedy", "--solver", "exhaustive"]
    done = cli(HEADS, "--ratio", 0.6, *solvers, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows["independent"].split()[1] == rows["exhaustive"].split()[1] == "12"
    assert rows["exhaustive"].split()[-1] == "12"  # not supported
    assert rows["greedy"].split()[2:4] == ["0", "0"]  # the best known, since the oracle took no head
    assert "report written to" in done.stderr
    quiet = cli(HEADS, "--ratio", 0.6, *solvers, "-o", tmp_path, "-q", "-f", "json")
    assert quiet.stderr == ""
    refused = [r for r in json.loads(quiet.stdout)["records"] if r["solver"] == "exhaustive"]
    assert {(r["status"], r["raw_status"], r["objective"]) for r in refused} == {("no_solution", "not supported", None)}
    assert "at most 20" in refused[0]["warnings"][0]
    assert len(lines(tmp_path)) == 36  # not written again


def test_options_from_a_config_file(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[method]\nratio = 0.5\n[solver]\nsolver = ["greedy", "independent"]\ntime_limit = 9\n')
    done = cli(small, "-o", tmp_path / "r", "--config", config, "-f", "json")
    assert {(r["ratio"], r["solver"], r["limits"]["time_limit"]) for r in json.loads(done.stdout)["records"]} == {
        (0.5, "greedy", 9.0),
        (0.5, "independent", 9.0),
    }
    config.write_text('[method]\nratio = [0.3, 0.5]\n[solver]\nsolver = "greedy"\n')
    done = cli(small, "-o", tmp_path / "r", "--config", config, "-f", "json")
    assert len(json.loads(done.stdout)["records"]) == 16


def test_bad_input_is_one_sentence_and_nothing_is_run(small: Path, tmp_path: Path) -> None:
    good = (small, "--ratio", 0.5, "--solver", "greedy")
    cases: dict[str, tuple[Any, ...]] = {
        "did you mean 'greedy'": (*good, "--solver", "greddy"),
        "did you mean 'direction'": (*good, "--solver-option", "greedy.directon=best"),
        "takes NAME.OPTION=VALUE here, got 'direction=best'": (*good, "--solver-option", "direction=best"),
        "not in this run; known: greedy": (*good, "--solver-option", "spectral.rank=2"),
        "at least 0 and below 1, got 1.5": (*good, "--ratio", 1.5),
        "no such file": (*good, tmp_path / "absent"),
        "time_limit must be a finite number": (*good, "--time-limit", -1),
        "threads must be at least 1": (*good, "--threads", 0),
    }
    for message, arguments in cases.items():
        done = here(*arguments, "-o", tmp_path / "r")
        assert done.returncode == 2, message
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
        assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in here(*good, "-o", tmp_path / "file").stderr
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "run.json").write_text('{"command": []}')
    assert "not of a comparison" in here(*good, "-o", tmp_path / "m").stderr
    options = named_options("--solver-option", ["a", "b"], ["b.x=1=2", "b.y=.5"])
    assert options == {"a": {}, "b": {"x": "1=2", "y": ".5"}}


# ---------------------------------------------------------------- running again


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """(solver, problem, prune) of each head that is really solved."""
    solved: list[tuple[str, str, int]] = []
    original = grace_opt.compare.run.solve_many

    def counting(problems: Any, solver: Any, **more: Any) -> Any:
        solved.extend((solver.name, problem.name, problem.prune) for problem in problems)
        return original(problems, solver, **more)

    monkeypatch.setattr(grace_opt.compare.run, "solve_many", counting)
    return solved


def test_what_is_finished_is_not_run_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = count_runs(monkeypatch)
    before = compare([small], PLAIN, [0.5], tmp_path / "r")
    assert len(solved) == 16
    solved.clear()
    content = (tmp_path / "r" / "records.jsonl").read_bytes()
    again = compare([small], PLAIN, [0.5], tmp_path / "r")
    assert solved == []
    assert again.records == before.records
    assert (tmp_path / "r" / "records.jsonl").read_bytes() == content

    other = compare([small], {"greedy": {"direction": "backward"}}, [0.5], tmp_path / "r")
    assert {name for name, *_ in solved} == {"greedy"}
    assert {r["options"]["direction"] for r in other.records} == {"backward"}
    solved.clear()
    compare([small], PLAIN, [0.5], tmp_path / "r", limits=Limits(seed=1))
    assert len(solved) == 16
    solved.clear()
    compare([small], PLAIN, [0.5], tmp_path / "r", limits=Limits(time_limit=60))
    assert solved == []  # they ended by themselves in less
    wider = compare([small], {**PLAIN, "exhaustive": {}}, [0.5, 0.3], tmp_path / "r")
    assert len(solved) == 8 + 24
    assert len(wider.records) == 48
    # Only this invocation's records are printed, but all selections and proofs in the folder count.
    compared = compare([small], {"independent": {}}, [0.5], tmp_path / "r")
    assert {r["best_bound_solver"] for r in compared.records} == {"exhaustive"}
    assert len(compared.records) == 8
    assert max(r["over_best"] for r in compared.records) > 0


def test_equal_problems_are_solved_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(small.read_bytes())
    solved = count_runs(monkeypatch)
    both = compare([small, copy, small], PLAIN, [0.5, 0.51, 0.5], tmp_path / "r").records
    assert len(solved) == 16  # 0.51 prunes 5 of 10 as well
    assert len(both) == len(lines(tmp_path / "r")) == 64
    assert {(r["bundle"], r["ratio"]) for r in both} == {(str(p), x) for p in (small, copy) for x in (0.5, 0.51)}
    later = tmp_path / "later.safetensors"
    later.write_bytes(small.read_bytes())
    assert {r["bundle"] for r in compare([later], PLAIN, [0.5], tmp_path / "r").records} == {str(later)}
    assert len(solved) == 16
    assert len(lines(tmp_path / "r")) == 80


def test_failures_and_interrupted_runs_are_done_again(
    small: Path, tmp_path: Path, scripted: Callable[..., None]
) -> None:
    calls: list[str] = []

    def fails_at_first(problem: SubsetProblem) -> RawResult:
        calls.append(problem.name)
        if problem.name.startswith("layers.1.") and len(calls) <= 8:
            raise RuntimeError("out of luck")
        return first(problem)

    scripted(fails_at_first)
    failed = compare([small], {"scripted": {}, "greedy": {}}, [0.5], tmp_path / "r")
    assert sum(r["status"] == "error" for r in failed.records) == 2
    assert failed.summary[0]["errors"] == 2
    mended = compare([small], {"scripted": {}, "greedy": {}}, [0.5], tmp_path / "r")
    assert len(calls) == 10
    assert mended.summary[0]["errors"] == 0
    assert len(mended.records) == 16

    def interrupted(problem: SubsetProblem) -> RawResult:
        return replace(first(problem), limit=Limit.INTERRUPTED)

    scripted(interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare([small], {"scripted": {}, "greedy": {}}, [0.3], tmp_path / "r")
    scripted(first)
    assert {r["limit"] for r in compare([small], {"scripted": {}}, [0.3], tmp_path / "r").records} == {"none"}


def test_when_a_record_stands() -> None:
    def record(limit: str = "none", status: str = "optimal", seconds: float = 2.0, **before: Any) -> Record:
        limits = {"time_limit": None, "gap_rel": 1e-6, "gap_abs": 0.0, "node_limit": None, "iteration_limit": None}
        timing = {"build": 0, "solve": 0, "round": 0, "total": int(seconds * 1e9)}
        return {
            "status": status,
            "limit": limit,
            "timing_ns": timing,
            "nodes": 50,
            "iterations": 7,
            "limits": {**limits, **before},
        }

    assert stands(record(), Limits())
    assert stands(record(), Limits(time_limit=10, node_limit=50))
    assert not stands(record(), Limits(time_limit=1))  # it would not have come to its end
    assert not stands(record(), Limits(node_limit=49))
    assert not stands(record(), Limits(iteration_limit=6))
    assert stands(record(time_limit=10.0), Limits())
    hit = record("time", "feasible", time_limit=2.0)
    assert stands(hit, Limits(time_limit=2))
    for other in (None, 1, 60):
        assert not stands(hit, Limits(time_limit=other))
    assert stands(hit, Limits(time_limit=2, node_limit=50))
    assert not stands(hit, Limits(time_limit=2, node_limit=20))
    assert not stands(record("node", "feasible", node_limit=50), Limits(node_limit=500))
    assert not stands(record(), Limits(gap_rel=1e-3))
    assert not stands(record(status="error"), Limits())
    assert not stands(record("interrupted", "feasible"), Limits())


@pytest.mark.parametrize("cut", [1, 2, 40, 400, 10_000])
def test_a_torn_last_line_is_dropped(small: Path, tmp_path: Path, cut: int) -> None:
    before = compare([small], PLAIN, [0.5], tmp_path).records
    file = tmp_path / "records.jsonl"
    whole = file.read_bytes()
    last = len(whole) - whole[:-1].rindex(b"\n") - 1
    file.write_bytes(whole[: len(whole) - min(cut, last - 1)])
    remarks: list[str] = []
    after = compare([small], PLAIN, [0.5], tmp_path, remark=remarks.append).records
    assert ["cut off" in remark for remark in remarks] == [True]
    assert [r["pruned"] for r in after] == [r["pruned"] for r in before]
    assert len(lines(tmp_path)) == 16
    assert file.read_bytes().startswith(whole[: len(whole) - last])
    remarks.clear()
    compare([small], PLAIN, [0.5], tmp_path, remark=remarks.append)
    assert remarks == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "not JSON", "line 3, is not a record"),
        (lambda line: line[: len(line) // 2], "line 3, is not a record"),
        (lambda line: "{}", "line 3, is not a record (problem: "),
        (lambda line: "", "line 3, is not a record"),
        (lambda line: line.replace('"objective": ', '"objective": "x", "was": '), "(objective: "),
        (lambda line: line.replace('"objective": ', '"objective": NaN, "was": '), "line 3, is not a record"),
        (lambda line: line.replace('"status": "feasible"', '"status": "fine"'), "(status: "),
    ],
)
def test_another_damaged_line_is_an_error(
    small: Path, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    compare([small], PLAIN, [0.5], tmp_path)
    file = tmp_path / "records.jsonl"
    damaged = file.read_text().splitlines()
    damaged[2] = change(damaged[2])
    file.write_text("\n".join(damaged) + "\n")
    content = file.read_bytes()
    with pytest.raises(InputError, match="delete that line") as error:
        compare([small], PLAIN, [0.5], tmp_path)
    assert message in str(error.value)
    assert file.read_bytes() == content


def plugin(folder: Path, act: str) -> dict[str, str]:
    """An installed plug-in ``mine`` that does something before it solves; the environment that finds it."""
    (folder / "mine.py").write_text(
        "import os, time\n"
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from grace_opt.solution import Capabilities, RawResult\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    name = 'mine'\n"
        "    capabilities = Capabilities()\n"
        "    def supports(self, problem):\n"
        "        return True\n"
        "    def solve(self, problem, *rest):\n"
        f"        {act}\n"
        "        return RawResult(np.arange(problem.n) < problem.prune)\n"
    )
    info = folder / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[grace_opt.solvers]\nmine = mine:Mine\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "GRACE_OPT_PLUGINS": "mine"}


def test_a_solver_that_crashes_or_hangs_costs_its_heads_alone(small: Path, tmp_path: Path) -> None:
    environment = plugin(tmp_path, "os._exit(7) if problem.name.startswith('layers.1') else time.sleep(0)")
    flags = ["--ratio", 0.5, "--solver", "mine", "--solver", "greedy", "-f", "json"]
    died = cli(small, *flags, "-o", tmp_path / "r", **environment)
    assert died.returncode == 0, died.stderr
    records = json.loads(died.stdout)["records"]
    assert {r["problem"] for r in records if r["status"] == "error"} == {f"layers.1.kv_heads.{i}.key" for i in (0, 1)}
    assert {r["solver"] for r in records if r["status"] == "error"} == {"mine"}
    assert len(records) == 16
    (tmp_path / "hang").mkdir()
    environment = plugin(tmp_path / "hang", "time.sleep(600 if problem.name == 'layers.1.kv_heads.0.key' else 0)")
    hung = cli(small, *flags, "--time-limit", 0.2, "-o", tmp_path / "h", **environment)
    lost = [r for r in json.loads(hung.stdout)["records"] if r["pruned"] is None]
    assert [(r["problem"], r["status"], r["limit"]) for r in lost] == [
        ("layers.1.kv_heads.0.key", "no_solution", "time")
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again(small: Path, tmp_path: Path, how: signal.Signals) -> None:
    # Of its eight heads it solves two, and waits with the third for the file go.
    waits = "while problem.name >= 'layers.1' and not os.path.exists({go!r}): time.sleep(0.02)"
    environment = plugin(tmp_path, waits.format(go=str(tmp_path / "go")))
    arguments = [str(small), "--ratio", "0.5", "--solver", "greedy", "--solver", "mine", "-o", str(tmp_path / "r")]
    process = subprocess.Popen(
        [sys.executable, "-m", "grace_opt", "compare", *arguments, *UNIFORM_FLAGS, "-f", "json"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / "r" / "records.jsonl"
    until(lambda: file.exists() and file.read_bytes().count(b"\n") >= 8 + 2, "greedy's eight are there, and two more")
    second = cli(*arguments, **environment)
    assert second.returncode == 2
    assert "another process is writing" in second.stderr
    process.send_signal(how)
    said, complained = process.communicate(timeout=PATIENCE)
    assert said == ""
    kept = lines(tmp_path / "r")
    assert len(kept) == 10
    assert (tmp_path / "r" / "report.html").exists() == (how == signal.SIGINT)
    if how == signal.SIGINT:
        assert process.returncode == 130, complained
        assert "Traceback" not in complained
        summary = json.loads((tmp_path / "r" / "summary.json").read_text())["summary"]
        assert [row["heads"] for row in summary] == [8, len(kept) - 8]

    (tmp_path / "go").touch()
    done = cli(*arguments, "-f", "json", **environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["records"]) == len(lines(tmp_path / "r")) == 16
    assert lines(tmp_path / "r")[: len(kept)] == kept  # what was finished was not run again
    states = [run["state"] for run in json.loads((tmp_path / "r" / "run.json").read_text())["runs"]]
    assert states == ["interrupted" if how == signal.SIGINT else "running", "complete"]


def test_a_full_disk_is_one_sentence(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grace_opt", "compare", str(small), "--ratio", "0.5", "--solver", "greedy", "-q"]
    command += UNIFORM_FLAGS
    full = subprocess.run(
        ["sh", "-c", 'ulimit -f 8 && exec "$@"', "sh", *command, "-o", str(tmp_path / "r")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert full.returncode == 2
    assert full.stderr.startswith("error: cannot write")
    assert len(full.stderr.splitlines()) == 1
    assert 0 < len((tmp_path / "r" / "records.jsonl").read_bytes().split(b"\n")) - 1 < 8
    assert len(compare([small], {"greedy": {}}, [0.5], tmp_path / "r").records) == 8
    assert len(lines(tmp_path / "r")) == 8


# ---------------------------------------------------------------- budgets and methods


def test_a_comparison_takes_the_budgets_and_methods_of_solve(tmp_path: Path) -> None:
    budgets = [0.5, Budget(0.5, 0.25), Budget(bytes_per_token=12 * 128 + 12 * 64)]
    bundle = grace_opt.load_bundle(HEADS)
    found = compare_by_method(
        [HEADS], {"greedy": {}, "independent": {}}, budgets, tmp_path, method=METHODS["grace-opt"]
    )
    asked = [(0.5, None, None), (0.5, 0.25, None), (None, None, 2304.0)]
    assert [(row["ratio"], row["value_ratio"], row["budget_bytes"]) for row in found.summary[::2]] == asked
    for place, budget in zip(asked, [Budget(0.5, 0.5), *budgets[1:]], strict=True):
        mine = [r for r in found.records if (r["ratio"], r["value_ratio"], r["budget_bytes"]) == place]
        problems = problems_of(bundle, METHODS["grace-opt"], budget)
        assert [r["digest"] for r in mine[::2]] == [problem.digest() for problem in problems]
        assert len({r["prune"] for r in mine}) > 1  # a shared budget
    for record in found.records:
        check(FullRecord, {**record, "bundle": "0" * 64})
    (run,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert run["method"] == json.loads(json.dumps(METHODS["grace-opt"].options()))
    before = lines(tmp_path)
    again = compare_by_method([HEADS], {"greedy": {}, "independent": {}}, budgets, tmp_path)  # the same method
    assert (again.records, lines(tmp_path)) == (found.records, before)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("ratio 0.5", "ratios 0.5 and 0.25", "2304 bytes a token"):
        assert f'"budget":"{words}"' in report


def test_budgets_and_methods_on_the_command_line(tmp_path: Path) -> None:
    solver = ("--solver", "greedy", "-f", "json")
    done = cli(HEADS, "--ratio", 0.5, "--budget-bytes", 2304, "--method", "grace", *solver, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    assert [(r["ratio"], r["budget_bytes"]) for r in records[::12]] == [(0.5, None), (None, 2304.0)]
    assert {r["prune"] for r in records} == {32}
    for message, arguments in {
        "give --ratio or --budget-bytes": (),
        "--value-ratio goes with --ratio": ("--budget-bytes", 2304, "--value-ratio", 0.5),
        "floor has no effect in a uniform budget": ("--ratio", 0.5, "--floor", 3),
        "unknown method 'grase'": ("--ratio", 0.5, "--method", "grase"),
    }.items():
        refused = here(HEADS, *solver, *arguments, "-o", tmp_path / "no")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in refused.stderr
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- figures


def made(problem: str, solver: str, objective: float | None, **more: Any) -> Record:
    """A record by hand."""
    seconds = more.pop("seconds", 1.0)
    record: Record = {
        "bundle": "b",
        "ratio": 0.5,
        "problem": problem,
        "digest": problem,
        "solver": solver,
        "pruned": None if objective is None else [0],
        "objective": objective,
        "lower_bound": None,
        "gap": None,
        "bound_kind": "none",
        "status": "feasible",
        "limit": "none",
        "raw_status": "",
        "trace": [],
        "over_best": None,
        "reference_gap": None,
        "best_known": None,
        "timing_ns": {"build": 0, "solve": 0, "round": 0, "total": int(seconds * 1e9)},
    }
    return {**record, **more}


def proven(bound: float) -> Record:
    return {"lower_bound": bound, "bound_kind": "proven"}


def test_references_by_hand() -> None:
    known = [
        made("h", "a", 12.0, **proven(6.0)),
        made("h", "b", 10.0, **proven(8.0)),
        made("h", "c", 11.0, lower_bound=9.5, bound_kind="numerical"),  # not proven: does not count
        made("h", "d", None),
        made("zero", "a", 0.0, **proven(0.0)),
        made("zero", "b", 3.0),
        made("minus", "a", -5.0),
        made("minus", "b", -4.0),
        made("late", "a", 10.0),
        made("late", "b", 10.0, **proven(10.0 + 1e-9)),
        made("wrong", "a", 10.0),
        made("wrong", "b", 11.0, **proven(10.5)),
    ]
    found = {(r["problem"], r["solver"]): r for r in with_references(known, known, {})}
    assert {r["best_known"] for (head, _), r in found.items() if head == "h"} == {10.0}
    assert {(r["best_bound"], r["best_bound_solver"]) for (head, _), r in found.items() if head == "h"} == {(8.0, "b")}
    assert found["h", "a"]["over_best"] == pytest.approx(0.2)
    assert found["h", "a"]["reference_gap"] == pytest.approx(4 / 12)
    assert found["h", "b"]["over_best"] == 0.0
    assert (found["h", "d"]["over_best"], found["h", "d"]["reference_gap"]) == (None, None)
    assert (found["zero", "a"]["over_best"], found["zero", "a"]["reference_gap"]) == (0.0, 0.0)
    assert found["zero", "b"]["over_best"] is None  # infinitely far above 0
    assert found["zero", "b"]["reference_gap"] == 1.0
    assert found["minus", "b"]["over_best"] == pytest.approx(0.2)
    assert found["minus", "b"]["best_bound"] is None
    assert found["late", "a"]["best_bound"] == 10.0  # a bound above by rounding is lowered
    assert found["late", "a"]["reference_gap"] == 0.0
    assert found["wrong", "a"]["best_bound"] == 10.5  # a contradiction is not hidden
    assert with_references(known[:1], known, {})[0]["best_known"] == 10.0


def test_a_contradiction_is_said(small: Path, tmp_path: Path, scripted: Callable[..., None]) -> None:
    def lying(problem: SubsetProblem) -> RawResult:
        x = np.zeros(problem.n, bool)
        x[np.argsort(-np.diagonal(problem.weights))[: problem.prune]] = True
        return RawResult(x, lower_bound=problem.objective(x), bound_kind=BoundKind.PROVEN)

    scripted(lying)
    remarks: list[str] = []
    compare([small], {"scripted": {}, "greedy": {}}, [0.5], tmp_path, remark=remarks.append)
    assert len(remarks) == 1
    assert "of scripted lies above" in remarks[0]


def test_summary_by_hand() -> None:
    optimal = {"status": "optimal", "gap": 0.0, **proven(10.0)}
    records = [
        made("h0", "a", 10.0, over_best=0.0, reference_gap=0.0, seconds=0.09, **optimal),
        made("h1", "a", 12.0, over_best=0.2, reference_gap=0.5, seconds=0.39, gap=0.5, **proven(6.0)),
        made("h2", "a", None, status="error", seconds=100.0),
        made("h3", "a", None, status="no_solution", raw_status="not supported", seconds=0.0),
        made("h4", "a", None, status="no_solution", limit="time", seconds=1.59),
        made("h0", "b", 11.0, over_best=0.1, gap=0.3, lower_bound=7.7, bound_kind="numerical", seconds=0.0),
        made("h0", "a", 10.0, ratio=0.3, seconds=0.0),
    ]
    a, b, third = summarise(records)
    assert (a["solver"], a["heads"], a["errors"], a["no_selection"], a["not_supported"]) == ("a", 5, 1, 1, 1)
    assert (a["over_best_mean"], a["over_best_max"]) == (pytest.approx(0.1), 0.2)
    assert (a["gap_mean"], a["reference_gap_mean"], a["optimal_share"]) == (0.25, 0.25, 0.2)
    assert a["time"] == pytest.approx((0.1 * 0.4 * 1.6) ** (1 / 3) - 0.01)
    assert b["gap_mean"] is None  # not proven
    assert b["time"] == pytest.approx(0.0, abs=1e-12)
    assert (third["ratio"], third["heads"]) == (0.3, 1)
    assert shifted_geometric_mean([]) is None
    assert shifted_geometric_mean([4.0, 9.0], shift=0.0) == pytest.approx(6.0)


def test_performance_profile_by_hand() -> None:
    records = [
        *(made("h0", "a", 1.0, seconds=2.0), made("h0", "b", 1.0, seconds=1.0), made("h0", "c", None, seconds=0.1)),
        *(made("h1", "a", 1.0, seconds=1.0), made("h1", "b", 1.0, seconds=4.0), made("h1", "c", 1.0, seconds=0.0)),
        *(made("h2", "a", None), made("h2", "b", None), made("h2", "c", None)),  # unfinished by all: counts in heads
    ]
    ratios, heads = performance_profile(records, lambda record: record["objective"] is not None)
    assert heads == 3
    assert ratios == {"a": [2.0, 1e6], "b": [1.0, 4e6], "c": [1.0]}


def test_gap_over_time_by_hand() -> None:
    traced = made("h0", "a", 8.0, seconds=4.0, best_known=8.0, **proven(8.0))
    traced["trace"] = [[1.0, 10.0, None], [2.0, 10.0, 5.0], [3.0, 8.0, 6.0], [9.0, 7.0, 7.0]]
    assert steps(traced) == [(1, 10, -math.inf), (2, 10, 5), (3, 8, 6), (4, 8, 8)]  # none after its end
    times = [0.5, 1.0, 2.5, 3.0, 100.0]
    assert gap_over_time([traced], times, own_gap) == {"a": [math.inf, math.inf, 0.5, 0.25, 0.0]}
    assert gap_over_time([traced], times, over_best) == {"a": [math.inf, 0.25, 0.25, 0.0, 0.0]}
    blunt = made("h1", "a", 9.0, seconds=2.0, best_known=6.0)
    failed = made("h2", "a", None, seconds=2.0, best_known=6.0)
    assert gap_over_time([traced, blunt, failed], times, over_best)["a"] == [math.inf, math.inf, 0.5, 0.5, 0.5]
    assert gap_over_time([blunt], times, own_gap) == {"a": [math.inf] * 5}
