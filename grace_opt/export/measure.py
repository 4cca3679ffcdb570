"""What an export costs in quality, where it is not our own cache that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.kl import divergence
from grace_opt.evaluate.replay import log_probabilities
from grace_opt.evaluate.statistics import bootstrap_mean
from grace_opt.runtime.cache import cache_nbytes

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.export.target import Record, Source


@dataclass(frozen=True)
class Run:
    """A passage as an export runs it: log-probabilities of the scored tokens, in parts, and bytes of the prompt."""

    chunks: Iterable[Tensor]
    nbytes: float


def measured(source: Source, queries: int, run: Callable[[Captured], Run]) -> Record:
    """A record as of `grace_opt.evaluate`, in those of its fields that an export states.

    ``run`` gets each passage's prompt as the uncompressed model has read it, with its last ``queries`` queries.
    """
    kl, rise, agree, held, full = [], [], [], [], 0.0
    for ids in source.passages.ids:
        captured = capture(source.model, ids, source.passages.prefix, max(1, queries))
        full = cache_nbytes(captured.past) / captured.prefix
        plain = torch.cat(list(log_probabilities(captured, dense(captured))))
        with torch.inference_mode():
            ours = run(captured)
            each, nll, same = divergence(captured, plain, ours.chunks)
        kl.append(float(each.mean()))
        rise.append(nll)
        agree.append(same)
        held.append(ours.nbytes / captured.prefix)
    about: dict[str, Any] = {"length": source.passages.prefix, "scored": source.passages.scored, "documents": len(kl)}
    return about | {
        "kl": asdict(bootstrap_mean(kl)),
        "nll": asdict(bootstrap_mean(rise)),
        "top1": float(np.mean(agree)),
        "bytes_per_token": float(np.mean(held)),
        "full_bytes_per_token": full,
    }
