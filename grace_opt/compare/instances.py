"""What solvers are compared on: the heads of bundles, each as a problem at one ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from grace_opt.engines.outcome import failed
from grace_opt.graphs import GraphBundle
from grace_opt.problem import SubsetProblem
from grace_opt.records import Record, added
from grace_opt.solution import Limits, RawResult, Solver, Status, rounding_slack

NOT_SUPPORTED = "not supported"  #: raw_status of a head that its solver does not take


@dataclass(frozen=True, eq=False)
class Instance:
    """One head of one bundle at one ratio."""

    bundle: str
    ratio: float
    problem: SubsetProblem
    digest: str

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this head at this ratio, not just of an equal problem."""
        return (record["bundle"], record["ratio"], record["problem"]) == (self.bundle, self.ratio, self.problem.name)


def instances_of(graphs: Mapping[str, GraphBundle], ratios: Iterable[float], protect: bool) -> list[Instance]:
    """Every head of every bundle at every ratio; ``protect`` as in `GraphBundle.problems`. Raises InputError."""
    return [
        Instance(name, ratio, problem, problem.digest())
        for name, bundle in graphs.items()
        for ratio in dict.fromkeys(ratios)
        for problem in bundle.problems(ratio, protect=protect)
    ]


def slack_of(instances: Iterable[Instance]) -> dict[str, float]:
    """By digest, how far rounding may raise a proven bound: for `with_references`."""
    return {instance.digest: rounding_slack(instance.problem.weights) for instance in instances}


def labelled(record: Mapping[str, Any], instance: Instance, limits: Limits) -> dict[str, Any]:
    """A record of an equal problem as one of this instance, without what other records said of it (`with_references`).

    ``limits`` are stated where the record states none.
    """
    bare = {name: value for name, value in record.items() if name not in added(Record)}
    labels = {"bundle": instance.bundle, "ratio": instance.ratio, "problem": instance.problem.name}
    return {**bare, **labels, "limits": record.get("limits", limits_of(limits))}


def refusal(solver: Solver, problem: SubsetProblem) -> RawResult | None:
    """What is recorded of a head that the solver does not take."""
    try:
        answer = solver.supports(problem)
    except Exception as error:  # a third party's
        return failed(error)
    if answer is True:
        return None
    why = f"{solver.name} does not take this head: {answer or 'it says no'}"
    return RawResult(None, status=Status.NO_SOLUTION, raw_status=NOT_SUPPORTED, warnings=(why,))


def limits_of(limits: Limits) -> dict[str, Any]:
    """The limits of a record; seed and threads are fields of their own."""
    return {name: value for name, value in asdict(limits).items() if name not in ("seed", "threads")}
