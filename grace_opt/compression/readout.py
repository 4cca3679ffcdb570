"""Read-outs: what dropped channels are estimated from, so that pruning loses less (docs/readout.md).

A pruned token is read as x~_P = mean_P + B (x_A - mean_A) in its dropped channels P, from the kept channels A. Nothing
is stored for a token; the estimate folds into the query (keys) or into what attention returns (values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from grace_opt.errors import InputError
from grace_opt.graphs.bundle import HeadGraph
from grace_opt.heads import Kind
from grace_opt.problem import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

READOUT_SCOPES = ("none", "prefill", "static")
ReadoutFit = Literal["none", "mean", "least-squares", "attention"]


@dataclass(frozen=True)
class ReadoutRecipe:
    """How a read-out is fitted to the tokens that are pruned.

    Attributes:
        readout_fit: ``attention``: ridge regression under the attention that each token receives; ``least-squares``:
            all tokens alike; ``mean``: the mean alone, B = 0; ``none``: dropped channels read as zeros.
        mixing, value_mixing: of equal weights into attention's, for keys and for values, as measured
            (docs/results/quality.md).
        ridge: share of the kept channels' mean variance that is added to each.
    """

    readout_fit: ReadoutFit = "attention"
    mixing: float = 0.05
    value_mixing: float = 0.3
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.readout_fit not in get_args(ReadoutFit):
            raise InputError(f"readout_fit must be one of {', '.join(get_args(ReadoutFit))}, got {self.readout_fit!r}")
        for name in ("mixing", "value_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.ridge < math.inf:
            raise InputError(f"ridge must not be negative, and finite; got {self.ridge}")

    def mixed(self, kind: Kind) -> float:
        """The mixing of keys or of values."""
        return self.mixing if kind == "key" else self.value_mixing


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted mean, float64[n], and covariance, float64[n, n], of one head's prunable tokens."""

    mean: FloatArray
    covariance: FloatArray


@dataclass(frozen=True, eq=False)
class Readout:
    """The estimate of the dropped channels from the kept ones: constant + B x_kept."""

    constant: FloatArray  #: float64[n - d]
    matrix: FloatArray  #: float64[n - d, d], B


def weighted_moments(tokens: Tensor, weights: Tensor | None, mixing: float) -> tuple[Tensor, Tensor]:
    """Mean [H, n] and covariance [H, n, n], float64, of each head's tokens [H, T, n] under the weights
    (1 - mixing) weights [H, T] + mixing / T; None weighs all tokens alike.

    The mixing keeps the covariance well conditioned where a few tokens receive all attention. Summed in float32
    (float64 for float64 tokens), which the centring makes accurate enough: half of the time. O(T n^2) a head.
    """
    import torch

    from grace_opt.graphs.moments import weighted_sums
    from grace_opt.graphs.observed import double

    x = tokens if tokens.dtype == torch.float64 else tokens.float()
    share = torch.full_like(x[..., 0], 1 / x.shape[1])
    if weights is not None:
        share = (1 - mixing) * weights.to(share) + mixing * share
    mean = torch.matmul(share[:, None], x)
    return double(mean[:, 0]), double(weighted_sums(x, share[:, None], mean)[1][:, 0])


def moments(tokens: Tensor, weights: Tensor | None, mixing: float) -> list[Moments]:
    """`weighted_moments` of each head, in numpy."""
    mean, covariance = weighted_moments(tokens, weights, mixing)
    return [Moments(m, c) for m, c in zip(mean.cpu().numpy(), covariance.cpu().numpy(), strict=True)]


def bundle_moments(head: HeadGraph, tokens: int, mixing: float) -> Moments:
    """Moments of a calibrated head, of ``tokens`` prunable tokens a window, under attention mixed with equal weights.

    Raises InputError if the bundle holds no moments of the head.
    """
    gram, mean = (head.key_gram, head.key_mean) if head.kind == "key" else (head.value_gram, head.value_mean)
    if gram is None or mean is None or head.attention_gram is None or head.attention_mean is None:
        raise InputError(f"the bundle holds no moments of {head.name} to fit a read-out to; calibrate again")
    with np.errstate(over="ignore", invalid="ignore"):
        middle = (1 - mixing) * head.attention_mean + mixing * mean
        second = (1 - mixing) * head.attention_gram + mixing * gram / tokens
        about = Moments(middle, second - np.outer(middle, middle))
        finite = bool(np.isfinite(np.square(about.covariance.astype(np.float32)).sum() + middle.sum()))
    if not finite:
        raise InputError(f"the bundle's moments of {head.name} are not finite, or so large that sums of them overflow")
    return about


def fit_many(
    mean: Tensor, covariance: Tensor, width: int, ridge: float, *, linear: bool = True
) -> tuple[Tensor, Tensor]:
    """Read-outs of many heads at once, without waiting for their device: B [H, n - d, d] and constant [H, n - d].

    From the mean [H, n] and covariance [H, n, n], float64, of tokens with the kept channels first. Ridge regression:
    ``ridge`` times the mean variance of the kept channels is added to each of them, so that B stays small where they
    barely differ. For any ridge >= 0 the error that it fits is not above that of zeros in the dropped channels: ridge
    regression never exceeds the error of B = 0, which is the mean's, and the mean's is the least of all constants.
    ``linear`` False: the mean alone (B = 0). O(H d^3).
    """
    import torch

    block, both = covariance[:, :width, :width], covariance[:, :width, width:]
    if not linear or width == 0:
        return torch.zeros_like(both.mT), mean[:, width:]
    if ridge == 0:  # the covariance may be singular: least squares of least norm
        solved = torch.linalg.pinv(block, hermitian=True) @ both
    else:
        shift = ridge * block.diagonal(dim1=1, dim2=2).mean(1)
        # Where the kept channels do not vary at all, anything positive gives B = 0.
        shift = shift.clamp(min=torch.finfo(shift.dtype).tiny)[:, None, None]
        solved, _ = torch.linalg.solve_ex(block + shift * torch.eye(width).to(block), both)
    return solved.mT, mean[:, width:] - (solved.mT @ mean[:, :width, None])[..., 0]


def fit(about: Moments, keep: np.ndarray, *, linear: bool = True, ridge: float = 1e-3) -> Readout:
    """`fit_many` for one head, for kept channels int[d], in numpy. The least weighted squared error on its tokens."""
    import torch

    order = np.concatenate([keep, np.setdiff1d(np.arange(len(about.mean)), keep)]).astype(np.int64)
    mean, covariance = (
        torch.from_numpy(np.ascontiguousarray(each))[None]
        for each in (about.mean[order], about.covariance[np.ix_(order, order)])
    )
    matrix, constant = fit_many(mean, covariance, len(keep), ridge, linear=linear)
    return Readout(constant[0].numpy(), matrix[0].numpy())


def squared_error(about: Moments, keep: np.ndarray, readout: Readout | None) -> float:
    """The weighted squared error of the dropped channels under a read-out, or of zeros. O(n^2 d)."""
    dropped = np.setdiff1d(np.arange(len(about.mean)), keep)
    constant, matrix = np.zeros(len(dropped)), np.zeros((len(dropped), len(keep)))
    if readout is not None:
        constant, matrix = readout.constant, readout.matrix
    bias = about.mean[dropped] - constant - matrix @ about.mean[keep]
    residual = np.zeros((len(dropped), len(about.mean)))
    residual[:, dropped], residual[:, keep] = np.eye(len(dropped)), -matrix
    return float(np.trace(residual @ about.covariance @ residual.T) + bias @ bias)
