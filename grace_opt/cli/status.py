"""grace-opt status, and how a run of a service is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.options import (
    ConfigOption,
    FormatOption,
    QuietOption,
    ServiceOptions,
    TimeoutOption,
    WaitOption,
)
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
    timeout: TimeoutOption = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop the run.")] = False,
    service: ServiceOptions,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Show the runs of a service, or one of them with its solvers' summary."""
    with service.client(quiet, patience_of(wait, timeout)) as client:
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
            one = waited(client, one, quiet, timeout)
        print_run(client, one, format)
    require_complete(one, wait)


def patience_of(wait: bool, timeout: float | None) -> float | None:
    """How long a client bears with a service that is away: as long as the user does. Raises InputError."""
    if timeout is not None and not wait:
        raise InputError("--timeout says how long to --wait; give both")
    if not wait:
        return None
    return math.inf if timeout is None else timeout


def waited(client: Client, run: Run, quiet: bool, timeout: float | None) -> Run:
    """The run when it has ended, however that was. Raises InputError if it has not after ``timeout`` seconds."""
    try:
        with progress(quiet) as show:
            records = f"run {run.id}, records"
            return client.wait(run.id, lambda newest: show(records, newest.done, newest.total), timeout=timeout)
    except KeyboardInterrupt:
        say(f"run {run.id} goes on; grace-opt status {run.id} --wait follows it, --cancel stops it")
        raise


def require_complete(run: Run, wait: bool) -> None:
    """Raise InputError if a run that was waited for is not complete."""
    if wait and run.state != "complete":
        raise InputError(f"run {run.id} is {run.state}{': ' + run.error if run.error else ''}")


def print_run(client: Client, run: Run, format: Format) -> None:
    """Print a run: as JSON itself and all records that it has; as a table its summary, or how far it is."""
    from grace_opt.reports.tables import summary_columns, summary_row

    if format is Format.JSON:
        print_records(client.records(run.id), format, run=run.model_dump(mode="json"))
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
