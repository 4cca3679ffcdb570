"""Read-outs: what dropped channels are estimated from, so that pruning loses less (docs/readout.md).

A pruned token is read as x~_P = mean_P + B (x_A - mean_A) in its dropped channels P, from the kept channels A. Nothing
is stored for a token; the estimate folds into the query (keys) or into what attention returns (values).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from grace_opt.errors import InputError
from grace_opt.graphs.bundle import HeadGraph
from grace_opt.problem import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

SCOPES = ("none", "prefill", "static")
MIXING = {"key": 0.05, "value": 0.3}  # of equal weights into attention's, as measured (docs/results/quality.md)
ReadoutKind = Literal["none", "mean", "least-squares", "attention"]


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
    """Mean [H, n] and covariance [H, n, n] of each head's tokens [H, T, n], float64, as of `moments`.

    Summed in float32 (float64 for float64 tokens), which the centring makes accurate enough: half of the time.
    """
    import torch

    from grace_opt.graphs.observed import double

    x = tokens if tokens.dtype == torch.float64 else tokens.float()
    share = torch.full_like(x[..., 0], 1 / x.shape[1])
    if weights is not None:
        share = (1 - mixing) * weights.to(share) + mixing * share
    mean = torch.matmul(share[:, None], x)
    centred = x - mean
    return double(mean[:, 0]), double(torch.matmul((centred * share[..., None]).mT, centred))


def moments(tokens: Tensor, weights: Tensor | None, mixing: float) -> list[Moments]:
    """Moments of each head's tokens [H, T, n] under the weights (1 - mixing) weights [H, T] + mixing / T.

    None weighs all tokens alike. The mixing keeps the covariance well conditioned where a few tokens receive all
    attention. O(T n^2) a head.
    """
    mean, covariance = weighted_moments(tokens, weights, mixing)
    return [Moments(m, c) for m, c in zip(mean.cpu().numpy(), covariance.cpu().numpy(), strict=True)]


def bundle_moments(head: HeadGraph, tokens: int, mixing: float) -> Moments:
    """Moments of a calibrated head, of ``tokens`` prunable tokens a window, under attention mixed with equal weights.

    Raises InputError if the bundle holds no moments of the head.
    """
    gram, mean = (head.key_gram, head.key_mean) if head.kind == "key" else (head.value_gram, head.value_mean)
    if gram is None or mean is None or head.attention_gram is None or head.attention_mean is None:
        raise InputError(f"the bundle holds no moments of {head.name} to fit a read-out to; calibrate again")
    middle = (1 - mixing) * head.attention_mean + mixing * mean
    second = (1 - mixing) * head.attention_gram + mixing * gram / tokens
    return Moments(middle, second - np.outer(middle, middle))


def fit(about: Moments, keep: np.ndarray, *, linear: bool = True, ridge: float = 1e-3) -> Readout:
    """The read-out of least weighted squared error on the tokens of ``about``, for kept channels int[d].

    Ridge regression: ``ridge`` times the mean variance of the kept channels is added to each of them, so that B stays
    small where they barely differ. For any ridge >= 0 the error that it fits is not above that of zeros in the dropped
    channels: ridge regression never exceeds the error of B = 0, which is the mean's, and the mean's is the least of all
    constants. ``linear`` False: the mean alone (B = 0). O(d^3).
    """
    n, d = len(about.mean), len(keep)
    dropped = np.setdiff1d(np.arange(n), keep)
    matrix = np.zeros((n - d, d))
    if linear and 0 < d < n:
        block = about.covariance[np.ix_(keep, keep)]
        shift = ridge * float(np.trace(block)) / d
        both = about.covariance[np.ix_(keep, dropped)]
        # Without a ridge the covariance may be singular: least squares of least norm.
        solved = np.linalg.solve(block + shift * np.eye(d), both) if shift > 0 else np.linalg.pinv(block) @ both
        matrix = solved.T
    return Readout(about.mean[dropped] - matrix @ about.mean[keep], matrix)


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
