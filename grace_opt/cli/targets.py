"""grace-opt targets."""

from __future__ import annotations

from grace_opt.cli.options import FormatOption
from grace_opt.cli.output import Format, print_records


def targets(format: FormatOption = Format.TABLE) -> None:
    """List the export targets: what each can run of a mask, and the releases of its runtime that are tested."""
    from grace_opt.export.target import TARGETS

    records = [
        {
            "target": name,
            "runs": target.expresses,
            "runtime": target.runtime,
            "tested": list(target.tested) if format is Format.JSON else ", ".join(target.tested),
        }
        for name, target in ((name, TARGETS[name]) for name in TARGETS)
    ]
    print_records(records, format, ["target", "runs", "runtime", "tested"])
