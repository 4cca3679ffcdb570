"""The conformance kit: what every solver must do, built-in or not. It needs no test framework.

In pytest::

    @pytest.mark.parametrize("check", grace_opt.testing.checks(MySolver()), ids=str)
    def test_my_solver_conforms(check): check(MySolver())

Elsewhere ``print(grace_opt.testing.conformance(MySolver()))``, or ``python -m grace_opt.testing my-solver``.
"""

from grace_opt.testing.cases import Case, brute_force, problems
from grace_opt.testing.checks import CHECKS, Check, checks
from grace_opt.testing.report import CheckResult, Outcome, Report, conformance

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "CheckResult",
    "Outcome",
    "Report",
    "brute_force",
    "checks",
    "conformance",
    "problems",
]
