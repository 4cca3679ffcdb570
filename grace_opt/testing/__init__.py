"""The conformance kits: what every solver must do, built-in or not; `codecs`, `policies` and `exports` have those of
codecs, token policies and export targets. They need no test framework.

In pytest::

    @pytest.mark.parametrize("check", grace_opt.testing.solvers.checks(MySolver()), ids=str)
    def test_my_solver_conforms(check): check(MySolver())

Elsewhere ``print(grace_opt.testing.conformance(MySolver()))``, or ``python -m grace_opt.testing my-solver``.
"""

from grace_opt.testing.solvers.cases import Case, brute_force, problems
from grace_opt.testing.solvers.checks import CHECKS, Check, checks
from grace_opt.testing.solvers.report import CheckResult, Outcome, Report, conformance

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
