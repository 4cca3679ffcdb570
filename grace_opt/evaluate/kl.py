"""KL and NLL of what follows a prompt, against the uncompressed cache: one prefill a document for all trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.documents import Document, Passages, passages
from grace_opt.evaluate.measurements import Measurements, key_of
from grace_opt.evaluate.replay import log_probabilities
from grace_opt.evaluate.statistics import bootstrap_mean, paired
from grace_opt.evaluate.trial import Trial
from grace_opt.heads import KINDS
from grace_opt.models.config import config_sha256, context_of
from grace_opt.runtime.cache import cache_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
POSITION_BINS = 8


def prompts(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Document],
    prefix: int,
    scored: int,
    documents: int,
) -> Passages:
    """Passages of the first documents that are long enough. Raises InputError for what does not fit the context."""
    context = context_of(model.config)
    if context is not None and prefix + scored > context:
        raise InputError(
            f"{prefix + scored} tokens ({prefix} of the prompt, {scored} scored) are more than the model's context of "
            f"{context}; make the prompts shorter"
        )
    return passages(texts, tokenizer, prefix, scored, documents)


def evaluate(
    model: PreTrainedModel,
    chosen: Passages,
    trials: Sequence[Trial],
    *,
    seed: int = 0,
    measurements: Measurements | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """One record for each trial, with the fields of `grace_opt.records.EvaluationRecord`.

    A passage's prefix is run once, uncompressed, as prefill does. Each method makes its plan from that prompt's own
    last queries and keys, the cache that the plan asks for is built from them, by the code that runs in generation, and
    the passage's other tokens are scored on it, and compared with the uncompressed cache token by token. Memory: the
    log-probabilities of all scored tokens of one passage, 4 bytes times scored times vocabulary.

    ``measurements``: what is known already; a passage that is wholly known is not run. ``seed`` is that of the
    intervals. Raises InputError for a budget or prefix that a method cannot do, or a model that cannot be observed.
    """
    if not trials:
        raise InputError("there is nothing to evaluate; name at least one method and one budget, or a mask")
    known = measurements or Measurements()
    done, total = 0, len(chosen.ids) * (1 + len(trials))

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows: list[list[Record]] = []
    for ids, name in zip(chosen.ids, chosen.names, strict=True):
        passage = (str(model.config.name_or_path), config_sha256(model.config), ids, chosen.prefix)
        keys = [key_of("kl", *passage, trial.digest()) for trial in trials]
        about: Record = {"task": "kl", "document": name}
        if known.has(keys):
            done += 1 + len(trials)
            rows.append([known.once(key, dict) for key in keys])
            continue
        captured = capture(model, ids, chosen.prefix, max(trial.queries for trial in trials))
        plain = torch.cat(list(log_probabilities(captured, dense(captured))))
        step()
        rows.append([])
        for key, trial in zip(keys, trials, strict=True):
            rows[-1].append(known.once(key, partial(_measured, about, captured, plain, trial)))
            step()
    columns = list(zip(*rows, strict=True))
    records = []
    for trial, of_trial in zip(trials, columns, strict=True):
        rival = next(each for other, each in zip(trials, columns, strict=True) if other.budget == trial.budget)
        records.append(_record(trial, of_trial, rival, chosen, seed))
    return records


def _measured(about: Record, captured: Captured, plain: Tensor, trial: Trial) -> Record:
    """Build the cache, count its bytes, and score what follows the prompt on it."""
    plan = trial.plan(captured)
    first = captured.past.layers[next(iter(captured.queries))]
    with torch.inference_mode(), trial.cache(captured, plan) as past:
        held = cache_nbytes(past)
        kl, rise, agree = divergence(captured, plain, log_probabilities(captured, past))
    dims = {"key": first.keys.shape[-1], "value": first.values.shape[-1]}
    return {
        **about,
        **trial.asked(),
        "kl": kl.tolist(),
        "nll": rise,
        "top1": agree,
        "bytes": held,
        "full_bytes": cache_nbytes(captured.past),
        "layers": list(captured.queries),
        "head_dim": dims["key"],
        "value_head_dim": dims["value"],
        "kept": {kind: _widths(plan.widths(kind), list(captured.queries), dims[kind]) for kind in KINDS},
    }


def divergence(captured: Captured, plain: Tensor, chunks: Iterable[Tensor]) -> tuple[np.ndarray, float, float]:
    """KL of each token, rise of the NLL a token, and agreement of the likeliest token.

    ``plain`` float32[scored, vocabulary]: uncompressed log-probabilities; ``chunks``: the compressed ones, in parts.
    """
    targets = captured.ids[0, captured.prefix + 1 :]
    rise = agree = 0.0
    at = 0
    kl = []
    for after in chunks:
        before = plain[at : at + len(after)]
        kl.append((before.exp() * (before - after)).sum(-1, dtype=torch.float64).cpu().numpy())
        agree += float((before.argmax(-1) == after.argmax(-1)).sum())
        next_ones = targets[at : at + len(before), None]
        known = slice(0, len(next_ones))  # the last token's successor is not part of the passage
        rise += float((before[known].gather(1, next_ones) - after[known].gather(1, next_ones)).sum())
        at += len(before)
    return np.concatenate(kl), rise / max(at - 1, 1), agree / at


def _record(trial: Trial, measured: Sequence[Record], rival: Sequence[Record], chosen: Passages, seed: int) -> Record:
    documents, first = (np.array([np.mean(each["kl"]) for each in of]) for of in (measured, rival))
    about = measured[-1]
    return {
        "task": "kl",
        **trial.asked(),
        "kl": asdict(bootstrap_mean(documents, seed=seed)),
        "nll": asdict(bootstrap_mean([each["nll"] for each in measured], seed=seed)),
        "top1": float(np.mean([each["top1"] for each in measured])),
        "bytes_per_token": float(np.mean([each["bytes"] / chosen.prefix for each in measured])),
        "full_bytes_per_token": about["full_bytes"] / chosen.prefix,
        "documents": len(documents),
        "too_short": chosen.too_short,
        "length": chosen.prefix,
        "scored": chosen.scored,
        "against_first": None if measured is rival else paired(documents, first, seed=seed).p_value,
        "kl_documents": documents.tolist(),
        "kl_positions": _by_position(np.array([each["kl"] for each in measured]), seed),
        "kept": {kind: _mean_widths([each["kept"][kind] for each in measured]) for kind in KINDS},
        **{name: about[name] for name in ("layers", "head_dim", "value_head_dim")},
    }


def _widths(widths: Mapping[int, list[int]], layers: Sequence[int], n: int) -> list[list[int]] | None:
    """Kept channels of every layer and KV head; None where nothing is compressed."""
    if not widths:
        return None
    heads = len(next(iter(widths.values())))
    return [widths.get(i, [n] * heads) for i in layers]  # a layer that is not compressed is whole


def _mean_widths(widths: Sequence[list[list[int]] | None]) -> list[list[float]] | None:
    known = [each for each in widths if each is not None]
    mean: list[list[float]] | None = np.mean(known, axis=0).tolist() if known else None
    return mean


def _by_position(kl: np.ndarray, seed: int) -> list[Record]:
    """KL float64[documents, scored] in equal spans of positions after the prefix."""
    edges = np.unique(np.linspace(0, kl.shape[1], POSITION_BINS + 1).astype(int))
    return [
        {"from": int(a), "to": int(b), **asdict(bootstrap_mean(kl[:, a:b].mean(1), seed=seed))}
        for a, b in pairwise(edges)
    ]
