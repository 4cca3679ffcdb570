"""All checks on one solver, as a report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from grace_opt.solution import Solver
from grace_opt.testing.solvers.cases import problems
from grace_opt.testing.solvers.checks import CHECKS


class Outcome(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CLAIMED = "not claimed"  #: the solver's capabilities do not claim what the check looks at


@dataclass(frozen=True)
class CheckResult:
    """One check: the sentence that says what failed, or which capability is not claimed; empty if it passed."""

    name: str
    outcome: Outcome
    message: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """What the kit found. ``refused`` maps the cases that the solver does not take to its reasons."""

    solver: str
    results: tuple[CheckResult, ...]
    cases: int
    refused: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.outcome is not Outcome.FAILED for result in self.results)

    def __str__(self) -> str:
        width = max(len(result.name) for result in self.results)
        lines = [f"{self.solver}: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  {r.name:{width}}  {r.outcome:11}  {r.seconds:6.2f} s  {r.message}" for r in self.results]
        lines.append(f"  took {self.cases - len(self.refused)} of {self.cases} cases, refused {len(self.refused)}")
        lines += [f"    {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(line.rstrip() for line in lines)


def conformance(solver: Solver) -> Report:
    """Run every check on a solver; takes some seconds. Failures are in the report, nothing is raised."""
    results = []
    for check in CHECKS:
        began, outcome, message = time.perf_counter(), Outcome.PASSED, ""
        if not check.applies_to(solver):
            outcome, message = Outcome.NOT_CLAIMED, f"capabilities.{check.needs} is False"
        else:
            try:
                check(solver)
            except AssertionError as failure:
                outcome, message = Outcome.FAILED, str(failure)
        results.append(CheckResult(check.name, outcome, message, time.perf_counter() - began))
    cases = problems()
    refused = {}
    for case in cases:
        try:
            answer = solver.supports(case.problem)
        except Exception as error:  # the check "supports" has failed with it already
            answer = f"supports() raised {error!r}"
        if answer is not True:
            refused[case.name] = str(answer)
    return Report(str(getattr(solver, "name", type(solver).__name__)), tuple(results), len(cases), refused)
