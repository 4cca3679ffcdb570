"""Strength and speed of the solvers, against named rivals in the same run.

    python benchmarks/solvers.py [--bundle graphs.safetensors ...] [--rival-limit 30] [-f table|markdown|json]

Without --bundle: the graphs of SmolLM2-135M, calibrated here (n = 64), and the n = 128 heads of tests/data. Rivals
(benchmarks/rivals.py) that are not installed are left out, with a word. One thread each. All rows of a table come from
the same problems in the same process; times are wall-clock and of one head, root bound included.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rivals import GurobiSolver, PenaltySolver, SCIPSolver

from grace_opt import Calibration, SubsetProblem, calibrate, load_bundle, load_model, solve_many
from grace_opt.compare import shifted_geometric_mean
from grace_opt.graphs import GraphBundle, Protection, salient_channels
from grace_opt.models.texts import read_pieces
from grace_opt.solution import Limits, Solution, Solver, Status

HEADS = Path(__file__).parent.parent / "tests" / "data" / "heads-qwen2.5-coder-1.5b.safetensors"
RATIOS = (0.3, 0.5, 0.6, 0.8)
Row = dict[str, Any]


def seconds(solution: Solution) -> float:
    return solution.timing.total / 1e9


def proof_row(label: str, problems: Sequence[SubsetProblem], **limits: Any) -> tuple[Row, list[Solution]]:
    """How many heads branch and bound proves, and in what time."""
    solutions = solve_many(problems, "branch-and-bound", limits=Limits(**limits))
    times = [seconds(s) for s in solutions]
    row = {
        "problems": label,
        "heads": len(problems),
        "n": problems[0].n,
        "proven": sum(s.status is Status.OPTIMAL for s in solutions),
        "median ms": 1e3 * statistics.median(times),
        "mean ms": 1e3 * statistics.mean(times),
        "max ms": 1e3 * max(times),
        "max gap": max(s.gap for s in solutions),
        "median nodes": statistics.median(s.nodes for s in solutions),
    }
    return row, solutions


def protected(bundle: GraphBundle, ratio: float) -> list[SubsetProblem]:
    """The same heads with their salient channels protected, by key norm where the bundle has no choice of its own."""
    problems = bundle.problems(ratio)
    for index, (head, problem) in enumerate(zip(bundle.heads, problems, strict=True)):
        if problem.protected is None and head.key_gram is not None:
            salient = salient_channels(np.sqrt(np.diagonal(head.key_gram)), Protection())
            problems[index] = replace(problem, protected=salient, prune=min(problem.prune, int((~salient).sum())))
    return problems


def heuristic_rows(
    label: str, problems: Sequence[SubsetProblem], optima: Sequence[Solution], solvers: Sequence[str | Solver]
) -> list[Row]:
    """How far above the proven optimum each heuristic ends, and how far below it its own bound."""
    rows: list[Row] = []
    for solver in solvers:
        solutions = solve_many(problems, solver)
        over = [s.objective / best.objective - 1 for s, best in zip(solutions, optima, strict=True)]
        under = [1 - s.lower_bound / best.objective for s, best in zip(solutions, optima, strict=True)]
        rows.append(
            {
                "problems": label,
                "solver": solver if isinstance(solver, str) else f"dwave {solver.method}",
                "heads": len(problems),
                "mean over optimum %": 100 * statistics.mean(over),
                "max over optimum %": 100 * max(over),
                "optimal": sum(value < 1e-9 for value in over),
                "bound under optimum %": None if np.isinf(under).any() else 100 * statistics.mean(under),
                "mean ms": 1e3 * statistics.mean(seconds(s) for s in solutions),
            }
        )
    return rows


def rival_rows(
    label: str, problems: Sequence[SubsetProblem], solvers: Sequence[str | Solver], limit: float
) -> list[Row]:
    """Ours and exact rivals on the same heads with the same threads, gap and time limit."""
    limits = Limits(time_limit=limit)
    rows: list[Row] = []
    ours = 0.0
    for solver in ("branch-and-bound", *solvers):
        solutions = solve_many(problems, solver, limits=limits)
        times = [seconds(s) for s in solutions]
        mean = shifted_geometric_mean(times) or 0.0
        ours = ours or mean
        rows.append(
            {
                "problems": label,
                "solver": solver if isinstance(solver, str) else solver.name,
                "heads": len(problems),
                "closed": sum(s.gap <= limits.gap_rel for s in solutions),
                "median s": statistics.median(times),
                "max s": max(times),
                "shifted geometric mean s": mean,
                "times ours": mean / ours,
            }
        )
    return rows


def joined(bundle: GraphBundle, count: int, ratio: float) -> list[SubsetProblem]:
    """n = 256 from pairs of real n = 128 heads: their Gram matrices side by side, each channel of one mixed with one of
    the other by a rotation, queries and keys alike, and the two products multiplied entry by entry as in a real graph.
    """
    rng = np.random.default_rng(0)
    heads = [head for head in bundle.heads if head.key_gram is not None and head.query_gram is not None]
    problems = []
    for index in range(count):
        first, second = rng.choice(len(heads), 2, replace=False)
        angles, partners = rng.uniform(0, np.pi / 2, 128), 128 + rng.permutation(128)
        rotation = np.eye(256)
        rows = np.arange(128)
        rotation[rows, rows] = rotation[partners, partners] = 0.0
        rotation[rows, rows], rotation[partners, partners] = np.cos(angles), np.cos(angles)
        rotation[rows, partners], rotation[partners, rows] = np.sin(angles), -np.sin(angles)
        grams = []
        for kind in ("query_gram", "key_gram"):
            gram = np.zeros((256, 256))
            for block, head in enumerate((heads[first], heads[second])):
                own = getattr(head, kind)
                gram[128 * block : 128 * (block + 1), 128 * block : 128 * (block + 1)] = own / np.trace(own)
            grams.append(rotation @ gram @ rotation.T)
        problems.append(SubsetProblem(grams[0] * grams[1], int(ratio * 256), name=f"joined {index}"))
    return problems


def random_model_heads(ratio: float) -> list[SubsetProblem]:
    """n = 256 captured from a model of random weights with head_dim 256, over real text."""
    import transformers

    _, tokenizer = load_model("smollm2-135m")
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256}
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.05)).eval()
    return calibrate(model, tokenizer, read_pieces(None), Calibration(tokens=2048, objective="logit")).problems(ratio)


def model_row(label: str, bundle: GraphBundle, heads: int = 256) -> Row:
    """As many heads as an 8B model has, two at a time: those of the bundle at ratios from 0.4 to 0.75."""
    per_ratio = -(-heads // len(bundle.heads))
    ratios = np.linspace(0.4, 0.75, per_ratio)
    problems = [problem for each in ratios for problem in bundle.problems(float(each), protect=False)][:heads]
    began = time.perf_counter()
    solutions = solve_many(problems, "branch-and-bound", limits=Limits(time_limit=60), workers=2)
    wall = time.perf_counter() - began
    proven = sum(s.status is Status.OPTIMAL for s in solutions)
    return {"problems": label, "heads": len(problems), "n": problems[0].n, "proven": proven, "wall s": wall}


def installed(solvers: Sequence[Solver]) -> list[Solver]:
    """Those that solve a small problem here."""
    small = SubsetProblem(np.eye(4), 2)
    found = []
    for solver in solvers:
        solution = solve_many([small], solver)[0]
        if solution.status is Status.ERROR:
            print(f"{solver.name} is left out: {solution.raw_status}", file=sys.stderr)
        else:
            found.append(solver)
    return found


def spread(problems: Sequence[SubsetProblem], count: int) -> list[SubsetProblem]:
    """``count`` of them, evenly spaced."""
    picks = np.unique(np.linspace(0, len(problems) - 1, min(count, len(problems))).round().astype(int))
    return [problems[i] for i in picks]


def show(tables: dict[str, list[Row]], markdown: bool) -> None:
    for title, rows in tables.items():
        if rows and markdown:
            lines = [list(rows[0]), ["---"] * len(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
            print(f"\n## {title}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")
        elif rows:
            table = Table(*rows[0], title=title, box=None)
            for row in rows:
                table.add_row(*(shown(v) for v in row.values()))
            Console(width=160).print(table)


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(
    bundle: Annotated[list[Path] | None, typer.Option(help="Graph bundle; repeatable.")] = None,
    ratio: Annotated[float, typer.Option(help="Of the rivals' and the heuristics' tables.")] = 0.6,
    rival_limit: Annotated[float, typer.Option(help="Seconds a head, for rivals.")] = 30.0,
    rival_heads: Annotated[int, typer.Option(help="Heads for SCIP, which rarely ends in time.")] = 4,
    large: Annotated[int, typer.Option(help="How many joined n = 256 problems.")] = 4,
    format: Annotated[str, typer.Option("-f", "--format", help="table, markdown or json.")] = "table",
) -> None:
    """Measure and print."""
    solve_many([SubsetProblem(np.eye(8), 4)], "branch-and-bound")  # compile
    if bundle:
        bundles = {path.stem: load_bundle(path) for path in bundle}
    else:
        model, tokenizer = load_model("smollm2-135m")
        bundles = {
            "smollm2-135m": calibrate(model, tokenizer, read_pieces(None), Calibration(tokens=2048, objective="logit"))
        }
        bundles[HEADS.stem] = load_bundle(HEADS)
    others = ["independent", "greedy", "spectral", "sdp", *installed([PenaltySolver(), PenaltySolver("tabu", reads=1)])]
    fast, slow = installed([GurobiSolver()]), [*installed([SCIPSolver()]), "miqp"]

    tables: dict[str, list[Row]] = {"proofs": [], "exact rivals": [], "heuristics": [], "n = 256": [], "a model": []}
    for name, graphs in bundles.items():
        for each in sorted({*RATIOS, ratio}):
            label = f"{name}, ratio {each}"
            problems = graphs.problems(each, protect=False)
            row, optima = proof_row(label, problems, time_limit=60)
            tables["proofs"].append(row)
            tables["heuristics"] += heuristic_rows(label, problems, optima, ["local-search"])
            if each == ratio:
                tables["heuristics"] += heuristic_rows(label, problems, optima, others)
                tables["exact rivals"] += rival_rows(label, problems, fast, rival_limit)
                few = spread(problems, rival_heads)
                tables["exact rivals"] += rival_rows(f"{label}, some heads", few, slow, rival_limit)
        label = f"{name}, ratio {ratio}, protected"
        tables["proofs"].append(proof_row(label, protected(graphs, ratio), time_limit=60)[0])
        if problems[0].n == 128:
            tables["a model"].append(model_row(name, graphs))
            for each in (0.3, ratio) if large else ():
                label = f"joined {name}, ratio {each}"
                tables["n = 256"].append(proof_row(label, joined(graphs, large, each), time_limit=60)[0])
    if large:
        tables["n = 256"].append(
            proof_row(f"random weights, ratio {ratio}", random_model_heads(ratio), time_limit=60)[0]
        )

    if format == "json":
        print(json.dumps(tables))
    else:
        show(tables, markdown=format == "markdown")


if __name__ == "__main__":
    typer.run(main)
