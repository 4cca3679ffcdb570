"""What may be put into a model, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.models.config import stated, text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the first device that holds weights; the CPU if all of them are fetched when needed."""
    import torch

    devices = (weight.device for weight in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def embedding_rows(model: PreTrainedModel) -> int | None:
    """How many token ids the model knows, None if it does not say."""
    try:
        rows: Any = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        rows = None
    rows = rows or stated(text_config(model.config), "vocab_size")
    return rows if isinstance(rows, int) else None


def require_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Raise InputError if a token has no row in the model's embedding, which is an error of memory on some devices."""
    rows = embedding_rows(model)
    if rows is not None and ids and max(ids) >= rows:
        raise InputError(
            f"the text gives token {max(ids)} and the model knows {rows}, so the tokenizer is not the model's or this "
            "token was never trained; use the model's own tokenizer, or a text without it"
        )
