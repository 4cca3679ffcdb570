"""Attention of one decoded token on a CPU: one pass over the cache by all threads, appending the token on the way.

The host's side: whether it can run here, and a task (`decode`) for each layer and token.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from grace_opt.compression.integers import Integers
from grace_opt.runtime.kernels.contract import Request, by_head, one_token
from grace_opt.runtime.kernels.cpu_program import FORMATS
from grace_opt.runtime.kernels.cpu_task import LayerTask, all_segments, new_token

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer

SHORTEST = 256  # tokens; a shorter cache is read by torch before this kernel would be loaded
_NEEDED = ("avx2", "fma", "f16c")


@cache
def missing() -> str | None:
    """Why the kernel cannot run on this machine; None if it can."""
    if find_spec("numba") is None:
        return "it is compiled by numba, which is not installed"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it was tried on x86-64 only, and this is {platform.machine()}"
    import llvmlite.binding

    has = llvmlite.binding.get_host_cpu_features()
    lacking = [each for each in _NEEDED if not has.get(each)]
    return f"it needs a CPU with {', '.join(_NEEDED)}, and this one lacks {', '.join(lacking)}" if lacking else None


class CpuKernel:
    """Channels, whole rows, or what any codec makes of them; floating point or integers of 2, 4 or 8 bits."""

    name = "cpu"

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[PrunedLayer, LayerTask] = WeakKeyDictionary()

    def __deepcopy__(self, memo: object) -> CpuKernel:
        return self  # a copy of a layer is read by the same kernel

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True on a CPU with AVX2 and FMA, for what the kernel can decode."""
        bits = [side.bits for side in layer.sides]
        if (answer := by_head(layer)) is not True:
            return answer
        if layer.first.device.type != "cpu" or layer.offloading:
            return "it reads what lies in the memory of a CPU"
        if layer.dtype not in FORMATS:
            return f"it reads {', '.join(FORMATS.values())}, not {str(layer.dtype).removeprefix('torch.')}"
        if 3 in bits or any(side.codec.block and type(side.codec) is not Integers for side in layer.sides):
            return "it unpacks integers of 2, 4 or 8 bits only"
        if layer.extra is not None:
            return "it knows no whole tokens but sinks and the recent window"
        return missing() or True

    def takes(self, request: Request) -> bool | str:
        """True for one token of each row, outside of training, if the model did not change the values."""
        if (answer := one_token(request)) is not True:
            return answer
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "it has no gradient, and is not compiled into a graph"
        if request.handle.layer.columns < SHORTEST:
            return f"a cache of fewer than {SHORTEST} tokens is read by torch"
        return True

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, 1, Dv]; stores the new token if it was not stored yet."""
        handle, layer = request.handle, request.handle.layer
        known = self._layers.get(layer)
        if known is None or not known.describes(layer):
            known = self._layers[layer] = LayerTask(layer, request.query.shape[1])
        for i, side in enumerate(known.program.sides):
            if not side.native:
                handle.store(i)
        length = int(layer.length)
        states = [each if each is None or each.stride(3) == 1 else each.contiguous() for each in handle.pending]
        places = [0 if states[i] is None else side.window.place(length) for i, side in enumerate(layer.sides)]
        held = known.held(layer)  # room was made
        new = [new_token(layer.sides[i], held[i], states[i], places[i], length) for i in (0, 1)]
        segments, count = all_segments(layer, held, length)
        at = segments.buffer_info()[0], count
        out = known.program.attend(request.query, at, length, request.scaling, new, _bias(request.mask))
        handle.pending = [None, None]
        return out


def _bias(mask: Tensor | None) -> Tensor | None:
    """float32 [B or 1, slots], to be added to scores; finite, so that a row of padding alone is no NaN."""
    if mask is None:
        return None
    row, lowest = mask[:, 0, 0], torch.finfo(torch.float32).min
    if row.dtype == torch.bool:
        return torch.zeros(row.shape).masked_fill_(~row, lowest)
    return row.float().clamp(min=lowest).contiguous()
