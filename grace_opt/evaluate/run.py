"""Methods x budgets on documents and needles: one prefill each, any number of compressed caches scored on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Budget
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import Method
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.evaluate.capture import Captured, capture
from grace_opt.evaluate.documents import Document, Passages, passages
from grace_opt.evaluate.replay import dense, greedy_tokens, log_probabilities, narrow, replay
from grace_opt.evaluate.statistics import Interval, bootstrap_mean, paired, rate
from grace_opt.evaluate.tasks.needle import ANSWER_TOKENS, NeedlePrompt, found, needle_prompts
from grace_opt.heads import KINDS, Kind
from grace_opt.models.config import text_config
from grace_opt.runtime.cache import PrunedCache, cache_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
Generated = Literal["keep", "prune"]
POSITION_BINS = 8


@dataclass(frozen=True, eq=False)
class Trial:
    """What is evaluated: a method at a budget, or a mask. ``budget`` of a mask is what it prunes, measured."""

    name: str
    what: Method | KVMask
    budget: Budget = field(default_factory=Budget)

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries it looks at."""
        if isinstance(self.what, Method):
            return self.what.selection.observation_window
        return max((layer.queries for layer in self.what.plan), default=1)

    def options(self) -> dict[str, Any]:
        """What was asked for, for the record."""
        if isinstance(self.what, Method):
            return self.what.options()
        return {**asdict(self.what.windows), "readout_scope": self.what.readout_scope, "solver": self.what.solver}

    @property
    def narrow(self) -> bool:
        """Whether the tokens of a prompt see each other as they are stored; a mask may say so."""
        return isinstance(self.what, KVMask) and self.what.prefill == "pruned"

    @property
    def generated(self) -> Generated:
        """What becomes of generated tokens, as the method or the mask says."""
        return self.what.windows.generated

    def plan(self, captured: Captured, generated: Generated | None = None) -> CachePlan:
        """The plan for a prompt. Raises InputError for what the method or the mask cannot do with it."""
        if isinstance(self.what, KVMask):
            self.what.check_model(captured.model.config, str(captured.model.config.name_or_path))
            return self.what.plan.changed(generated=generated)
        selection = self.what.selection
        seen = captured.observed(selection.observation_window, self.what.windows, selection.spans)
        return apply(self.what, seen, self.budget).changed(generated=generated)


def trials(methods: Mapping[str, Method], budgets: Sequence[Budget]) -> list[Trial]:
    """Every method at every budget, by budget."""
    return [Trial(name, each, budget) for budget in budgets for name, each in methods.items()]


def mask_trial(name: str, mask: KVMask) -> Trial:
    """A mask, with everything that it says."""
    return Trial(name, mask, Budget(*(float(1 - mask.keep_matrix(kind).mean()) for kind in KINDS)))


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
    """What one trial did on all documents and needles."""

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
    trials: Sequence[Trial],
    *,
    generated: Generated | None = None,
    needles: Sequence[NeedlePrompt] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """One record for each trial.

    A passage's prefix is run once, uncompressed, as prefill does. Each method makes its plan from that prompt's own
    last queries and keys, the cache that the plan asks for is built from them, by the code that runs in generation, and
    the passage's other tokens are scored on it, and compared with the uncompressed cache token by token. A needle
    prompt is run up to its last token, and its answer decoded greedily. Memory: the log-probabilities of all scored
    tokens of one passage, 4 bytes times scored times vocabulary. The fields of a record are those of
    `grace_opt.records.EvaluationRecord`.

    Args:
        generated: ``keep`` the scored tokens whole, or ``prune`` them as they leave the recent window; None: as each
            method or mask says.

    Raises InputError for a budget or prefix that a method cannot do, or a model that cannot be observed.
    """
    if not trials:
        raise InputError("there is nothing to evaluate; name at least one method and one ratio, or a mask")
    queries = max(trial.queries for trial in trials)
    measured = [_Measured() for _ in trials]
    total = (len(chosen.ids) + len(needles)) * (1 + len(trials))
    done, full = 0, 0.0
    about: dict[str, Any] = {}

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for ids in chosen.ids:
        captured = capture(model, ids, chosen.prefix, queries)
        full = cache_nbytes(captured.past) / captured.prefix
        plain = torch.cat(list(log_probabilities(captured, dense(captured))))
        first = captured.past.layers[next(iter(captured.queries))]
        about = {"layers": list(captured.queries), "head_dim": first.keys.shape[-1]}
        about["value_head_dim"] = first.values.shape[-1]
        step()
        for trial, result in zip(trials, measured, strict=True):
            _score(captured, plain, trial.plan(captured, generated), trial.narrow, result)
            step()
    for prompt in needles:
        captured = capture(model, prompt.ids, len(prompt.ids) - 1, queries)
        step()
        for trial, result in zip(trials, measured, strict=True):
            with torch.inference_mode(), _filled(captured, trial.plan(captured, generated), trial.narrow) as past:
                text = tokenizer.decode(greedy_tokens(captured, past, ANSWER_TOKENS))
            result.needles.append((prompt.length, prompt.depth, found(text, prompt.answer)))
            step()
    about |= {"full_bytes_per_token": full}
    about |= {name: getattr(chosen, name) for name in ("prefix", "scored", "too_short")}
    records = []
    for trial, result in zip(trials, measured, strict=True):
        rival = next((other for of, other in zip(trials, measured, strict=True) if of.budget == trial.budget), result)
        records.append(_record(trial, result, rival, about | {"generated": generated or trial.generated}, seed))
    return records


def _filled(captured: Captured, plan: CachePlan, is_narrow: bool) -> PrunedCache:
    return narrow(captured, plan) if is_narrow else replay(captured, plan)


def _score(captured: Captured, plain: Tensor, plan: CachePlan, is_narrow: bool, result: _Measured) -> None:
    """Build the cache, count its bytes, and score what follows the prompt on it."""
    with torch.inference_mode(), _filled(captured, plan, is_narrow) as past:
        result.held.append(cache_nbytes(past) / captured.prefix)
        result.widths.append({kind: plan.widths(kind) for kind in KINDS})
        kl, rise, agree = divergence(captured, plain, log_probabilities(captured, past))
    result.kl.append(kl)
    result.rise.append(rise)
    result.agree.append(agree)


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


def _record(trial: Trial, result: _Measured, rival: _Measured, about: Mapping[str, Any], seed: int) -> Record:
    kl, first = (np.array([each.mean() for each in of.kl]) for of in (result, rival))
    dims = {"key": about["head_dim"], "value": about["value_head_dim"]}
    kept = {kind: _mean_widths([each[kind] for each in result.widths], about["layers"], dims[kind]) for kind in KINDS}
    hits = [hit for _, _, hit in result.needles]
    return {
        "method": trial.name,
        "ratio": trial.budget.ratio,
        "value_ratio": trial.budget.value_ratio,
        "budget_bytes": trial.budget.bytes_per_token,
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
        "options": trial.options(),
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
