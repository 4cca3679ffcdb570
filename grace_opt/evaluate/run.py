"""Methods x budgets on documents and needles: one prefill each, any number of compressed caches scored on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.budget import Budget
from grace_opt.compression.headmaps import KINDS, Compression
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import METHODS, Method, compress, compress_by_mask
from grace_opt.errors import InputError
from grace_opt.evaluate.documents import Document, Passages, passages
from grace_opt.evaluate.prefill import Prefill, greedy_tokens, log_probabilities, prefill
from grace_opt.evaluate.statistics import Interval, bootstrap_mean, paired, rate
from grace_opt.evaluate.tasks.needle import ANSWER_TOKENS, NeedlePrompt, found, needle_prompts
from grace_opt.heads import Kind
from grace_opt.models.config import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
POSITION_BINS = 8


@dataclass(frozen=True, eq=False)
class Run:
    """What is evaluated: a method at a budget, or a mask (its channels, with the read-out of ``policy``)."""

    name: str
    policy: Method
    budget: Budget = field(default_factory=Budget)
    mask: KVMask | None = None

    def compress(self, state: Prefill) -> Compression:
        """Compress a prompt's cache. Raises InputError for what the method or the mask cannot do with it."""
        if self.mask is not None:
            self.mask.check_model(state.model.config, str(state.model.config.name_or_path))
        windows = self.policy if self.mask is None else self.mask
        observed = state.observed(
            self.policy.observation_window, windows.recent_window, windows.sinks, self.policy.spans
        )
        if self.mask is not None:
            return compress_by_mask(self.policy, observed, self.mask)
        return compress(self.policy, observed, self.budget)


def runs(methods: Mapping[str, Method], budgets: Sequence[Budget]) -> list[Run]:
    """Every method at every budget, by budget."""
    return [Run(name, policy, budget) for budget in budgets for name, policy in methods.items()]


def mask_run(name: str, mask: KVMask) -> Run:
    """A mask's channels, with the read-out that it asks for: none, static, or fitted to each prompt.

    Its ratios are measured.
    """
    policy = replace(
        METHODS["grace-opt" if mask.readout_scope == "prefill" else "grace"],
        solver=str(mask.solver.get("name", "unknown")),
        recent_window=mask.recent_window,
        sinks=mask.sinks,
    )
    pruned = [1 - mask.keep_matrix(kind).mean() for kind in KINDS]
    return Run(name, policy, Budget(*map(float, pruned)), mask)


def prompts(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Document],
    prefix: int | None,
    scored: int,
    documents: int,
    needle_lengths: Sequence[int] = (),
    needle_depths: Sequence[float] = (),
    seed: int = 0,
) -> tuple[Passages, list[NeedlePrompt]]:
    """Passages of the first documents that are long enough, and needles hidden in the same texts.

    ``prefix`` None: 2048 tokens, or as many as the model's context leaves. Raises InputError for what does not fit.
    """
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    length = prefix if prefix is not None else min(2048, (context or 2048 + scored) - scored)
    longest = max([length + scored, *(needle + ANSWER_TOKENS for needle in needle_lengths)])
    if context is not None and longest > context:
        raise InputError(f"{longest} tokens are more than the model's context of {context}; make the prompts shorter")
    chosen = passages(texts, tokenizer, length, scored, documents)
    if not needle_lengths:
        return chosen, []
    haystack = "\n\n".join(document.text for document in texts[:20])
    ids = tokenizer(haystack, add_special_tokens=False, verbose=False)["input_ids"]
    return chosen, needle_prompts(ids, tokenizer, needle_lengths, needle_depths, seed=seed)


@dataclass
class _Measured:
    """What one run did on all documents and needles."""

    kl: list[np.ndarray] = field(default_factory=list)  #: float64[scored] a document
    rise: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    widths: list[dict[Kind, dict[int, list[int]]]] = field(default_factory=list)
    needles: list[tuple[int, float, bool]] = field(default_factory=list)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    chosen: Passages,
    runs: Sequence[Run],
    *,
    prune_generated: bool = False,
    needles: Sequence[NeedlePrompt] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """One record for each run.

    A passage's prefix is run once, uncompressed, as prefill does; each method chooses its channels from that prompt's
    own last queries and keys; then the passage's other tokens are scored under the compressed cache, and compared with
    the uncompressed one token by token (see `log_probabilities`). A needle prompt is run up to its last token, and
    its answer decoded greedily from the compressed cache. Memory: the log-probabilities of all scored tokens of one
    passage, 4 bytes times scored times vocabulary. The fields of a record are in docs/evaluation.md.

    Raises InputError for a budget or prefix that a method cannot do, or a model that cannot be observed.
    """
    if not runs:
        raise InputError("there is nothing to evaluate; name at least one method and one ratio, or a mask")
    if prune_generated and any(run.policy.key_bits or run.policy.value_bits for run in runs):
        raise InputError(
            "integers of tokens that leave the window one by one cannot be scored yet; leave out --prune-generated or "
            "the bits"
        )
    window = max(run.policy.observation_window for run in runs)
    measured = [_Measured() for _ in runs]
    total = (len(chosen.ids) + len(needles)) * (1 + len(runs))
    done, full = 0, 0.0
    about: dict[str, Any] = {}

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for ids in chosen.ids:
        state = prefill(model, ids, chosen.prefix, window)
        dense = list(log_probabilities(state, None))
        full = held_bytes(state, None)
        layer = next(iter(state.queries))
        first = state.past.layers[layer]
        about = {"layers": list(state.queries), "head_dim": first.keys.shape[-1]}
        about["value_head_dim"] = first.values.shape[-1]
        step()
        for run, result in zip(runs, measured, strict=True):
            compression = run.compress(state)
            chunks = log_probabilities(state, compression, prune_generated=prune_generated)
            kl, rise, agree = divergence(state, dense, chunks)
            result.kl.append(kl)
            result.rise.append(rise)
            result.agree.append(agree)
            result.held.append(held_bytes(state, compression))
            result.widths.append({kind: compression.widths(kind) for kind in KINDS})
            step()
    for prompt in needles:
        state = prefill(model, prompt.ids, len(prompt.ids) - 1, window)
        step()
        for run, result in zip(runs, measured, strict=True):
            text = tokenizer.decode(greedy_tokens(state, run.compress(state), ANSWER_TOKENS))
            result.needles.append((prompt.length, prompt.depth, found(text, prompt.answer)))
            step()
    about |= {"full_bytes_per_token": full, "prune_generated": prune_generated}
    about |= {name: getattr(chosen, name) for name in ("prefix", "scored", "too_short")}
    records = []
    for run, result in zip(runs, measured, strict=True):
        rival = next((other for of, other in zip(runs, measured, strict=True) if of.budget == run.budget), result)
        records.append(_record(run, result, rival, about, seed))
    return records


