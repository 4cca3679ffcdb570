"""grace-opt serve."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from grace_opt.cli.options import ConfigOption, QuietOption, SchedulerOption, StoreOptions, VerboseOption, option
from grace_opt.cli.output import log_to_stderr, say
from grace_opt.cli.provenance import explain
from grace_opt.errors import InputError


def serve(
    ctx: typer.Context,
    *,
    storing: StoreOptions,
    host: Annotated[str, option("--host", help="Address to listen at; API keys are needed elsewhere than here.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, option("--port", help="Port to listen at.")] = 8080,
    require_keys: Annotated[
        bool,
        option("--require-keys/--no-require-keys", help="Ask for API keys here too, e.g. behind a reverse proxy."),
    ] = False,
    public_url: Annotated[
        str | None,
        option("--public-url", help="Address that users type, if a reverse proxy has it: https://HOST/PATH."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        option("--allowed-host", help="Another name by which requests may address the server; repeatable."),
    ] = None,
    root_path: Annotated[
        str | None, option("--root-path", help="Path below which a reverse proxy has it, if --public-url does not say.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        option("--trusted-proxy", help="Address or network whose X-Forwarded-For and -Proto count; repeatable."),
    ] = None,
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
    log_to_stderr()
    from grace_opt.engines.dask import Cluster
    from grace_opt.service.db.storage import opened
    from grace_opt.service.http.app import serve as run
    from grace_opt.service.http.site import networks, site_of
    from grace_opt.service.http.state import Service

    for name, value in (("upload", upload_limit), ("queue", queue_limit), ("requests", requests_per_second)):
        if not 0 < value < 1e15:
            raise InputError(f"the {name} limit must be positive, got {value}")
    proxies = networks(trusted_proxy or ())
    site, why_keys = site_of(host, public_url, tuple(allowed_host or ()), root_path, require_keys=require_keys)
    with opened(storing.data, storing.storage) as storage:
        if why_keys and not any(key["scope"] == "admin" for key in storage.keys.all()):
            raise InputError(
                f"{why_keys}, so API keys are needed and there is none for an admin; "
                "make one with grace-opt keys add NAME --scope admin"
            )
        service = Service(
            storage,
            Cluster(scheduler, workers or os.cpu_count() or 1),
            keys_required=why_keys is not None,
            upload_limit=upload_limit,
            queue_limit=queue_limit,
            requests_per_second=requests_per_second,
        )

        def ready(port: int) -> None:
            if not quiet:
                shown = f"[{host}]" if ":" in host else host
                seen = f", which users see as {site.url}" if site.url else ""
                say(f"grace-opt serves http://{shown}:{port}{seen}, data in {storage.folder}; Ctrl-C stops it")

        run(service, host, port, site, proxies, ready=ready)
