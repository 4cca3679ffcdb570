"""Which channels turn together under RoPE: exports that fold a mask into the model can only drop both of a pair."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.problem import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rope_pairs(model: PreTrainedModel, attention: Any, head_dim: int) -> IntArray:
    """Tied groups int64[head_dim] for `SubsetProblem`: the two channels of a pair share a label, others stand alone.

    Found by turning each unit vector with the model's own function and looking where it goes, so that half-split,
    interleaved and partial layouts come out right. Raises InputError if the model has no RoPE of the usual form.
    """
    import torch

    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    widths = {2 * len(buffer) for name, buffer in model.base_model.named_buffers() if name.endswith("inv_freq")}
    if turn is None or len(widths) != 1 or max(widths) > head_dim:
        raise InputError(f"{type(model).__name__} has no rotary embedding of the usual form, so no pairs can be tied")
    width = widths.pop()
    units = torch.eye(width)[None, None]  # a token for each channel
    cos, sin = torch.full((1, width, width), 0.6), torch.full((1, width, width), 0.8)
    turned = turn(units, units, cos, sin)[0][0, 0]
    labels = np.arange(head_dim, dtype=np.int64)
    for channel, reached in enumerate(turned.abs() > 0.1):
        partners = reached.nonzero()[:, 0].tolist()
        if len(partners) != 2 or channel not in partners:
            raise InputError(f"{type(model).__name__} does not turn its channels in pairs, so no pairs can be tied")
        labels[channel] = min(partners)
    return labels