def divergence(state: Prefill, dense: Sequence[Tensor], chunks: Any) -> tuple[np.ndarray, float, float]:
    """KL of each token, rise of the NLL a token, and agreement of the likeliest token."""
    targets = state.ids[0, state.prefix + 1 :]
    rise = agree = 0.0
    at = 0
    kl = []
    for before, after in zip(dense, chunks, strict=True):
        kl.append((before.exp() * (before - after)).sum(-1, dtype=torch.float64).cpu().numpy())
        agree += float((before.argmax(-1) == after.argmax(-1)).sum())
        next_ones = targets[at : at + len(before), None]
        known = slice(0, len(next_ones))  # the last token's successor is not part of the passage
        rise += float((before[known].gather(1, next_ones) - after[known].gather(1, next_ones)).sum())
        at += len(before)
    return np.concatenate(kl), rise / max(at - 1, 1), agree / at


def held_bytes(state: Prefill, compression: Compression | None) -> float:
    """Bytes a token of the prefix that the cache holds, uncompressed (None) or compressed.

    Counted from tensors: what the maps store of the old tokens, whole sinks and recent tokens, the read-outs in the
    cache's own dtype, kept channels as int32.
    """
    held = 0.0
    for index, layer in enumerate(state.past.layers):
        whole = [layer.keys[0], layer.values[0]]
        maps = None if compression is None else compression.layers.get(index)
        if maps is None or compression is None:
            held += sum(tensor.nbytes for tensor in whole)
            continue
        old = slice(compression.sinks, max(compression.sinks, whole[0].shape[1] - compression.recent_window))
        for tensor, heads in zip(whole, map(maps.heads.get, KINDS), strict=True):
            rest = tensor.nbytes - tensor[:, old].nbytes
            if maps.hidden:
                held += rest
            elif heads is None:
                held += tensor.nbytes
            else:
                held += rest + sum(m.store(x[old]).nbytes for m, x in zip(heads, tensor, strict=True))
                held += sum(m.parameter_bytes(tensor.element_size()) for m in heads)
    return held / state.prefix


def _record(run: Run, result: _Measured, rival: _Measured, about: Mapping[str, Any], seed: int) -> Record:
    kl, first = (np.array([each.mean() for each in of.kl]) for of in (result, rival))
    dims = {"key": about["head_dim"], "value": about["value_head_dim"]}
    kept = {kind: _mean_widths([each[kind] for each in result.widths], about["layers"], dims[kind]) for kind in KINDS}
    hits = [hit for _, _, hit in result.needles]
    return {
        "method": run.name,
        "ratio": run.budget.ratio,
        "value_ratio": run.budget.value_ratio,
        "budget_bytes": run.budget.bytes_per_token,
        "kl": _interval(bootstrap_mean(kl, seed=seed)),
        "nll": _interval(bootstrap_mean(result.rise, seed=seed)),
        "top1": float(np.mean(result.agree)),
        "needle": _interval(rate(hits)) if hits else None,
        "bytes_per_token": float(np.mean(result.held)),
        "documents": len(kl),
        **about,
        "against_first": None if result is rival else paired(kl, first, seed=seed).p_value,
        "kl_documents": kl.tolist(),
        "kl_positions": _by_position(np.array(result.kl), seed),
        "kept": kept,
        "needles": _by_place(result.needles),
        "options": asdict(run.policy),
    }


def _mean_widths(widths: Sequence[dict[int, list[int]]], layers: Sequence[int], n: int) -> list[list[float]] | None:
    """Kept channels of every layer and KV head, mean over documents; None where nothing is compressed."""
    if not any(widths):
        return None
    heads = len(next(iter(widths[0].values())))
    whole = [n] * heads  # a layer that is not compressed
    mean: list[list[float]] = np.mean([[each.get(i, whole) for i in layers] for each in widths], axis=0).tolist()
    return mean


def _by_position(kl: np.ndarray, seed: int) -> list[Record]:
    """KL float64[documents, scored] in equal spans of positions after the prefix."""
    edges = np.unique(np.linspace(0, kl.shape[1], POSITION_BINS + 1).astype(int))
    return [
        {"from": int(a), "to": int(b), **_interval(bootstrap_mean(kl[:, a:b].mean(1), seed=seed))}
        for a, b in pairwise(edges)
    ]


def _by_place(needles: Sequence[tuple[int, float, bool]]) -> list[Record]:
    places = sorted({(length, depth) for length, depth, _ in needles})
    hits = {place: [hit for length, depth, hit in needles if (length, depth) == place] for place in places}
    return [
        {"length": length, "depth": depth, "found": sum(hits[length, depth]), "asked": len(hits[length, depth])}
        for length, depth in places
    ]


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
