"""Other people's solvers, as solvers of grace-opt: run and checked by the same front end.

Gurobi (gurobipy; the licence that its wheel brings takes up to 200 variables), SCIP (pyscipopt), simulated annealing
and tabu search on the penalised form (dwave-samplers): pip install gurobipy pyscipopt dwave-samplers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

import grace_opt
from grace_opt import SubsetProblem
from grace_opt.problem import BoolArray
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult


@dataclass(frozen=True)
class GurobiSolver:
    """min x'Wx over binaries as it stands; Gurobi convexifies, cuts and branches by itself."""

    name: ClassVar[str] = "gurobi"
    capabilities: ClassVar[Capabilities] = Capabilities(bounds=True, time_limit=True, requires=("gurobipy",))

    def supports(self, problem: SubsetProblem) -> bool | str:
        return problem.groups is None or "it was not told about tied groups"

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> RawResult:
        import gurobipy

        with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
            model.Params.Threads, model.Params.Seed, model.Params.MIPGap = limits.threads, limits.seed, limits.gap_rel
            if limits.time_limit is not None:
                model.Params.TimeLimit = limits.time_limit
            upper = np.ones(problem.n) if problem.protected is None else (~problem.protected).astype(float)
            x = model.addMVar(problem.n, vtype="B", ub=upper)
            model.addConstr(x.sum() == problem.prune)
            scale = float(np.abs(problem.weights).max())
            model.setObjective(x @ (problem.weights / scale) @ x)
            model.optimize()
            late = model.Status == gurobipy.GRB.TIME_LIMIT
            return RawResult(
                x.X > 0.5 if model.SolCount else None,
                scale * model.ObjBound,
                BoundKind.NUMERICAL,
                limit=Limit.TIME if late else Limit.NONE,
                raw_status=f"status {model.Status}",
                nodes=int(model.NodeCount),
            )


@dataclass(frozen=True)
class SCIPSolver:
    """min t, t >= x'Wx over binaries."""

    name: ClassVar[str] = "scip"
    capabilities: ClassVar[Capabilities] = Capabilities(bounds=True, time_limit=True, requires=("pyscipopt",))

    def supports(self, problem: SubsetProblem) -> bool | str:
        return problem.groups is None or "it was not told about tied groups"

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> RawResult:
        from pyscipopt import Model, quicksum

        model = Model()
        model.hideOutput()
        model.setParam("limits/gap", limits.gap_rel)
        model.setParam("randomization/randomseedshift", limits.seed)
        if limits.time_limit is not None:
            model.setParam("limits/time", limits.time_limit)
        scale = float(np.abs(problem.weights).max())
        weights = problem.weights / scale
        free = np.ones(problem.n, bool) if problem.protected is None else ~problem.protected
        x = [model.addVar(vtype="B", ub=float(free[i])) for i in range(problem.n)]
        t = model.addVar(lb=None)
        model.addCons(quicksum(x) == problem.prune)
        pairs = [(i, j) for i in range(problem.n) for j in range(i + 1)]
        square = quicksum((1 if i == j else 2) * float(weights[i, j]) * x[i] * x[j] for i, j in pairs)
        model.addCons(square <= t)
        model.setObjective(t)
        model.optimize()
        pruned = None
        if model.getNSols():
            pruned = np.array([model.getVal(v) > 0.5 for v in x])
        return RawResult(
            pruned,
            scale * model.getDualbound(),
            BoundKind.NUMERICAL,
            limit=Limit.TIME if model.getStatus() == "timelimit" else Limit.NONE,
            raw_status=model.getStatus(),
            nodes=int(model.getNTotalNodes()),
        )


@dataclass(frozen=True)
class PenaltySolver:
    """Unconstrained heuristics of dwave-samplers on x'Wx + p (sum x - m)^2.

    p is half of the median change of the objective by one channel at the greedy selection: the best of 0.05 to 2 times
    that median on seven real heads (ten times more and annealing ends 17 % above the optimum). What misses the count,
    by a channel or so, is mended by the cheapest single channels.
    """

    method: Literal["annealing", "tabu"] = "annealing"
    reads: int = 10

    name: ClassVar[str] = "penalty"
    capabilities: ClassVar[Capabilities] = Capabilities(requires=("dwave-samplers",))

    def supports(self, problem: SubsetProblem) -> bool | str:
        return problem.groups is None or "it was not told about tied groups"

    def solve(self, problem: SubsetProblem, limits: Limits, warm_start: Any = None, rng: Any = None) -> RawResult:
        from dimod import BinaryQuadraticModel
        from dwave.samplers import SimulatedAnnealingSampler, TabuSampler

        free = np.arange(problem.n) if problem.protected is None else np.flatnonzero(~problem.protected)
        weights = problem.weights[np.ix_(free, free)] / np.abs(problem.weights).max()
        start = np.isin(free, grace_opt.solve(problem, "greedy").pruned or ())
        penalty = 0.5 * float(np.median(np.abs(2 * weights @ start + np.diagonal(weights))))
        form = weights + penalty
        linear = np.diagonal(form) - 2 * penalty * problem.prune
        model = BinaryQuadraticModel.from_numpy_vectors(
            linear, (*np.triu_indices(len(free), 1), 2 * form[np.triu_indices(len(free), 1)]), 0.0, "BINARY"
        )
        if self.method == "annealing":
            samples = SimulatedAnnealingSampler().sample(model, num_reads=self.reads, seed=limits.seed)
        else:
            samples = TabuSampler().sample(model, num_reads=self.reads, timeout=20, seed=limits.seed)
        found = [_mended(weights, row.astype(bool), problem.prune) for row in samples.record.sample]
        best = min(found, key=lambda y: float(weights[np.ix_(y, y)].sum()))
        pruned = np.zeros(problem.n, bool)
        pruned[free[best]] = True
        return RawResult(pruned)


def _mended(weights: np.ndarray, y: BoolArray, count: int) -> BoolArray:
    while y.sum() != count:
        change = 2 * weights @ y + np.where(y, -1, 1) * np.diagonal(weights)
        more = y.sum() < count
        candidates = np.where(y != more, change if more else -change, np.inf)
        y[candidates.argmin()] = more
    return y
