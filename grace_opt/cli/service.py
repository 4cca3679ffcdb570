"""The service's commands: serve, worker, keys, submit, status, fetch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.config import named_options
from grace_opt.cli.main import (
    ConfigOption,
    Format,
    FormatOption,
    OutputFolder,
    QuietOption,
    RatiosOption,
    SchedulerOption,
    SolversOption,
    VerboseOption,
    app,
    explain,
    option,
    print_records,
    progress_bar,
    say,
    summary_columns,
    summary_row,
)
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.service.client import Client
    from grace_opt.service.schemas import Run

DataOption = Annotated[Path, option("--data", help="Data folder: database, bundles, masks.")]
StorageOption = Annotated[
    str | None, option("--storage", help="sqlite:///PATH or postgresql://...; SQLite in the data folder if left out.")
]
UrlOption = Annotated[str, option("--url", help="Address of the service.")]
KeyOption = Annotated[str | None, option("--key", help="API key; better given as GRACE_OPT_KEY.")]
DEFAULT_DATA = Path("grace-opt-data")
DEFAULT_URL = "http://127.0.0.1:8080"

keys = typer.Typer(help="Make, list and remove the API keys of a service.", rich_markup_mode=None)
app.add_typer(keys, name="keys")


@app.command()
def serve(
    ctx: typer.Context,
    data: DataOption = DEFAULT_DATA,
    storage: StorageOption = None,
    host: Annotated[str, option("--host", help="Address to listen at; API keys are needed elsewhere than here.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, option("--port", help="Port to listen at.")] = 8080,
    require_keys: Annotated[
        bool,
        option("--require-keys/--no-require-keys", help="Ask for API keys here too, e.g. behind a reverse proxy."),
    ] = False,
    workers: Annotated[int | None, option("--workers", help="Worker processes; one a core if left out.")] = None,
    scheduler: SchedulerOption = None,
    upload_limit: Annotated[int, option("--upload-limit", help="Bytes of a bundle at most.")] = 1 << 30,
    queue_limit: Annotated[int, option("--queue-limit", help="Unfinished runs at most.")] = 100,
    requests_per_second: Annotated[
        float, option("--requests-per-second", help="Requests a second of each API key.")
    ] = 100.0,
    config: ConfigOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the solver service: API, pages, and workers of its own or of a Dask cluster."""
    explain(ctx, verbose)
    from grace_opt.engines.dask import Cluster
    from grace_opt.service.db.store import opened
    from grace_opt.service.http.access import is_loopback
    from grace_opt.service.http.app import serve as run
    from grace_opt.service.http.state import Service

    for name, value in (("upload", upload_limit), ("queue", queue_limit), ("requests", requests_per_second)):
        if not 0 < value < 1e15:
            raise InputError(f"the {name} limit must be positive, got {value}")
    needed = require_keys or not is_loopback(host)
    with opened(data, storage) as store:
        if needed and not any(key["scope"] == "admin" for key in store.api_keys()):
            raise InputError(
                f"{host} is reached from other machines, so API keys are needed and there is none for an admin; "
                "make one with grace-opt keys add NAME --scope admin"
            )
        service = Service(
            store,
            Cluster(scheduler, workers or os.cpu_count() or 1),
            keys_required=needed,
            upload_limit=upload_limit,
            queue_limit=queue_limit,
            requests_per_second=requests_per_second,
        )
        if not quiet:
            shown = f"[{host}]" if ":" in host else host
            say(f"grace-opt serves http://{shown}:{port}, data in {store.folder}; Ctrl-C stops it")
        run(service, host, port)


