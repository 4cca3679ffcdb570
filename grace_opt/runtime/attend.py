"""Attention over a filled compressed cache: one softmax over all tokens, by the first kernel that can read it."""

from __future__ import annotations

import torch
from torch import Tensor

from grace_opt.runtime.kernels.choose import choose
from grace_opt.runtime.kernels.contract import Request

# Scores of one block of queries, in elements: bounds the memory of chunked prefill over a long cache.
_BLOCK = 1 << 24


def attend(request: Request) -> Tensor:
    """Outputs [B, Hq, n, Dv] of the queries of the tokens that just came.

    The query of a token at slot t sees the token at s whole if t - s < recent_window (with generated tokens kept: if s
    is one of these, or of the prompt's last recent_window), if s is a sink, or if both came in the same update (prefill
    attends in full, as in ThinK).
    """
    layer, query = request.handle.layer, request.query
    kernel = choose(request)
    block = max(1, _BLOCK // (query.shape[0] * query.shape[1] * layer.columns))
    if request.new <= block:
        return kernel.attend(request)
    parts = [kernel.attend(request.part(low, block)) for low in range(0, request.new, block)]
    return torch.cat(parts, dim=2)
