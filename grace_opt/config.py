"""Where options come from: defaults < config file (TOML) < GRACE_OPT_* environment < flags."""

from __future__ import annotations

import tomllib
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
        "protection_multiple",
        "protection_at_least",
        "protection_at_most",
    ),
    "method": ("ratio", "protect"),
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
    "engine": ("engine", "workers", "isolate"),
    "generation": ("prompt", "max_new_tokens", "num_beams"),
}


# Tables that only one command reads: a mask's window is not set by the table that is about calibration.
_ONLY = {"calibration": "calibrate", "generation": "generate"}


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
