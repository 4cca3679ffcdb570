"""grace-opt methods."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from grace_opt.cli.options import FormatOption
from grace_opt.cli.output import Format, print_records

if TYPE_CHECKING:
    from grace_opt.compression.method import Method


def methods(format: FormatOption = Format.TABLE) -> None:
    """List the methods and what each is composed of."""
    from grace_opt.compression.method import METHODS

    if format is Format.JSON:
        print_records([{"method": name, **asdict(method)} for name, method in METHODS.items()], format)
        return
    columns = ["method", "stored as", "tokens", "objectives", "solver", "for masks", "budget", "read-out"]
    print_records([_row(name, method) for name, method in METHODS.items()], format, columns)


def _row(name: str, method: Method) -> dict[str, Any]:
    """The parts that tell methods apart; ``-f json`` has them all."""
    bits = [f"{kind} {bits} bits" for kind, bits in (("key", method.key_bits), ("value", method.value_bits)) if bits]
    selection, sharing, selects = method.selection, method.sharing, method.codec == "channels"
    return {
        "method": name,
        "stored as": ", ".join([*map(str, (method.codec, *method.codec_options.values())), *bits]),
        "tokens": "all" if method.tokens is None else "chosen",
        "objectives": f"{selection.objective}, {selection.value_objective}" if selects else None,
        "solver": selection.solver if selects else None,
        "for masks": selection.offline_solver if selects else None,
        "budget": f"{sharing.budget}, {sharing.rounding}" if sharing.budget == "uniform" else sharing.budget,
        "read-out": method.readout.readout_fit,
    }
