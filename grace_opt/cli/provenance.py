"""What must stand beside numbers for them to be made again: the command, its options, the seed, the versions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from grace_opt.cli.output import say

_WORDS = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config file"}


def explain(ctx: typer.Context, verbose: bool) -> dict[str, dict[str, Any]]:
    """The resolved options and where each came from; printed if ``verbose``."""
    resolved = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        # As the versions of Typer agree: a path as text, values of a repeated option as a list.
        shown = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        resolved[name] = {"value": shown, "source": _WORDS.get(source.name if source else "", "default")}
    if verbose:
        for name, entry in resolved.items():
            say(f"{name} = {entry['value']} ({entry['source']})")
    return resolved


def command_line() -> list[str]:
    """The command as it was given."""
    return ["grace-opt", *sys.argv[1:]]


def write_run(
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
    seed: int,
    versions: Mapping[str, str],
) -> None:
    """Write records.jsonl, and run.json with what the records came from."""
    from grace_opt.files import json_text, write_json, write_text

    lines = "".join(json_text(record) + "\n" for record in records)
    write_text(folder / "records.jsonl", lines)
    about = {"command": command_line(), "options": options, "seed": seed, "versions": versions}
    write_json(folder / "run.json", about)
