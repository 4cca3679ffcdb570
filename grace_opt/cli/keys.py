"""grace-opt keys add | list | remove."""

from __future__ import annotations

from typing import Annotated

import typer

from grace_opt.cli.options import ConfigOption, FormatOption, StoreOptions
from grace_opt.cli.output import Format, print_records
from grace_opt.errors import InputError


def add(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    *,
    scope: Annotated[str, typer.Option("--scope", help="read, submit (and read) or admin (everything).")] = "submit",
    storing: StoreOptions,
    config: ConfigOption = None,
) -> None:
    """Make an API key and print it; it is not kept and cannot be shown again."""
    from grace_opt.service.db.storage import opened
    from grace_opt.service.http.access import SCOPES, new_key

    if scope not in SCOPES:
        raise InputError(f"the scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if not 0 < len(name) <= 100:
        raise InputError("the name of a key must have 1 to 100 characters")
    key = new_key()
    with opened(storing.data, storing.storage, alone=False) as storage:
        storage.keys.add(name, key, scope)
    print(key)


def show(storing: StoreOptions, config: ConfigOption = None, format: FormatOption = Format.TABLE) -> None:
    """List the API keys, without the keys themselves."""
    from grace_opt.service.db.storage import opened

    columns = ["name", "scope", "created"]
    with opened(storing.data, storing.storage, alone=False) as storage:
        rows = [{name: row[name] for name in columns} for row in storage.keys.all()]
    print_records(rows, format, columns)


def remove(
    name: Annotated[str, typer.Argument(help="Whose it was.")], storing: StoreOptions, config: ConfigOption = None
) -> None:
    """Remove an API key; a running service refuses it from then on."""
    from grace_opt.service.db.storage import opened

    with opened(storing.data, storing.storage, alone=False) as storage:
        storage.keys.remove(name)
