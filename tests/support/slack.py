"""How far apart two right numbers may be: proven bounds up to their slack, logits up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grace_opt.problem import SubsetProblem
from grace_opt.solution import Solution, rounding_slack


def assert_encloses(found: Solution, best: Solution, problem: SubsetProblem) -> None:
    """The bound of ``found`` is not above what ``best`` selects, nor its selection below the bound of ``best``.

    Two solvers sum in different orders, and a proven optimum may lie above the true one by the gap tolerance.
    """
    slack = rounding_slack(problem.weights)
    assert found.lower_bound <= best.objective + slack
    assert best.lower_bound <= found.objective + slack


def logit_slack(logits: torch.Tensor | Sequence[torch.Tensor]) -> float:
    """1e-4 of the largest logit: what docs/families.md calls equal.

    In float32 a tiny model's own logits move by up to a tenth of that when its sums are ordered otherwise, which they
    are on another processor.
    """
    largest = max((float(each.abs().max()) for each in logits if each.numel()), default=0.0)
    return 1e-4 * max(1.0, largest)


def assert_logits(ours: torch.Tensor | Sequence[torch.Tensor], theirs: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Equal up to `logit_slack`."""
    torch.testing.assert_close(ours, theirs, atol=logit_slack(theirs), rtol=0)
