"""grace-opt methods."""

from __future__ import annotations

from grace_opt.cli.options import FormatOption
from grace_opt.cli.output import Format, print_records


def methods(format: FormatOption = Format.TABLE) -> None:
    """List the methods and what each sets."""
    from dataclasses import asdict

    from grace_opt.compression.method import METHODS

    records = [{"method": name, **asdict(policy)} for name, policy in METHODS.items()]
    columns = ["method", "structure", "objective", "value_objective", "solver", "budget", "rounding", "readout"]
    print_records(records, format, columns)
