"""The objectives that make W: each is a squared error, quadratic in the set of pruned channels (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.graphs.moments import weighted_sums
from grace_opt.graphs.observed import Observed, double


def logit(seen: Observed) -> Tensor:
    """Squared error of the logits, float64[H, n, n]: W = (sum over the group of Q'Q) o (K'K), K the prunable keys.

    GRACE (arXiv 2604.16983, eq. 4-6), summed over the query heads of a group: pruning P changes the squared Frobenius
    norm of Q K' by the sum of W over P x P. Without the softmax scale, as in the paper. O((w + T) n^2) a head.
    """
    queries, keys = double(seen.grouped), double(seen.keys[:, seen.counted])
    return (queries.mT @ queries) * (keys.mT @ keys)


def centered(seen: Observed) -> Tensor:
    """Squared error of the logits less each query's mean error, float64[H, n, n]: `logit` with K less its mean.

    The mean of a query's error over the tokens cancels in the softmax, but for the whole tokens that have none.
    """
    keys = double(seen.keys[:, seen.counted])
    queries, keys = double(seen.grouped), keys - keys.mean(1, keepdim=True)
    return (queries.mT @ queries) * (keys.mT @ keys)


def attention(seen: Observed) -> Tensor:
    """Divergence of the attention distribution to second order, float64[H, n, n].

    An error e_t in the logits changes the softmax p to p~ with KL(p || p~) = (sum p_t e_t^2 - (sum p_t e_t)^2) / 2 +
    O(e^3). With e_t = s sum over P of q_i k_ti, s the softmax scale, zero on whole tokens, twice that is the sum over
    P x P of W_ij = s^2 sum_q q_i q_j (sum_t p_qt k_ti k_tj - (sum_t p_qt k_ti)(sum_t p_qt k_tj)).

    With ``spans``, consecutive queries of a head share the mean of their attention weights in place of p_q: cheaper,
    and never below the mean over all pairs of a query and an attention of its span, as a variance is concave in its
    weights. Each span's term is the Schur product of a Gram matrix and a covariance, so W is positive semidefinite, to
    float32's rounding. O(G s T n^2) a head with s spans (w without).
    """
    heads, width = len(seen.keys), seen.queries.shape[1]
    keys = seen.keys[:, seen.counted].float()
    spans = min(seen.spans or width, width)
    member = (
        torch.arange(spans, device=keys.device)[:, None] == torch.arange(width, device=keys.device) * spans // width
    )
    share = member / member.sum(1, keepdim=True)
    weights = torch.matmul(share, seen.attention.view(heads, -1, width, keys.shape[1])).flatten(1, 2)
    queries = seen.grouped.float().view(heads, -1, 1, width, keys.shape[-1])
    grams = ((queries * member[:, :, None]).mT @ queries).flatten(1, 2)
    # About the mean key, lest large means cancel in float32. Whole tokens count with key 0, so the rest of the weight,
    # 1 - p.sum(), lies at minus that mean.
    centre = keys.mean(1, keepdim=True)
    rest = 1 - weights.sum(2, keepdim=True)
    mean, covariance = weighted_sums(keys, weights, centre)
    mean -= rest * centre
    covariance += rest[..., None] * (centre.mT * centre)[:, None]
    covariance -= mean[..., None] * mean[:, :, None]
    W = double((grams * covariance).sum(1))
    return seen.scaling**2 * (W + W.mT) / 2


def norm(seen: Observed) -> Tensor:
    """Squared norms of the value channels on the diagonal, float64[H, nv, nv]: the scores of plain value pruning."""
    values = double(seen.values[:, seen.counted])
    return torch.diag_embed(values.square().sum(1))


def read(seen: Observed) -> Tensor:
    """Squared norms of the value channels as attention returns them, on the diagonal, float64[H, nv, nv].

    ThinK's scores for values (arXiv 2407.21018, appendix D): diag of sum_g V'A_g'A_g V, g over the query heads.
    """
    returned = double(torch.matmul(seen.attention, seen.values[:, seen.counted].float()))
    return torch.diag_embed(returned.square().sum(1))


def output(seen: Observed) -> Tensor:
    """Squared error of the layer's output, float64[H, nv, nv], for values.

    Pruning value channels P of KV head h takes sum_g A_g V_P (W_g)_P' off the output, g over the group, A_g the
    attention weights of the observed queries on prunable tokens, W_g the head's slice of the output projection. Without
    the products of different query heads its squared norm is the sum over P x P of W = sum_g (V'A_g'A_g V) o (W_g'W_g).
    O(G (w T nv + hidden nv^2)). Raises InputError if the output projection is not known.
    """
    if seen.output_grams is None:
        raise InputError("the output projection of this model's attention was not found; use the norm objective")
    heads, _, n = seen.values.shape
    returned = torch.matmul(seen.attention, seen.values[:, seen.counted].float())
    returned = double(returned).view(heads, -1, seen.queries.shape[1], n)
    return ((returned.mT @ returned) * seen.output_grams.view(heads, -1, n, n)).sum(1)


KEY_OBJECTIVES: dict[str, Callable[[Observed], Tensor]] = {"logit": logit, "centered": centered, "attention": attention}
VALUE_OBJECTIVES: dict[str, Callable[[Observed], Tensor]] = {"norm": norm, "read": read, "output": output}
