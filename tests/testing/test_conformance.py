"""Every built-in solver passes the conformance kit, and the kit finds what it is there to find."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import pytest

from grace_opt import Limits, SubsetProblem, registry, solve
from grace_opt.problem import BoolArray
from grace_opt.solution import BoundKind, Capabilities, Limit, RawResult, Solver, Status
from grace_opt.testing import CHECKS, Case, Check, Outcome, brute_force, checks, conformance, problems
from grace_opt.testing.__main__ import main
from grace_opt.testing.solvers.cases import hidden_optimum

BUILT_IN = [info.name for info in registry.solvers() if info.origin == "built-in"]
OTHER_OPTIONS = ["greedy direction=backward", "greedy direction=best"]


@cache
def built_in(words: str) -> Solver:
    name, *options = words.split()
    return registry.create(name, dict(option.split("=") for option in options))


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize("words", BUILT_IN + OTHER_OPTIONS)
def test_built_in(words: str, check: Check) -> None:
    check(built_in(words))


# The cases


@pytest.mark.parametrize("case", problems(), ids=lambda case: case.name)
def test_a_case_is_what_its_tags_say(case: Case) -> None:
    problem = case.problem
    assert problem.name == case.name
    assert problem.n <= 14
    assert problem.is_feasible(case.best)
    assert problem.objective(case.best) == pytest.approx(case.optimum, rel=1e-9, abs=case.slack)
    low = float(np.linalg.eigvalsh(problem.weights)[0])
    rounding = 1e-13 * float(np.linalg.norm(problem.weights))
    assert ("indefinite" in case.tags) == (low < -rounding)
    assert ("groups" in case.tags) == (problem.groups is not None)
    assert "pairs" not in case.tags or problem.contraction.equal_size() == 2
    if "plain" in case.tags:
        assert "groups" not in case.tags
        assert "indefinite" not in case.tags
    if "generic" in case.tags:  # the second best is clearly worse
        penalty = np.where(case.best, 1.0, 0.0) * 1e-4 * max(case.optimum, case.slack)
        if 0 < problem.prune < problem.prunable:
            dearer = SubsetProblem(problem.weights + np.diag(penalty), problem.prune, problem.protected)
            assert (brute_force(dearer)[1] == case.best).all()


def test_the_cases_cover_what_has_broken_solvers() -> None:
    cases = {case.name: case for case in problems()}
    assert len(cases) == len(problems())
    assert any(c.problem.prune == 0 for c in cases.values())
    assert any(c.problem.prune == c.problem.n for c in cases.values())
    assert any(c.problem.prunable == 0 for c in cases.values())
    magnitudes = [np.abs(c.problem.weights).max() for c in cases.values()]
    assert min(m for m in magnitudes if m) < 1e-9
    assert max(magnitudes) > 1e12
    assert (cases["zero"].problem.weights == 0).all()
    assert cases["rank-one-signed"].optimum == 0
    assert cases["slightly-indefinite"].optimum < -10 * cases["slightly-indefinite"].slack
    assert any(c.problem.contraction.equal_size() is None for c in cases.values())


def test_what_is_written_into_a_case_reaches_nobody_else() -> None:
    mine = problems()[0]
    mine.problem.weights.flags.writeable = True
    mine.problem.weights[:] = 0
    assert problems()[0].problem.weights.any()


def test_the_hidden_optimum_is_zero_and_greedy_misses_it() -> None:
    for n in (14, 60, 100):
        case = hidden_optimum(n)
        assert case.problem.objective(case.best) == 0
        assert np.linalg.eigvalsh(case.problem.weights)[0] > -1e-12 * np.linalg.norm(case.problem.weights)
        assert solve(case.problem, "greedy").objective > 0


# Faults, each in a solver that is otherwise right


@dataclass(frozen=True)
class Right:
    """The optimum by brute force; swaps where that takes too long. All faulty solvers are this one, changed."""

    starts: int = 3

    name: ClassVar[str] = "right"
    capabilities: ClassVar[Capabilities] = Capabilities(
        bounds=True, time_limit=True, warm_start=True, groups=True, batched=True
    )

    def supports(self, problem: SubsetProblem) -> bool | str:
        return problem.n <= 14 or problem.groups is None or "tied groups only up to 14 channels"

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult:
        if problem.n <= 14:
            value, x = brute_force(problem)
            trace = ((0.0, np.inf, -np.inf), (0.1, value, value))
            return RawResult(x, lower_bound=value, bound_kind=BoundKind.PROVEN, trace=trace)
        rng = np.random.default_rng(limits.seed) if rng is None else rng
        selections = [] if warm_start is None else [warm_start.copy()]
        for _ in range(self.starts):
            x = np.zeros(problem.n, bool)
            x[rng.choice(problem.n, problem.prune, replace=False)] = True
            selections.append(x)
        return RawResult(min(selections, key=problem.objective), lower_bound=0.0, bound_kind=BoundKind.PROVEN)

    def solve_batch(self, problems: Sequence[SubsetProblem], limits: Limits) -> list[RawResult]:
        return [self.solve(problem, limits) for problem in problems]


@dataclass(frozen=True)
class Exact(Right):
    """Right, and as it says so, held to more."""

    capabilities: ClassVar[Capabilities] = replace(Right.capabilities, exact=True, largest_n=14)

    def supports(self, problem: SubsetProblem) -> bool | str:
        return problem.n <= 14 or "more than 14 channels"


class Changed(Right):
    """Right, with a fault put in: ``result`` changes what it returns."""

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult:
        return self.result(problem, limits, warm_start, super().solve(problem, limits, warm_start, rng))

    def result(self, problem: SubsetProblem, limits: Limits, start: BoolArray | None, raw: RawResult) -> RawResult:
        raise NotImplementedError


def some_other(problem: SubsetProblem) -> BoolArray:
    """The worst selection."""
    return brute_force(SubsetProblem(-problem.weights, problem.prune, problem.protected, problem.groups))[1]


class BoundTooHigh(Changed):
    def result(self, problem, limits, start, raw):  # its own selection hides it: that one is no better than the bound
        return replace(raw, pruned=some_other(problem), lower_bound=raw.lower_bound * 1.01) if problem.n < 15 else raw


class BoundAboveItself(Changed):
    def result(self, problem, limits, start, raw):
        return replace(raw, lower_bound=raw.lower_bound * 1.5 + 1e-3)


class SemidefiniteBound(Changed):
    def result(self, problem, limits, start, raw):  # true unless W is slightly indefinite
        return replace(raw, lower_bound=0.0) if "slightly" in problem.name else raw


class ClaimsOptimal(Changed):
    def result(self, problem, limits, start, raw):
        if problem.n > 14 or problem.prune in (0, problem.prunable):
            return raw
        worst = some_other(problem)
        return replace(raw, pruned=worst, lower_bound=problem.objective(worst))


class OneTooMany(Changed):
    def result(self, problem, limits, start, raw):
        raw.pruned[np.flatnonzero(~raw.pruned)[:1]] = True
        return raw


class IgnoresProtected(Changed):
    def result(self, problem, limits, start, raw):
        unprotected = SubsetProblem(problem.weights, problem.prune, groups=problem.groups)
        return replace(raw, pruned=brute_force(unprotected)[1], lower_bound=-np.inf) if problem.n < 15 else raw


class SplitsGroups(Changed):
    def result(self, problem, limits, start, raw):
        apart = SubsetProblem(problem.weights, problem.prune, problem.protected)
        return raw if problem.groups is None else RawResult(brute_force(apart)[1])


class Nothing(Changed):
    def result(self, problem, limits, start, raw):
        return RawResult(None, status=Status.NO_SOLUTION)


class Crashes(Changed):
    def result(self, problem, limits, start, raw):
        raise MemoryError("no room")


class NoBound(Changed):
    def result(self, problem, limits, start, raw):
        return replace(raw, bound_kind=BoundKind.NONE)


class UnclaimedBound(Right):
    capabilities = replace(Right.capabilities, bounds=False)


class DoesNotProve(Exact):
    def solve(self, problem, limits, warm_start=None, rng=None):
        return replace(super().solve(problem, limits), bound_kind=BoundKind.NUMERICAL)


@dataclass(frozen=True)
class NotJson(Right):
    words: frozenset[str] = frozenset({"an option that JSON does not know"})


class TraceCrosses(Changed):
    def result(self, problem, limits, start, raw):
        return replace(raw, trace=((0.1, np.inf, abs(raw.lower_bound) * 2 + 1),))


class TraceGoesBack(Changed):
    def result(self, problem, limits, start, raw):
        return replace(raw, trace=raw.trace[::-1])


class ChannelOrder(Changed):
    def result(self, problem, limits, start, raw):
        first = np.zeros(problem.n, bool)
        first[np.flatnonzero(problem.contraction.free)[: problem.prune]] = True
        return raw if problem.groups is not None else RawResult(first, -np.inf)


class AbsoluteTolerance(Changed):
    def result(self, problem, limits, start, raw):
        small = np.abs(problem.weights).max() < 1e-6 and 0 < problem.prune < problem.prunable and problem.n < 15
        return RawResult(some_other(problem)) if small else raw


class HashSeed(Changed):
    def result(self, problem, limits, start, raw):
        names = {f"channel {i}" for i in range(problem.n)}  # a set of strings: its order depends on the hash seed
        return raw if problem.n < 15 else RawResult(np.array([int(name[8:]) for name in names][: problem.prune]))


class OwnRandomness(Changed):
    def result(self, problem, limits, start, raw):
        rng = np.random.default_rng()
        return raw if problem.n < 15 else RawResult(rng.choice(problem.n, problem.prune, replace=False))


class LooksAtTheName(Changed):
    def result(self, problem, limits, start, raw):
        return raw if problem.name in {case.name for case in problems()} else RawResult(some_other(problem))


class WritesWeights(Changed):
    def result(self, problem, limits, start, raw):
        problem.weights.flags.writeable = True
        problem.weights[0, 0] += 1e-9
        return raw


class WritesNodes(Changed):
    def result(self, problem, limits, start, raw):
        problem.contraction.free[:1] ^= problem.groups is not None
        return raw


class WritesWarmStart(Changed):
    def result(self, problem, limits, start, raw):
        if start is not None:
            start[:] = False
        return raw


class LiesWhenCutShort(Changed):
    def result(self, problem, limits, start, raw):
        return replace(raw, lower_bound=raw.lower_bound + 1) if limits.node_limit == 1 else raw


class GivesUpWithoutALimit(Changed):
    def result(self, problem, limits, start, raw):
        return RawResult(None, status=Status.NO_SOLUTION) if limits.time_limit == 0 else raw


class IgnoresTime(Changed):
    def result(self, problem, limits, start, raw):
        time.sleep(1.3 if problem.n > 14 and limits.time_limit else 0)
        return replace(raw, limit=Limit.TIME)


class LosesWarmStart(Right):
    def solve(self, problem, limits, warm_start=None, rng=None):
        return super().solve(problem, limits, None, rng)


class WorsensWarmStart(Changed):
    def result(self, problem, limits, start, raw):
        return raw if start is None or problem.n > 14 else RawResult(some_other(problem))


class BelievesWarmStart(Exact):
    def solve(self, problem, limits, warm_start=None, rng=None):
        raw = super().solve(problem, limits)
        return raw if warm_start is None else replace(raw, pruned=warm_start, lower_bound=-np.inf)


class BatchOutOfOrder(Right):
    def solve_batch(self, problems, limits):
        done = super().solve_batch(problems, limits)
        return [done[2], *done[1:2], done[0], *done[3:]] if len(done) > 2 else done


class NoBatch(Right):
    solve_batch = None


class SaysFalse(Right):
    def supports(self, problem):
        return problem.groups is None


class SaysNumpyTrue(Right):
    def supports(self, problem):
        return np.all(np.isfinite(problem.weights))


class Raises(Right):
    def supports(self, problem):
        return problem.protected.any() or True


class RefusesPlain(Right):
    def supports(self, problem):
        return bool(problem.prune) or "there is nothing to prune"


class RefusesPairs(Right):
    def supports(self, problem):
        return problem.groups is None or "it does not know tied groups"


class TakesGroupsSilently(Right):
    capabilities = replace(Right.capabilities, groups=False)


class BadName(Right):
    name = "not a name"


class NoCapabilities(Right):
    capabilities = None


class ExactWithoutBounds(Right):
    capabilities = replace(Right.capabilities, exact=True, bounds=False)


@dataclass
class NotFrozen:
    name: ClassVar[str] = "not-frozen"
    capabilities: ClassVar[Capabilities] = Right.capabilities
    supports = Right.supports
    solve = Right.solve
    solve_batch = Right.solve_batch
    starts: int = 3


FAULTS = [
    (BadName, "description"),
    (NoCapabilities, "description"),
    (ExactWithoutBounds, "description"),
    (NotFrozen, "description"),
    (NoBatch, "description"),
    (SaysFalse, "supports"),
    (SaysNumpyTrue, "supports"),
    (Raises, "supports"),
    (RefusesPlain, "supports"),
    (RefusesPairs, "supports"),
    (TakesGroupsSilently, "supports"),
    (OneTooMany, "selection"),
    (IgnoresProtected, "selection"),
    (SplitsGroups, "selection"),
    (Nothing, "selection"),
    (Crashes, "selection"),
    (NotJson, "selection"),
    (BoundTooHigh, "lower-bound"),
    (BoundAboveItself, "lower-bound"),
    (SemidefiniteBound, "lower-bound"),
    (NoBound, "lower-bound"),
    (UnclaimedBound, "lower-bound"),
    (ClaimsOptimal, "optimal-status"),
    (TraceCrosses, "trace"),
    (TraceGoesBack, "trace"),
    (DoesNotProve, "exactness"),
    (ChannelOrder, "permutation"),
    (AbsoluteTolerance, "scale"),
    (HashSeed, "repeatable"),
    (OwnRandomness, "repeatable"),
    (LooksAtTheName, "name-of-the-problem"),
    (WritesWeights, "inputs-untouched"),
    (WritesNodes, "inputs-untouched"),
    (WritesWarmStart, "inputs-untouched"),
    (LiesWhenCutShort, "cut-short"),
    (GivesUpWithoutALimit, "cut-short"),
    (IgnoresTime, "time-limit"),
    (LosesWarmStart, "warm-start"),
    (WorsensWarmStart, "warm-start"),
    (BelievesWarmStart, "warm-start"),
    (BatchOutOfOrder, "batch"),
]


@pytest.mark.parametrize(
    ("faulty", "name"), FAULTS, ids=lambda given: given if isinstance(given, str) else given.__name__
)
def test_a_fault_is_found(faulty: type[Right], name: str) -> None:
    (check,) = [check for check in CHECKS if check.name == name]
    with pytest.raises(AssertionError) as failure:
        check(faulty())
    assert len(str(failure.value)) > 20


def test_every_check_has_found_a_fault() -> None:
    assert {name for _, name in FAULTS} == {check.name for check in CHECKS}


@pytest.mark.parametrize("right", [Right(), Exact(), Right(starts=5)], ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_what_is_right_passes(right: Right, check: Check) -> None:
    check(right)


# What the kit says


def test_the_report_counts_what_was_refused_and_what_is_not_claimed() -> None:
    report = conformance(registry.create("greedy"))
    assert report.passed
    assert [r.name for r in report.results] == [check.name for check in CHECKS]
    outcomes = {r.name: r for r in report.results}
    assert outcomes["selection"].outcome is Outcome.PASSED
    assert outcomes["warm-start"].outcome is Outcome.NOT_CLAIMED
    assert outcomes["warm-start"].message == "capabilities.warm_start is False"
    assert list(report.refused) == ["groups-of-mixed-sizes", "groups-of-mixed-sizes-protected"]
    assert f"took {report.cases - 2} of {report.cases} cases, refused 2" in str(report)
    assert "several sizes" in str(report)


def test_the_report_goes_on_after_a_failure() -> None:
    report = conformance(Raises())
    assert not report.passed
    outcomes = {r.name: r for r in report.results}
    assert outcomes["supports"].outcome is Outcome.FAILED
    assert "AttributeError" in outcomes["supports"].message
    assert outcomes["description"].outcome is Outcome.PASSED
    assert "supports() raised AttributeError" in report.refused["generic-6"]
    assert "right: FAILED" in str(report)


def test_checks_of_a_solver_are_those_that_look_at_what_it_claims() -> None:
    assert checks() == list(CHECKS)
    names = {check.name for check in CHECKS}
    assert {check.name for check in checks(Right())} == names - {"exactness"}
    assert {check.name for check in checks(registry.create("greedy"))} == names - {
        "exactness",
        "time-limit",
        "warm-start",
    }
    assert all(check.summary.endswith(".") for check in CHECKS)


def test_a_solver_that_cannot_be_made_again_is_told_so() -> None:
    class Local(Right):
        pass

    (check,) = [check for check in CHECKS if check.name == "repeatable"]
    with pytest.raises(AssertionError, match="must stand at the top level of a module"):
        check(Local())


def test_the_kit_needs_no_pytest_and_works_optimised() -> None:
    script = (
        "import sys; from grace_opt import registry, testing; "
        "report = testing.conformance(registry.create('independent')); "
        "assert 'pytest' not in sys.modules; print(report.passed)"
    )
    path = os.pathsep.join(filter(None, sys.path))
    for flags in ([], ["-O"]):
        run = subprocess.run(
            [sys.executable, *flags, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ, PYTHONPATH=path),
        )
        assert run.stdout == "True\n"


def test_the_command_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greedy", "--option", "direction=best"]) == 0
    assert "greedy: passed" in capsys.readouterr().out
    for wrong in (["gredy"], ["greedy", "--option", "direction"], ["greedy", "--option", "depth=3"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "did you mean 'greedy'" in capsys.readouterr().err


def test_the_command_exits_1_for_a_solver_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grace_opt.testing.__main__.create", lambda name, options: BoundAboveItself())
    assert main(["right"]) == 1
    assert "lies above its own selection" in capsys.readouterr().out