@app.command()
def worker(
    scheduler: Annotated[str, typer.Argument(metavar="SCHEDULER", help="Address of a Dask scheduler.")],
    workers: Annotated[int, option("--workers", help="Worker processes to start.")] = 1,
) -> None:
    """Run workers for a Dask scheduler (dask scheduler starts one) until interrupted."""
    # One thread each: a solver has a process of its own beside its worker, and threads of its own if it wants them.
    more = ["--nworkers", str(workers), "--nthreads", "1", "--no-dashboard"]
    os.execv(sys.executable, [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, *more])


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    scope: Annotated[str, typer.Option("--scope", help="read, submit (and read) or admin (everything).")] = "submit",
    data: DataOption = DEFAULT_DATA,
    storage: StorageOption = None,
) -> None:
    """Make an API key and print it; it is not kept and cannot be shown again."""
    from grace_opt.service.db.store import opened
    from grace_opt.service.http.access import SCOPES, new_key

    if scope not in SCOPES:
        raise InputError(f"the scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if not 0 < len(name) <= 100:
        raise InputError("the name of a key must have 1 to 100 characters")
    key = new_key()
    with opened(data, storage, alone=False) as store:
        store.add_key(name, key, scope)
    print(key)


@keys.command("list")
def list_keys(
    data: DataOption = DEFAULT_DATA, storage: StorageOption = None, format: FormatOption = Format.TABLE
) -> None:
    """List the API keys, without the keys themselves."""
    from grace_opt.service.db.store import opened

    with opened(data, storage, alone=False) as store:
        rows = [{name: row[name] for name in ("name", "scope", "created")} for row in store.api_keys()]
    print_records(rows, format, ["name", "scope", "created"])


@keys.command("remove")
def remove_key(
    name: Annotated[str, typer.Argument(help="Whose it was.")],
    data: DataOption = DEFAULT_DATA,
    storage: StorageOption = None,
) -> None:
    """Remove an API key; a running service refuses it from then on."""
    from grace_opt.service.db.store import opened

    with opened(data, storage, alone=False) as store:
        store.remove_key(name)


@app.command()
def submit(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Graph bundle, from grace-opt calibrate.")],
    ratio: RatiosOption,
    solver: SolversOption,
    solver_option: Annotated[
        list[str] | None, option("--solver-option", help="NAME.OPTION=VALUE, an option of solver NAME; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the run, for people.")] = "",
    protect: Annotated[
        bool, option("--protect/--no-protect", help="Keep the bundle's protected channels, or ignore them.")
    ] = True,
    readout: Annotated[str, option("--readout", help="Of the masks: prefill, static or none.")] = "prefill",
    time_limit: Annotated[float | None, option("--time-limit", help="Seconds for each head.")] = None,
    gap_rel: Annotated[float, option("--gap-rel", help="Relative gap at which a head counts as optimal.")] = 1e-6,
    gap_abs: Annotated[float, option("--gap-abs", help="Absolute gap at which a head counts as optimal.")] = 0.0,
    node_limit: Annotated[int | None, option("--node-limit", help="Nodes for each head.")] = None,
    iteration_limit: Annotated[int | None, option("--iteration-limit", help="Iterations for each head.")] = None,
    seed: Annotated[int, option("--seed", help="Seed of all randomness.")] = 0,
    threads: Annotated[int, option("--threads", help="Threads of one solve.")] = 1,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key again gives the same run.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end of the run.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give a bundle to a service and have every solver run on every head at every ratio."""
    explain(ctx, verbose)
    options = named_options("--solver-option", solver, solver_option or [])
    with _client(url, key) as client:
        if not quiet:
            say(f"uploading {bundle} unless the service has it")
        digest = client.upload(bundle).digest
        run = client.submit(
            digest,
            options,
            ratio,
            limits={
                "time_limit": time_limit,
                "gap_rel": gap_rel,
                "gap_abs": gap_abs,
                "node_limit": node_limit,
                "iteration_limit": iteration_limit,
                "seed": seed,
                "threads": threads,
            },
            config={"protect": protect, "readout": readout},
            name=name,
            idempotency_key=idempotency_key,
        )
        if not quiet:
            say(f"run {run.id}: {run.total} heads to solve; {url.rstrip('/')}/runs/{run.id}")
        if wait:
            run = _waited(client, run, quiet)
        _print_run(client, run, format)


@app.command()
def status(
    run: Annotated[int | None, typer.Argument(metavar="[RUN]", help="Id of a run; all if left out.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end of the run.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop the run.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    format: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Show the runs of a service, or one of them with its solvers' summary."""
    with _client(url, key) as client:
        if run is None:
            if wait or cancel:
                raise InputError("--wait and --cancel are for one run; give its id")
            found = client.runs()
            rows = [_run_row(each) for each in found.runs]
            print_records(rows, format, ["run", "state", "done", "solvers", "ratios", "created", "name"])
            if found.total > len(rows) and not quiet:
                say(f"the newest {len(rows)} of {found.total} runs")
            return
        one = client.cancel(run) if cancel else client.run(run)
        if wait:
            one = _waited(client, one, quiet)
        _print_run(client, one, format)


@app.command()
def fetch(
    run: Annotated[int, typer.Argument(metavar="RUN", help="Id of a complete run.")],
    output: OutputFolder,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Whose mask; the one of the smallest objective if left out.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Which mask, where the run has several ratios.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a mask of a run to a folder, for grace-opt generate and export."""
    with _client(url, key) as client:
        masks = client.masks(run)
        ratios = sorted({mask.ratio for mask in masks})
        if ratio is None and len(ratios) > 1:
            raise InputError(f"run {run} has masks of ratios {', '.join(map(str, ratios))}; choose one with --ratio")
        fitting = [mask for mask in masks if ratio in (None, mask.ratio) and solver in (None, mask.solver)]
        if not fitting:
            have = ", ".join(f"{mask.solver} at {mask.ratio}" for mask in masks) or "none"
            raise InputError(f"run {run} ({client.run(run).state}) has no such mask; its masks: {have}")
        best = min(fitting, key=lambda mask: mask.objective_sum)
        client.fetch(best, output)
        if not quiet:
            say(f"mask of {best.solver} at ratio {best.ratio:g} written to {output}")


def _client(url: str, key: str | None) -> Client:
    from grace_opt.service.client import Client

    return Client(url, key)


def _waited(client: Client, run: Run, quiet: bool) -> Run:
    with progress_bar(quiet) as progress:
        task = progress.add_task(f"run {run.id}, heads", total=run.total)
        ended = client.wait(run.id, lambda newest: progress.update(task, completed=newest.done))
    if ended.state != "complete":
        raise InputError(f"run {run.id} is {ended.state}{': ' + ended.error if ended.error else ''}")
    return ended


def _print_run(client: Client, run: Run, format: Format) -> None:
    if format is Format.JSON and run.state == "complete":
        print_records(client.records(run.id), format)
    elif run.summary:
        rows = [row.model_dump() for row in run.summary]
        print_records([summary_row(row) for row in rows], format, summary_columns(rows))
    else:
        print_records([_run_row(run)], format)


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "run": run.id,
        "state": str(run.state),
        "done": f"{run.done} of {run.total}",
        "solvers": ", ".join(each.solver for each in run.request.solvers),
        "ratios": ", ".join(f"{ratio:g}" for ratio in run.request.ratios),
        "created": run.created,
        "name": run.request.name,
    }
