"""What solvers are compared on: the heads of bundles, each as a problem at one ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import problems_of
from grace_opt.compression.method import Method
from grace_opt.engines.outcome import failed
from grace_opt.graphs import GraphBundle
from grace_opt.problem import SubsetProblem
from grace_opt.records import BUDGET, Record, added, budget_of
from grace_opt.solution import Limits, RawResult, Solver, Status, rounding_slack

NOT_SUPPORTED = "not supported"  #: raw_status of a head that its solver does not take


@dataclass(frozen=True, eq=False)
class Instance:
    """One head of one bundle at one budget, which is named as in records (`grace_opt.records.InstanceRecord`)."""

    bundle: str
    ratio: float | None
    value_ratio: float | None
    budget_bytes: float | None
    problem: SubsetProblem
    digest: str

    @property
    def labels(self) -> dict[str, Any]:
        """The fields of a record that say whose head it is, at what budget."""
        return {**{name: getattr(self, name) for name in ("bundle", *BUDGET)}, "problem": self.problem.name}

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this head at this budget, not just of an equal problem."""
        return place_of(record) == place_of(self.labels)


def place_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whose head a record is of, at what budget."""
    return (record["bundle"], *budget_of(record).values(), record["problem"])


def instances_of(
    graphs: Mapping[str, GraphBundle], budgets: Iterable[float | Budget], method: Method
) -> list[Instance]:
    """Every head of every bundle at every budget, allotted as the method says; a number is a ratio of keys and values.

    Raises InputError as `grace_opt.compression.from_bundle.problems_of` does.
    """
    instances = []
    for name, bundle in graphs.items():
        for each in dict.fromkeys(budgets):
            asked = each if isinstance(each, Budget) else Budget(each, each)
            ratio, value_ratio, most = asked.ratio, asked.value_ratio, asked.bytes_per_token
            for problem in problems_of(bundle, method, asked):
                named = (
                    None if most is not None else ratio,
                    None if most is not None or not isinstance(each, Budget) else value_ratio,
                    most,
                )
                instances.append(Instance(name, *named, problem, problem.digest()))
    return instances


def slack_of(instances: Iterable[Instance]) -> dict[str, float]:
    """By digest, how far rounding may raise a proven bound: for `with_references`."""
    return {instance.digest: rounding_slack(instance.problem.weights) for instance in instances}


def labelled(record: Mapping[str, Any], instance: Instance, limits: Limits) -> dict[str, Any]:
    """A record of an equal problem as one of this instance, without what other records said of it (`with_references`).

    ``limits`` are stated where the record states none.
    """
    bare = {name: value for name, value in record.items() if name not in added(Record)}
    return {**bare, **instance.labels, "limits": record.get("limits", limits_of(limits))}


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
