"""The contexts of an evaluation: each prefilled once, compressed, and continued on its compressed cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from grace_opt.compression.budget import ShareError
from grace_opt.compression.mask import KVMask
from grace_opt.evaluate.capture import Captured, capture
from grace_opt.evaluate.replay import log_probabilities
from grace_opt.evaluate.trial import Trial
from grace_opt.models.attention import require_attention_interface
from grace_opt.runtime.cache import PrunedCache, cache_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Counts:
    """How many contexts there were, how many of them were compressed, and to what.

    ``shares`` is the sum, over the compressed ones, of the bytes held as a share of the uncompressed cache.
    """

    contexts: int = 0
    compressed: int = 0
    shares: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.contexts + other.contexts, self.compressed + other.compressed, self.shares + other.shares)

    def record(self) -> dict[str, float | None]:
        """For results: also the mean share held by the compressed ones, and by all, where whole ones count 1."""
        whole = self.contexts - self.compressed
        return {
            "contexts": self.contexts,
            "compressed": self.compressed,
            "held_share_of_compressed": self.shares / self.compressed if self.compressed else None,
            "held_share": (self.shares + whole) / self.contexts if self.contexts else None,
        }

    def sentence(self) -> str:
        """What happened."""
        whole = self.contexts - self.compressed
        done = f"{self.compressed} of {self.contexts} contexts were compressed"
        if self.compressed:
            done += f", to {self.shares / self.compressed:.4f} of their bytes on average"
        return f"{done}; {whole} were too short and held whole" if whole else done


class Contexts:
    """Compresses contexts of a model as a trial says, and counts.

    Attributes:
        counts: by task; ``task`` is the one that is being run.
        unreachable: why the first context, of those that are long enough to have old tokens, was held whole; or None.

    Raises InputError for a model whose attention cannot be watched, or that is not the mask's.
    """

    def __init__(self, model: PreTrainedModel, trial: Trial) -> None:
        require_attention_interface(model)
        if isinstance(trial.what, KVMask):
            trial.what.check_model(model.config, str(model.config.name_or_path))
        self.model, self.trial = model, trial
        self.counts: dict[str, Counts] = {}
        self.task = ""
        self.unreachable: str | None = None

    @contextmanager
    def cache(self, context: Sequence[int]) -> Iterator[tuple[Captured, PrunedCache] | None]:
        """A context that was run once, and the compressed cache of all its tokens but the last.

        The last token goes through the model on that cache, so that all that is said of what follows is read from what
        is stored, the first token included. None where the context is to be held whole: it has no token between
        sinks and recent window, or no budget of the method is within the share on a context as short.
        """
        windows, prefix = self.trial.what.windows, len(context) - 1
        self._count(Counts(1))
        if prefix <= windows.sinks + windows.recent_window:
            yield None
            return
        captured = capture(self.model, context, prefix, self.trial.queries)
        try:
            plan = self.trial.plan(captured)
        except ShareError as error:
            self.unreachable = self.unreachable or f"a context of {len(context)} tokens is held whole: {error}"
            yield None
            return
        with torch.inference_mode(), self.trial.cache(captured, plan) as past:
            self._count(Counts(0, 1, cache_nbytes(past) / cache_nbytes(captured.past)))
            yield captured, past

    def likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]] | None:
        """Each continuation's log-probability after the context, and whether greedy decoding gives it.

        The context is prefilled and compressed once; each continuation goes through the model as one chunk, on a copy
        of its cache. None where the context is to be held whole. Raises InputError as `capture` and `Trial.plan`.
        """
        with self.cache(context) as found:
            if found is None:
                return None
            captured, past = found
            answers = []
            for continuation in continuations[:-1]:
                with copy.deepcopy(past) as one:
                    answers.append(_likelihood(captured, one, continuation))
            return [*answers, _likelihood(captured, past, continuations[-1])]

    def _count(self, more: Counts) -> None:
        self.counts[self.task] = self.counts.get(self.task, Counts()) + more


def _likelihood(captured: Captured, past: PrunedCache, continuation: Sequence[int]) -> tuple[float, bool]:
    following = torch.tensor([continuation], device=captured.ids.device)
    asked = replace(captured, ids=torch.cat([captured.ids, following[:, :-1]], dim=1))
    logs = torch.cat(list(log_probabilities(asked, past, chunk=len(continuation))))
    chosen = logs.gather(1, following.mT.to(logs.device))
    return float(chosen.sum()), bool((logs.argmax(-1) == following[0].to(logs.device)).all())
