"""grace-opt solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.budgets import BudgetOption
from grace_opt.cli.config import own_options
from grace_opt.cli.options import (
    BundleArgument,
    EngineOptions,
    LimitOptions,
    MethodOptions,
    OutputFolder,
    SolverOption,
    SolverOptionsOption,
    Talk,
    Where,
    option,
)
from grace_opt.cli.output import Format, cell, print_records, say
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain, write_run
from grace_opt.errors import InputError
from grace_opt.heads import KINDS

MOST_WARNINGS = 5

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from grace_opt.compression.budget import Budget
    from grace_opt.compression.method import Method
    from grace_opt.graphs.bundle import GraphBundle
    from grace_opt.solution import Solution


def solve(
    ctx: typer.Context,
    bundle: BundleArgument,
    output: OutputFolder,
    *,
    much: BudgetOption,
    target: Annotated[
        str | None,
        option("--target", help="Solve for what this runs, from grace-opt targets; given options must agree with it."),
    ] = None,
    choice: MethodOptions,
    readout: Annotated[
        str | None,
        option("--readout", help="Estimate dropped channels: prefill (fitted to each prompt), static, or none."),
    ] = None,
    solver: SolverOption = None,
    solver_option: SolverOptionsOption = None,
    recent_window: Annotated[
        int | None, typer.Option("--recent-window", help="Of the mask; the graphs' own if left out.")
    ] = None,
    sinks: Annotated[int | None, typer.Option("--sinks", help="Of the mask; the graphs' own if left out.")] = None,
    ending: LimitOptions,
    where: EngineOptions,
    isolate: Annotated[
        bool, option("--isolate/--no-isolate", help="Solve in processes of their own, killed past the time limit.")
    ] = False,
    talk: Talk,
) -> None:
    """Choose the channels to prune in every head of a bundle, and write the mask."""
    sources = explain(ctx, talk.verbose)
    from grace_opt.compression.from_bundle import mask_from_solutions, problems_of
    from grace_opt.files import check_writable
    from grace_opt.graphs import load_bundle
    from grace_opt.registry import create
    from grace_opt.solution import ignored_limits
    from grace_opt.solve import solve_many

    _require_place(isolate, where)
    given = choice.given(offline_solver=solver, recent_window=recent_window, sinks=sinks)
    method, asked, wanted = _wanted(target, much, choice, given, readout, talk)
    if _is_joint(method, solver, readout):
        _write_joint(load_bundle(bundle), method, asked, wanted, output, talk)
        return
    name = method.selection.offline_solver
    chosen = create(name, own_options("--solver-option", solver_option or [], name))
    graphs = load_bundle(bundle)
    if much.value_ratio and all(head.kind == "key" for head in graphs.heads):
        raise InputError(f"{bundle} has no graphs of values for --value-ratio; calibrate with --value-objective")
    check_writable(output / "kv_mask.json")
    talk.warn(ignored_limits(chosen, ending.limits()))  # before the work, which may be long for lack of a limit
    finished: list[Solution] = []

    def write_records(solutions: list[Solution]) -> list[dict[str, Any]]:
        records = [solution.record() for solution in solutions]
        write_run(output, records, sources, ending.seed, records[0]["versions"])
        return records

    with progress(talk.quiet) as show:
        show("budgets of the heads")
        problems = problems_of(graphs, method, asked, **wanted)
        show(f"{name}, heads", 0, len(problems))

        def note(solution: Solution) -> None:
            finished.append(solution)
            last = f"{solution.problem}: objective {cell(solution.objective)}, gap {cell(solution.gap)}"
            show(last, len(finished), len(problems))

        try:
            with where.opened() as engine:
                solutions = solve_many(
                    problems,
                    chosen,
                    limits=ending.limits(),
                    workers=where.workers,
                    isolate=isolate,
                    engine=engine,
                    progress=note,
                )
        except KeyboardInterrupt:
            if finished:
                write_records(finished)
                heads = f"{len(finished)} of {len(problems)} heads"
                say(f"{heads} were finished; their records are in {output}, no mask is")
            raise
    from grace_opt.compression.mask_file import save_mask  # late: it loads torch

    mask = mask_from_solutions(graphs, solutions, method, **wanted)
    records = write_records(solutions)  # not before there is a mask: what the folder holds belongs together
    save_mask(mask, output)
    _print(records, talk)
    _say_warnings(solutions, ignored_limits(chosen, ending.limits()), talk)
    if talk.format is Format.TABLE:
        talk.say(f"mask written to {output}")


def _is_joint(method: Method, solver: str | None, readout: str | None) -> bool:
    """Whether the method's ranks are in closed form. Raises InputError for what that has no use for."""
    from grace_opt.compression.plugins import CODECS

    joint = method.codec != "channels" and CODECS[method.codec].spectral
    if joint and (solver is not None or readout is not None):
        raise InputError(
            "joint ranks are in closed form, with nothing to solve or to estimate; leave out --solver and --readout"
        )
    return joint


