"""Attention of one decoded token on a CPU: one pass over the cache by all threads, appending the token on the way.

The host's side: whether it can run here, and a task (`decode`) for each layer and token.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from array import array
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.integers import Integers
from grace_opt.runtime.kernels.contract import Request, one_token
from grace_opt.runtime.kernels.cpu_task import FORMATS, LayerTask, all_segments, bits_of, new_token

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer

SHORTEST = 256  # tokens; a shorter cache is read by torch before this kernel would be loaded
_SHARE = 512  # tokens of a KV head that are worth a thread's while
_SMALL = 1 << 17  # bytes that one thread reads before others would have begun
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
        self._scratch = threading.local()  # threads may run models side by side

    def __deepcopy__(self, memo: object) -> CpuKernel:
        return self  # a copy of a layer is read by the same kernel

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True on a CPU with AVX2 and FMA, for what the kernel can decode."""
        bits = [side.bits for side in layer.sides]
        if layer.first.device.type != "cpu" or layer.offloading:
            return "it reads what lies in the memory of a CPU"
        if layer.dtype not in FORMATS:
            return f"it reads {', '.join(FORMATS.values())}, not {str(layer.dtype).removeprefix('torch.')}"
        if 3 in bits or any(side.codec.block and not isinstance(side.codec, Integers) for side in layer.sides):
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
        handle, query = request.handle, request.query
        layer, pending = handle.layer, handle.pending
        known = self._layers.get(layer)
        if known is None or not known.describes(layer):
            known = self._layers[layer] = LayerTask(layer, query.shape[1])
        keys, values = known.sides
        batch, heads, group = layer.batch, known.heads, known.group
        if not keys.native:
            handle.store(0)
            both = keys.codec.asked(query.reshape(batch, heads, group, query.shape[-1]))
            query = torch.cat(both, dim=-1).view(batch, heads * group, 1, -1)
        if not values.native:
            handle.store(1)
        query = query if query.stride(3) == 1 else query.contiguous()
        length, element = int(layer.length), query.element_size()
        out = query.new_empty(batch, 1, heads * group, values.width + values.residual)
        bias = _bias(request.mask)

        states = [each if each is None or each.stride(3) == 1 else each.contiguous() for each in pending]
        places = [0 if states[i] is None else side.window.place(length) for i, side in enumerate(layer.sides)]
        held = known.held(layer)  # room was made
        new = [new_token(layer.sides[i], held[i], states[i], places[i], length) for i in (0, 1)]
        segments, count = all_segments(layer, held, length)
        threads, pieces = _shares(batch * heads, length, known.row_bytes)
        items, floats = batch * heads * pieces, known.scratch_floats
        scratch, done = self._room(items * floats, batch * heads)
        fields = (
            *(0, items, pieces, heads, group, known.queries),
            *(segments.buffer_info()[0], count, scratch, floats, done),
            *(query.data_ptr(), query.stride(0) * element, query.stride(1) * element),
            *(out.data_ptr(), out.stride(0) * element, out.stride(2) * element),
            *((0, 0) if bias is None else (bias.data_ptr(), 4 * bias.stride(0) if len(bias) > 1 else 0)),
            *(bits_of(request.scaling), *keys.constants, *new[0], *values.constants, *new[1]),
        )
        task = array("q", fields)
        _run(known.work, task.buffer_info()[0], threads)
        handle.pending = [None, None]
        out = out.transpose(1, 2)
        if values.native:
            return out
        sums = out.reshape(batch, heads, group, -1)
        whole = sums[..., values.width :] if values.residual else None
        return values.codec.read(sums[..., : values.width], whole).view(batch, heads * group, 1, -1)

    def _room(self, floats: int, heads: int) -> tuple[int, int]:
        """Addresses of this thread's memory: at least so many float32, and a zero for each head."""
        held = getattr(self._scratch, "held", None)
        if held is None or held[0].size < floats or held[1].size < heads:
            held = self._scratch.held = np.empty(floats, np.float32), np.zeros(heads, np.int64)
            self._scratch.addresses = held[0].ctypes.data, held[1].ctypes.data
        addresses: tuple[int, int] = self._scratch.addresses
        return addresses


def _bias(mask: Tensor | None) -> Tensor | None:
    """float32 [B or 1, slots], to be added to scores; finite, so that a row of padding alone is no NaN."""
    if mask is None:
        return None
    row, lowest = mask[:, 0, 0], torch.finfo(torch.float32).min
    if row.dtype == torch.bool:
        return torch.zeros(row.shape).masked_fill_(~row, lowest)
    return row.float().clamp(min=lowest).contiguous()


def _shares(heads: int, tokens: int, row_bytes: int) -> tuple[int, int]:
    """Threads, and pieces that the tokens of a head are cut into."""
    threads = torch.get_num_threads()
    if threads == 1 or heads * tokens * row_bytes < _SMALL:
        return 1, 1
    return threads, max(1, min(-(-4 * threads // heads), tokens // _SHARE))


@cache
def _team() -> Callable[..., None] | None:
    """libgomp's way to run a function by torch's own threads; None where torch brings another library."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_void_p] * 2 + [ctypes.c_uint] * 2, None
        found: Callable[..., None] = function
        return found
    return None


@cache
def _alone(work: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(work)


def _run(work: int, task: int, threads: int) -> None:
    team = _team() if threads > 1 else None
    if team is None:
        _alone(work)(task)
    else:
        team(work, task, threads, 0)
