"""What ``--model_args`` say: which model, what becomes of its caches, and what is lm-eval's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grace_opt.compression.budget import Budget
from grace_opt.compression.mask_file import load_mask
from grace_opt.compression.method import METHODS, method, require_effect
from grace_opt.errors import InputError, did_you_mean
from grace_opt.evaluate.trial import Trial, mask_trial

LOADING = ("pretrained", "tokenizer", "dtype", "device", "trust_remote_code")
#: those of lm-eval's ``hf`` model that mean the same here
THEIRS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token", "prefix_token_id"),
    *("softmax_dtype", "enable_thinking", "think_end_token", "chat_template_args"),
)
COMPRESSION = ("method", "budget_share", "mask")
METHOD_OPTIONS = tuple(METHODS["grace-opt"].options())


@dataclass(frozen=True, eq=False)
class Arguments:
    """Parsed ``--model_args``.

    Attributes:
        trial: what is done to each context; None: nothing, the model runs as ``--model hf`` runs it.
        loading, theirs: arguments of `LOADING` and `THEIRS` that were given.
        about: what was asked for, for the results.
    """

    trial: Trial | None
    loading: dict[str, Any]
    theirs: dict[str, Any]
    about: dict[str, Any]


def parsed(given: Mapping[str, Any]) -> Arguments:
    """Raises InputError for what is unknown, contradicts itself or is out of range."""
    known = (*LOADING, *THEIRS, *COMPRESSION, *METHOD_OPTIONS)
    for name in given:
        if name not in known:
            raise InputError(f"--model grace_opt has no argument {name!r}{did_you_mean(name, known)}")
    if given.get("pretrained") in (None, ""):
        raise InputError("there is no model; give pretrained=MODEL, a hub id, a local folder, or smollm2-135m")
    loading, theirs, asked = (
        {name: given[name] for name in names if name in given} for names in (LOADING, THEIRS, COMPRESSION)
    )
    model = loading["pretrained"]
    loading["pretrained"] = model if hasattr(model, "config") else str(model)  # lm-eval makes numbers of digits
    options = {name: given[name] for name in METHOD_OPTIONS if name in given}
    trial, about = _of_mask(asked, options) if asked.get("mask") is not None else _of_method(asked, options)
    return Arguments(trial, loading, theirs, {"model": _name(loading["pretrained"]), **about})


def _of_mask(asked: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Trial, dict[str, Any]]:
    beside = [name for name in (*asked, *options) if name != "mask"]
    if beside:
        raise InputError(f"a mask says everything itself; leave out {' and '.join(beside)}, or the mask")
    path = str(asked["mask"])
    trial = mask_trial(path, load_mask(path))
    return trial, {"mask": path, "options": trial.options(), "sha256": trial.digest()}


def _of_method(asked: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Trial | None, dict[str, Any]]:
    if asked.get("budget_share") is None:
        raise InputError(
            "there is no budget; give budget_share=SHARE, what a context's cache may hold of its uncompressed bytes, "
            "or mask=FOLDER"
        )
    name, budget = str(asked.get("method", "grace-opt")), Budget(share=_share(asked["budget_share"]))
    made = method(name, options)
    if "offline_solver" in options:
        raise InputError("the method's option offline_solver is for bundles; solver is the one for prompts")
    require_effect(made, options, [budget])
    trial = Trial(name, made, budget)
    # The uncompressed cache is within the whole of its bytes.
    compresses = budget.share != 1
    return trial if compresses else None, {"method": name, "budget_share": budget.share, "options": trial.options()}


def _share(value: Any) -> float:
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"budget_share must be a number above 0 and at most 1, got {value!r}") from None


def _name(pretrained: Any) -> str:
    return pretrained if isinstance(pretrained, str) else str(pretrained.config.name_or_path)
