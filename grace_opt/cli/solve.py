"""grace-opt solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.config import own_options
from grace_opt.cli.options import (
    BundleArgument,
    EngineOptions,
    LimitOptions,
    OutputFolder,
    ProtectOption,
    SolverOption,
    Talk,
    option,
)
from grace_opt.cli.output import Format, cell, print_records, say
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain, write_run
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.graphs import GraphBundle
    from grace_opt.problem import SubsetProblem
    from grace_opt.solution import Solution


def solve(
    ctx: typer.Context,
    bundle: BundleArgument,
    output: OutputFolder,
    *,
    ratio: Annotated[
        float | None, option("--ratio", help="Fraction of the channels to prune, of each or of the average head.")
    ] = None,
    value_ratio: Annotated[
        float | None, option("--value-ratio", help="The same for values, if the bundle has their graphs; as --ratio.")
    ] = None,
    budget_bytes: Annotated[
        float | None,
        option(
            "--budget-bytes",
            help="In place of ratios: bytes that an old token's keys and values may take in all layers, at 16 bits.",
        ),
    ] = None,
    budget: Annotated[
        str, option("--budget", help="uniform: each head prunes the same; shared: the heads share a total.")
    ] = "uniform",
    floor: Annotated[int, option("--floor", help="Channels that each head keeps at least, in a shared budget.")] = 4,
    align: Annotated[
        int, option("--align", help="Each head keeps a multiple of so many channels; 8 or 16 suits GPUs.")
    ] = 1,
    readout: Annotated[
        str,
        option("--readout", help="Estimate dropped channels: prefill (fitted to each prompt), static, or none."),
    ] = "prefill",
    solver: SolverOption = "auto",
    solver_option: Annotated[
        list[str] | None, option("--solver-option", help="NAME=VALUE, an option of the solver; repeatable.")
    ] = None,
    protect: ProtectOption = True,
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
    from grace_opt.compression.mask import mask_from_solutions, save_mask
    from grace_opt.compression.readout import SCOPES
    from grace_opt.files import check_writable
    from grace_opt.graphs import load_bundle
    from grace_opt.registry import create
    from grace_opt.reports.tables import by_layer
    from grace_opt.solve import solve_many

    chosen = create(solver, own_options("--solver-option", solver_option or []))
    graphs = load_bundle(bundle)
    problems = _allotted(
        graphs, ratio, value_ratio, budget_bytes, {"budget": budget, "floor": floor, "align": align}, protect
    )
    if readout not in SCOPES:
        raise InputError(f"the read-out must be one of {', '.join(SCOPES)}, got {readout!r}")
    check_writable(output / "kv_mask.json")
    finished: list[Solution] = []

    def write_records(solutions: list[Solution]) -> list[dict[str, Any]]:
        records = [solution.record() for solution in solutions]
        write_run(output, records, sources, ending.seed, records[0]["versions"])
        return records

    with progress(talk.quiet) as show:
        show(f"{solver}, heads", 0, len(problems))

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
    records = write_records(solutions)
    mask = mask_from_solutions(graphs, solutions, recent_window=recent_window, sinks=sinks, readout=readout)
    save_mask(mask, output)
    if talk.format is Format.JSON:
        print_records(records, talk.format)
        return
    if talk.verbose:
        columns = ["problem", "n", "prune", "status", "objective", "lower_bound", "gap", "limit"]
        print_records(records, talk.format, columns)
    else:
        print_records(by_layer(records), talk.format)
    talk.say(f"mask written to {output}")


def _allotted(
    graphs: GraphBundle,
    ratio: float | None,
    value_ratio: float | None,
    budget_bytes: float | None,
    sharing: dict[str, Any],
    protect: bool,
) -> list[SubsetProblem]:
    """The problems of a bundle under the budget that was asked for."""
    from grace_opt.compression.budget import Budget, Sharing, problems_of

    if sharing["budget"] not in ("uniform", "shared"):
        raise InputError(f"the budget must be uniform or shared, got {sharing['budget']!r}")
    if (ratio is None) == (budget_bytes is None):
        raise InputError("give either --ratio or --budget-bytes")
    if ratio is None:
        if value_ratio is not None:
            raise InputError("--value-ratio goes with --ratio; --budget-bytes shares its bytes between keys and values")
        asked = Budget(bytes_per_token=budget_bytes)
    else:
        asked = Budget(ratio, ratio if value_ratio is None else value_ratio)
    return problems_of(graphs, asked, Sharing(**sharing), protect=protect)