def _write_joint(
    graphs: GraphBundle, method: Method, asked: Budget, wanted: dict[str, Any], output: Path, talk: Talk
) -> None:
    """The mask of a method whose ranks are joint, and a row for each layer."""
    from grace_opt.compression.from_joint import joint_mask
    from grace_opt.compression.mask_file import save_mask
    from grace_opt.files import check_writable

    check_writable(output / "kv_mask.json")
    windows = {name: value for name, value in wanted.items() if name != "readout_scope"}
    with progress(talk.quiet) as show:
        show("joint ranks")
        mask = joint_mask(graphs, method, asked, **windows)
    save_mask(mask, output)
    ranks = {kind: mask.plan.widths(kind) for kind in KINDS}
    rows = [
        {"layer": i, **{f"{kind} rank": sum(ranks[kind].get(i, [])) or None for kind in KINDS}}
        for i in mask.plan.layers
    ]
    print_records(rows, talk.format)
    if talk.format is Format.TABLE:
        talk.say(f"{mask.solver['lost']:.3g} of the squared sizes is lost; mask written to {output}")


def _say_warnings(solutions: Sequence[Solution], said: Sequence[str], talk: Talk) -> None:
    """What solvers warned of, each once, but for what was said before."""
    heads: dict[str, list[str]] = {}
    for solution in solutions:
        for warning in solution.warnings:
            heads.setdefault(warning, []).append(solution.problem)
    left = [(warning, names) for warning, names in heads.items() if warning not in said]
    for warning, (first, *others) in left[:MOST_WARNINGS]:
        more = f" and {len(others)} more" if others else ""
        talk.say(f"warning: {first}{more}: {warning}")
    if len(left) > MOST_WARNINGS:
        talk.say(f"{len(left) - MOST_WARNINGS} more warnings are in the records")


def _print(records: list[dict[str, Any]], talk: Talk) -> None:
    """As JSON, a row for each head, or a row for each layer."""
    from grace_opt.reports.tables import by_layer

    if talk.format is Format.JSON or talk.verbose:
        columns = ["problem", "n", "prune", "status", "objective", "lower_bound", "gap", "limit"]
        print_records(records, talk.format, columns)
    else:
        print_records(by_layer(records), talk.format)


def _wanted(
    target: str | None,
    much: BudgetOption,
    choice: MethodOptions,
    given: dict[str, Any],
    readout: str | None,
    talk: Talk,
) -> tuple[Method, Budget, dict[str, Any]]:
    """The method, the budget, and what else the mask is made by; all as the target runs it where nothing was said."""
    from grace_opt.export.abilities import Abilities, Needs
    from grace_opt.export.target import TARGETS, require_able

    can = Abilities() if target is None else TARGETS[target].can
    asked = much.budget(can.kinds)
    taken = {name: value for name, value in can.method_options().items() if name not in given}
    method = choice.made(given | taken, [asked])
    _require_readout(readout, method, choice.method)
    scope = readout or (can.readouts[0] if method.readout.readout_fit != "none" else "none")
    names = [name for name in ("recent_window", "sinks") if name in given or name in taken]
    whole: dict[str, Any] = {name: getattr(method.windows, name) for name in names}
    if target is not None:
        kinds = [kind for kind in KINDS if asked.prunes(kind) or method.bits(kind)]
        require_able(target, Needs.of_method(method, kinds, scope, whole_tokens=any(whole.values())))
        said = {**({} if readout else {"readout": scope}), **taken}
        talk.say(f"for {target}: {', '.join(f'{name}={value}' for name, value in said.items())}")
    return method, asked, {"readout_scope": scope, **whole}


def _require_place(isolate: bool, where: EngineOptions) -> None:
    if isolate and where.engine is Where.DASK:
        raise InputError("--isolate is for this machine; Dask workers always solve in processes of their own")


def _require_readout(scope: str | None, method: Method, name: str) -> None:
    """Refuse a scope of the read-out that there is not, or that this method has no use for."""
    from grace_opt.compression.readout import READOUT_SCOPES

    if scope not in (None, *READOUT_SCOPES):
        raise InputError(f"the read-out must be one of {', '.join(READOUT_SCOPES)}, got {scope!r}")
    if scope not in (None, "none") and method.readout.readout_fit == "none":
        raise InputError(
            f"the method {name!r} has no read-out; leave --readout out, or say which with "
            "--method-option readout_fit=attention"
        )
