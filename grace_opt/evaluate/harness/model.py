"""The model class that lm-evaluation-harness runs (entry point ``lm_eval.models``)."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from grace_opt.errors import InputError
from grace_opt.evaluate.harness.arguments import LOADING, Arguments, parsed
from grace_opt.evaluate.harness.contexts import Contexts, Counts
from grace_opt.models.load import load_model

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of context and continuation
Answer = tuple[float, bool]

log = logging.getLogger("lm_eval.grace_opt")  # below lm-eval's own, so that it is heard
NAME = "grace_opt"
_STAMP = NAME  # what is no hash: the key of whose answers a database of --use_cache holds


class GraceOptLM(HFLM):
    """lm-eval's ``hf`` model with caches that hold a share of their bytes.

    A context is prefilled, compressed by the method (or mask), and what follows is scored or generated on what is
    stored. Contexts that are too short for that, and all of them at ``budget_share=1``, run as in ``hf``, with its
    numbers. ``pretrained`` may also be a loaded model, with its ``tokenizer``. The other arguments: docs/lm-eval.md.

    Raises InputError, in a sentence, for bad arguments, and for requests that a compressed cache has no answer to.
    """

    def __init__(self, **given: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--model grace_opt runs in one process; start it without accelerate launch or torchrun")
        arguments = parsed(given)
        model, tokenizer = _loaded(arguments)
        with _without_remarks():
            super().__init__(pretrained=model, tokenizer=tokenizer, **arguments.theirs)
        self._about = arguments.about
        self._told = False  # why a context was held whole
        self._contexts = None if arguments.trial is None else Contexts(self.model, arguments.trial)
        if self._contexts is None:
            log.info("nothing is compressed at budget_share=1: results are those of --model hf")

    # ------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """As of ``hf``, task by task."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Requests of one context share its cache; those whose context is held whole go to ``hf``, in its batches."""
        if self._contexts is None:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for context, members in self._by_context(requests):
                found = self._contexts.likelihoods(context, [requests[i][2] for i in members])
                for i, answer in zip(members, found or (), strict=found is not None):
                    answers[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update()
        whole = [i for i in range(len(requests)) if i not in answers]
        if whole:
            scored = super()._loglikelihood_tokens([requests[i] for i in whole], disable_tqdm, override_bs)
            answers |= zip(whole, scored, strict=True)
        return [answers[i] for i in range(len(requests))]

    def _by_context(self, requests: Sequence[Request]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Context -> the requests that have it, the longest first. Too long ones lose their first tokens, as in hf."""
        assert self._contexts is not None
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError(
                    f"{self._contexts.task}: a continuation has no tokens, so there is nothing to score; mend the task"
                )
            kept = tuple(context[-max(1, self.max_length + 1 - len(continuation)) :])
            if kept not in groups and len(kept) < len(context):
                first = len(context) - len(kept)
                log.warning(
                    "a context is longer than the model's %d tokens; its first %d are cut", self.max_length, first
                )
            groups[kept].append(i)
        return sorted(groups.items(), key=lambda group: -len(group[0]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As of ``hf`` where nothing is compressed. Raises InputError where something would be."""
        if self._contexts is not None:
            names = ", ".join(sorted({str(each.task_name) for each in requests}))
            raise InputError(
                f"{names}: this task scores texts from their first token on (loglikelihood_rolling), so there is no "
                "context to compress; leave it out, give budget_share=1, or measure text with grace-opt evaluate"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    # ------------------------------------------------------------ generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As of ``hf``, task by task."""
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """int64[B, T + new] of padded contexts int64[B, T]: each row on a compressed cache of its own."""
        if self._contexts is None:
            return super()._model_generate(context, max_length, stop, **settings)
        if settings.get("num_beams", 1) != 1:
            raise InputError("a compressed context is continued by one beam; leave num_beams out of gen_kwargs")
        attended = settings.pop("attention_mask", torch.ones_like(context)).bool()
        new = max_length - context.shape[1]
        rows = [self._generated(row[real], new, stop, settings) for row, real in zip(context, attended, strict=True)]
        padded = context.new_full((len(rows), context.shape[1] + max(map(len, rows))), self.tokenizer.pad_token_id)
        for at, row in enumerate(rows):
            padded[at, : context.shape[1]] = context[at]
            padded[at, context.shape[1] : context.shape[1] + len(row)] = row
        return padded

    def _generated(self, row: Tensor, new: int, stop: list[str], settings: dict[str, Any]) -> Tensor:
        """The tokens that follow int64[T]."""
        assert self._contexts is not None
        with self._contexts.cache(row.tolist()) as found:
            more = {**settings, "attention_mask": torch.ones_like(row)[None]}
            if found is not None:
                more["past_key_values"] = found[1]
            made: Tensor = super()._model_generate(row[None], len(row) + new, stop, **more)
            return made[0, len(row) :]

    # ------------------------------------------------------------ what is said about it

    def _by_task(self, run: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
        """``run`` on the requests of each task, counted for it; in the order of the requests."""
        if self._contexts is None:
            return run(requests, disable_tqdm=disable_tqdm)
        tasks: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            tasks[str(request.task_name)].append(i)
        answers: dict[int, Any] = {}
        for task, members in tasks.items():
            self._contexts.task = task
            answers |= zip(members, run([requests[i] for i in members], disable_tqdm=disable_tqdm), strict=True)
            self._say(task)
        return [answers[i] for i in range(len(requests))]

    def _say(self, task: str) -> None:
        assert self._contexts is not None
        counts = self._contexts.counts[task]
        say = log.info if counts.compressed == counts.contexts else log.warning
        say("%s: %s", task, counts.sentence())
        if self._contexts.unreachable and not self._told:
            self._told = True
            log.warning("%s", self._contexts.unreachable)

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results: also what was asked for, and what was held."""
        counts = {} if self._contexts is None else self._contexts.counts
        total = sum(counts.values(), Counts()).record()
        tasks = {task: each.record() for task, each in counts.items()}
        return {**super().get_model_info(), "grace_opt": {**self._about, **total, "tasks": tasks}}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's database of answers (``--use_cache``), whose keys are texts alone.

        Raises InputError if its answers are of another model, method or budget.
        """
        database = cache_hook.dbdict
        if database is not None:
            ours = json.dumps(self._about, sort_keys=True, default=str)
            if _STAMP not in database and not len(database):
                database[_STAMP] = ours
            if database.get(_STAMP) != ours:
                raise InputError(
                    "the answers at --use_cache are of another model, method or budget; give another path, or delete it"
                )
        super().set_cache_hook(cache_hook)


if NAME not in model_registry:  # a release of lm-eval that reads entry points has it there
    register_model(NAME)(GraceOptLM)


def _loaded(arguments: Arguments) -> tuple[Any, Any]:
    """The model and its tokenizer, in the dtype and on the device that ``hf`` would take."""
    loading, bos = arguments.loading, arguments.theirs.get("add_bos_token")
    if not isinstance(loading["pretrained"], str):
        beside = [name for name in LOADING if name not in ("pretrained", "tokenizer") and loading.get(name) is not None]
        beside = [name for name in beside if name != "device"]  # lm-eval's command line may give it
        if beside or loading.get("tokenizer") is None:
            raise InputError("a model that is loaded goes with its tokenizer, and without dtype or trust_remote_code")
        return loading["pretrained"], loading["tokenizer"]
    if loading.get("tokenizer") is not None:
        raise InputError("the tokenizer is the model's own; leave tokenizer out")
    model, tokenizer = load_model(
        loading["pretrained"],
        dtype=str(loading.get("dtype") or "auto"),
        device=_device(str(loading.get("device") or "cuda:0")),
        trust_remote_code=bool(loading.get("trust_remote_code")),
    )
    if bos is not None:
        tokenizer.add_bos_token = bos  # as ``hf`` has it made
    return model, tokenizer


def _device(asked: str) -> str:
    """lm-eval's command line asks for cuda:0 where nobody did, and ``hf`` takes the CPU where there is none."""
    return "cpu" if asked == "cuda:0" and not torch.cuda.is_available() else asked


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Of a model that is loaded already ``hf`` remarks that arguments may be ignored; of those none is given."""
    theirs = logging.getLogger("lm_eval.models.huggingface")
    theirs.addFilter(_no_remark)
    try:
        yield
    finally:
        theirs.removeFilter(_no_remark)


def _no_remark(record: logging.LogRecord) -> bool:
    return "`pretrained`" not in record.getMessage()
