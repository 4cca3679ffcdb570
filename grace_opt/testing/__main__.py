"""``python -m grace_opt.testing SOLVER [--option name=value ...]``: run the kit; exit 1 if a check fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from grace_opt.errors import InputError
from grace_opt.registry import create
from grace_opt.testing.solvers.report import conformance


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if the solver passes, 1 if not, 2 for an unknown solver or option."""
    parser = argparse.ArgumentParser("python -m grace_opt.testing", description="Run the conformance kit on a solver.")
    parser.add_argument("solver", help="a name that `grace-opt solvers` lists")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the solver")
    given = parser.parse_args(arguments)
    for option in given.option:
        if "=" not in option:
            parser.error(f"--option takes name=value, not {option!r}")
    try:
        solver = create(given.solver, dict(option.split("=", 1) for option in given.option))
    except InputError as error:
        parser.error(str(error))
    report = conformance(solver)
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
