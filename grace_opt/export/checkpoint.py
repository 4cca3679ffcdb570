"""A model written as a checkpoint of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grace_opt.errors import InputError
from grace_opt.files import write_json

if TYPE_CHECKING:
    from grace_opt.export.target import Source


def save_checkpoint(source: Source, model: Any, folder: Path, **changes: Any) -> None:
    """Weights, tokenizer and configuration with some fields changed; the model's own configuration stays as it is.

    Raises InputError for a quantised model, whose weights are no longer the ones that were loaded.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(f"{source.name} is quantised, and is not saved anew; use the target hf-generate")
    before = copy.deepcopy(vars(model.config))
    try:
        model.save_pretrained(folder)
    finally:  # it notes down the model's class and dtype
        vars(model.config).clear()
        vars(model.config).update(before)
    cast(Any, source.tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | changes)
