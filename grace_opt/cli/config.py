"""Where options come from: defaults < config file (TOML) < GRACE_OPT_* environment < flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError
from grace_opt.registry import nearest

# The tables of a config file and the options that each holds, by the names of the command line (with _ for -).
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
        "protection_multiple",
        "protection_at_least",
        "protection_at_most",
    ),
    "method": (
        *("ratio", "value_ratio", "budget_bytes", "budget", "floor", "align", "readout", "protect"),
        *("method", "method_option"),
    ),
    "evaluation": (
        "text",
        "dataset",
        "prefix",
        "scored",
        "documents",
        "prune_generated",
        "needle_length",
        "needle_depth",
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
        *("url", "key"),
    ),
    "generation": ("prompt", "max_new_tokens", "num_beams"),
}


# Tables that only one command reads: a mask's window is not set by the table that is about calibration.
_ONLY = {"calibration": "calibrate", "generation": "generate", "evaluation": "evaluate"}


def read_config(path: str | Path, command: str) -> dict[str, Any]:
    """Option name -> value from a TOML file, of the tables that ``command`` reads.

    Raises InputError for a bad file or an unknown table or key.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"the config file {path} is not TOML ({error})") from None
    options: dict[str, Any] = {}
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            raise InputError(f"the config file {path} has no table [{table}] to read{nearest(table, TABLES)}")
        for key, value in values.items():
            if key not in TABLES[table]:
                raise InputError(f"the config file {path} sets {table}.{key}{nearest(key, TABLES[table])}")
            if _ONLY.get(table, command) == command:
                options[key] = value
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
            raise InputError(f"{flag} {pair} is for {name!r}, which is not in this run{nearest(name, options)}")
        options[name][option] = value
    return options
