"""grace-opt solvers."""

from __future__ import annotations

from grace_opt.cli.options import FormatOption
from grace_opt.cli.output import Format, print_records


def solvers(format: FormatOption = Format.TABLE) -> None:
    """List the solvers: names, what each guarantees, what it needs."""
    from grace_opt import registry

    records = [
        {"solver": info.name, "guarantee": info.guarantee, "needs": info.needs, "origin": info.origin}
        for info in registry.solvers()
    ]
    print_records(records, format)
