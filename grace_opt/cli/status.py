"""grace-opt status, and how a run of a service is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.options import FormatOption, QuietOption, ServiceOptions, WaitOption
from grace_opt.cli.output import Format, print_records, say
from grace_opt.cli.progress import progress
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.service.client import Client
    from grace_opt.service.schemas import Run


def status(
    run: Annotated[int | None, typer.Argument(metavar="[RUN]", help="Id of a run; all if left out.")] = None,
    *,
    wait: WaitOption = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop the run.")] = False,
    service: ServiceOptions,
    format: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Show the runs of a service, or one of them with its solvers' summary."""
    with service.client() as client:
        if run is None:
            if wait or cancel:
                raise InputError("--wait and --cancel are for one run; give its id")
            found = client.runs()
            rows = [_row(each) for each in found.runs]
            print_records(rows, format, ["run", "state", "done", "solvers", "budgets", "created", "name"])
            if found.total > len(rows) and not quiet:
                say(f"the newest {len(rows)} of {found.total} runs")
            return
        one = client.cancel(run) if cancel else client.run(run)
        if wait:
            one = waited(client, one, quiet)
        print_run(client, one, format)


def waited(client: Client, run: Run, quiet: bool) -> Run:
    """The run when it has ended. Raises InputError if it is not complete then."""
    with progress(quiet) as show:
        ended = client.wait(run.id, lambda newest: show(f"run {run.id}, heads", newest.done, newest.total))
    if ended.state != "complete":
        raise InputError(f"run {run.id} is {ended.state}{': ' + ended.error if ended.error else ''}")
    return ended


def print_run(client: Client, run: Run, format: Format) -> None:
    """Print the records of a complete run, or its summary, or how far it is."""
    from grace_opt.reports.tables import summary_columns, summary_row

    if format is Format.JSON and run.state == "complete":
        print_records(client.records(run.id), format)
    elif run.summary:
        rows = [row.model_dump() for row in run.summary]
        print_records([summary_row(row) for row in rows], format, summary_columns(rows))
    else:
        print_records([_row(run)], format)


def _row(run: Run) -> dict[str, Any]:
    from grace_opt.records import budget_words

    return {
        "run": run.id,
        "state": str(run.state),
        "done": f"{run.done} of {run.total}",
        "solvers": ", ".join(each.solver for each in run.request.solvers),
        "budgets": ", ".join(map(budget_words, run.request.budgets)),
        "created": run.created,
        "name": run.request.name,
    }
