"""Where options come from: defaults < config file (TOML) < GRACE_OPT_* environment < flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import typer

from grace_opt.errors import InputError, did_you_mean
from grace_opt.reading import opened

CONFIG_LIMIT = 1 << 20  #: bytes of a config file

# The tables of a config file and the options that each holds, by the names of the command line (with _ for -).
# tests/cli/test_config.py checks that they are the commands' options, all of those that the environment can set.
TABLES: dict[str, tuple[str, ...]] = {
    "model": ("model", "dtype", "device"),
    "calibration": (
        "text",
        "tokens",
        "window",
        "observation_window",
        "recent_window",
        "sinks",
        "objective",
        "value_objective",
        "rope_pairs",
        "lowrank",
        "protection_multiple",
        "protection_at_least",
        "protection_at_most",
    ),
    "method": (
        *("ratio", "value_ratio", "budget_bytes", "budget_share", "budget_tokens", "budget", "floor", "align"),
        *("target", "readout", "protect"),
        *("method", "method_option", "key_bits", "value_bits"),
    ),
    "evaluation": (
        "text",
        "dataset",
        "task",
        "length",
        "prompts",
        "scored",
        "chat",
        "prune_generated",
        "kl_limit",
        "seed",
    ),
    "solver": (
        "solver",
        "solver_option",
        "time_limit",
        "gap_rel",
        "gap_abs",
        "node_limit",
        "iteration_limit",
        "seed",
        "threads",
    ),
    "engine": ("engine", "scheduler", "workers", "isolate"),
    "service": (
        *("data", "storage", "host", "port", "require_keys", "upload_limit", "queue_limit", "requests_per_second"),
        *("public_url", "allowed_host", "root_path", "trusted_proxy", "url", "key"),
    ),
    "generation": ("generated", "prompt", "max_new_tokens", "num_beams"),
}


#: type of an option -> types of TOML that it is read from, and what to call them; all others are texts
_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a text in quotes"),
}

# Tables that few commands read: a mask's window is not set by the table that is about calibration.
ONLY = {"calibration": ("calibrate", "demo"), "generation": ("generate", "demo"), "evaluation": ("evaluate", "export")}
#: Commands that read one table: --solver and --ratio of fetch say which mask, not how to solve.
SERVICE_ONLY = ("status", "fetch")


def tables_of(command: str) -> dict[str, tuple[str, ...]]:
    """The tables that a command reads, with their options."""
    tables = ("service",) if command in SERVICE_ONLY else TABLES
    return {table: TABLES[table] for table in tables if command in ONLY.get(table, (command,))}


def read_config(path: str | Path, command: str) -> dict[str, Any]:
    """Option name -> value from a TOML file, of the tables that ``command`` reads.

    Raises InputError for a bad file or an unknown table or key.
    """
    with opened(path, "config file", stream=True) as file:
        data = file.read(CONFIG_LIMIT + 1)
    if len(data) > CONFIG_LIMIT:
        raise InputError(f"the config file {path} has more than {CONFIG_LIMIT} bytes; it holds options only")
    try:
        tables = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the config file {path} is not TOML ({error})") from None
    options: dict[str, Any] = {}
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            raise InputError(f"the config file {path} has no table [{table}] to read{did_you_mean(table, TABLES)}")
        for key, value in values.items():
            if key not in TABLES[table]:
                raise InputError(f"the config file {path} sets {table}.{key}{did_you_mean(key, TABLES[table])}")
            if not all(isinstance(each, str | int | float) for each in (value if isinstance(value, list) else [value])):
                raise InputError(f"the config file {path} sets {table}.{key} to what no option takes; give a value")
            if table in tables_of(command):
                options[key] = value
    return options


def config_callback(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make a config file's values the defaults of the command at hand."""
    if path is not None:
        options = read_config(path, ctx.info_name or "")
        hints = getattr(ctx.command.callback, "__annotations__", {})
        for parameter in ctx.command.params:  # one value will do for an option that may be repeated
            value = options.get(parameter.name or "")
            if value is not None:
                _require_type(path, parameter.name or "", hints.get(parameter.name or ""), value)
            if getattr(parameter, "multiple", False) and value is not None and not isinstance(value, list):
                options[parameter.name or ""] = [value]
        ctx.default_map = {**(ctx.default_map or {}), **options}
    return path


def _require_type(path: Path, name: str, hint: Any, value: Any) -> None:
    """Raise InputError for a value that another type would be read from: 2.7 is no whole number, true no number."""
    base = get_args(hint)[0]  # of Annotated[...]
    kinds = get_args(base) if isinstance(base, UnionType) else (base,)
    several = next((get_args(kind) for kind in kinds if get_origin(kind) is list), ())
    kind = several[0] if several else kinds[0]
    accepted, word = _TYPES.get(kind, _TYPES[str])
    for each in value if several and isinstance(value, list) else [value]:
        if not isinstance(each, accepted) or (isinstance(each, bool) and kind is not bool):
            number = "one or a list of them" if several else "one"
            raise InputError(f"the config file {path} sets {name} = {each!r}; it takes {word}, {number}")


def own_options(flag: str, pairs: Iterable[str], name: str) -> dict[str, str]:
    """Option -> value, from the OPTION=VALUE pairs of a flag; NAME.OPTION=VALUE is read too. Raises InputError."""
    options = {}
    for pair in pairs:
        left, equals, value = pair.partition("=")
        option = left.removeprefix(f"{name}.")
        if not equals or not option:
            raise InputError(f"{flag} takes NAME=VALUE, got {pair!r}")
        options[option] = value
    return options


def named_options(flag: str, names: Iterable[str], pairs: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name -> its options, from names and the NAME.OPTION=VALUE pairs of a flag. Raises InputError."""
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for pair in pairs:
        left, equals, value = pair.partition("=")
        name, dot, option = left.partition(".")
        if not (equals and dot and option):
            raise InputError(f"{flag} takes NAME.OPTION=VALUE here, got {pair!r}")
        if name not in options:
            raise InputError(f"{flag} {pair} is for {name!r}, which is not in this run{did_you_mean(name, options)}")
        options[name][option] = value
    return options
