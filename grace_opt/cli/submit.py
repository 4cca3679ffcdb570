"""grace-opt submit."""

from __future__ import annotations

from typing import Annotated

import typer

from grace_opt.cli.budgets import BudgetOptions
from grace_opt.cli.config import named_options
from grace_opt.cli.options import (
    BundleArgument,
    LimitOptions,
    MethodOptions,
    ServiceOptions,
    SolversOption,
    SolversOptions,
    Talk,
    TimeoutOption,
    WaitOption,
    option,
)
from grace_opt.cli.provenance import explain
from grace_opt.cli.status import patience_of, print_run, require_complete, waited


def submit(
    ctx: typer.Context,
    bundle: BundleArgument,
    solver: SolversOption,
    *,
    asked: BudgetOptions,
    choice: MethodOptions,
    solver_option: SolversOptions = None,
    name: Annotated[str, typer.Option("--name", help="Of the run, for people.")] = "",
    readout: Annotated[str, option("--readout", help="Of the masks: prefill, static or none.")] = "prefill",
    ending: LimitOptions,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key again gives the same run.")
    ] = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    service: ServiceOptions,
    talk: Talk,
) -> None:
    """Give a bundle to a service and have every solver run on every head at every budget."""
    explain(ctx, talk.verbose)
    options = named_options("--solver-option", solver, solver_option or [])
    given = choice.given()
    choice.made(given, [each for each in asked.budgets() if not isinstance(each, float)])  # before anything is sent
    with service.client(talk.quiet, patience_of(wait, timeout)) as client:
        talk.say(f"uploading {bundle} unless the service has it")
        run = client.submit(
            client.upload(bundle).digest,
            options,
            asked.ratio or (),
            value_ratio=asked.value_ratio,
            budget_bytes=asked.budget_bytes or (),
            method=choice.method,
            method_options=given,
            limits=vars(ending),
            config={"readout": readout},
            name=name,
            idempotency_key=idempotency_key,
        )
        talk.say(f"run {run.id}: {run.total} heads to solve; {service.url.rstrip('/')}/runs/{run.id}")
        if wait:
            run = waited(client, run, talk.quiet, timeout)
        print_run(client, run, talk.format)
    require_complete(run, wait)
