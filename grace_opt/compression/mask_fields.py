"""What fields and tensors of a mask file may hold, bounded before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grace_opt.compression.mask import Keep
from grace_opt.errors import InputError
from grace_opt.heads import HEADS

TEXT_LIMIT = 4096  #: characters of a name


def whole(value: Any, name: str) -> int:
    """A count of the file, bounded before anything is made of it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise InputError(f"the mask's {name} must be a whole number from 0 to {2**31 - 1}, got {value!r}")
    return value


def text(value: Any, name: str) -> str:
    """A name of the file, as long as names are."""
    if not isinstance(value, str) or len(value) > TEXT_LIMIT:
        raise InputError(f"the mask's {name} must be a text of up to {TEXT_LIMIT} characters; make it again")
    return value


def keep_of(tensors: Mapping[str, np.ndarray], prefix: str, heads: int | None, used: set[str]) -> Keep:
    """The kept channels of each of a layer's heads; so many, if that is known."""
    name = f"{prefix}.keep"
    keep = tensors[name]
    used |= {name, f"{prefix}.offsets"}
    if not np.issubdtype(keep.dtype, np.integer):
        raise InputError(f"the mask's tensor {name} must hold whole numbers, not {keep.dtype}")
    if keep.size and not 0 <= keep.min() <= keep.max() <= np.iinfo(np.int32).max:
        raise InputError(f"the mask's tensor {name} holds channel {keep.max()}, which is out of range; make it again")
    offsets = None if keep.ndim == 2 else tensors.get(f"{prefix}.offsets")
    count = len(keep) if keep.ndim == 2 else 0 if offsets is None else len(offsets) - 1
    if count > HEADS or (heads is not None and count != heads):
        raise InputError(f"the mask's tensor {name} is for {count} KV heads, not for {heads or f'up to {HEADS}'}")
    if keep.ndim == 2:
        return tuple(keep.astype(np.int32))
    sound = keep.ndim == 1 and offsets is not None and offsets.ndim == 1 and np.issubdtype(offsets.dtype, np.integer)
    ends = offsets.astype(np.int64) if sound and offsets is not None else np.array([-1])
    if ends[0] != 0 or ends[-1] != len(keep) or (np.diff(ends) < 0).any():
        raise InputError(f"the mask's tensors {prefix}.keep and .offsets do not fit together; make the mask again")
    return tuple(np.split(keep.astype(np.int32), ends[1:-1]))
