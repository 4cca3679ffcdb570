"""The decode kernel on a CPU: share of the read bandwidth, beside matrix products and dense SDPA in the same run.

`benchmarks/kernel.py --device cpu` prints it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grace_opt.compression.channels import Channels
from grace_opt.compression.integers import as_integers
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import LayerPlan
from grace_opt.heads import KINDS
from grace_opt.runtime.kernels import cpu, cpu_program
from grace_opt.runtime.kernels.contract import Request
from grace_opt.runtime.kernels.plain import Plain
from grace_opt.runtime.layer import PrunedLayer

COLD = 120e6  # bytes of all layers together, which no cache of a CPU holds


@dataclass(frozen=True)
class Shape:
    """KV heads, query heads of each, channels of a token, those kept of keys and of values, bits (0: as they are)."""

    heads: int
    group: int
    channels: int
    keys: int
    values: int
    bits: int = 0


SHAPES = [
    Shape(3, 3, 64, 24, 24),
    Shape(3, 3, 64, 26, 26),
    Shape(3, 3, 64, 64, 64),
    Shape(8, 4, 128, 48, 48),
    Shape(8, 4, 128, 128, 128),
    Shape(3, 3, 64, 32, 32, 4),
    Shape(8, 4, 128, 64, 64, 4),
    Shape(3, 3, 64, 32, 32, 8),
]


def records(tokens: int, dtype: torch.dtype, rounds: int = 15) -> list[dict[str, Any]]:
    """A record for each shape: milliseconds a layer, and bytes a second as a share of the read bandwidth."""
    found = []
    for shape in SHAPES:
        layers, whole = _layers(shape, tokens, dtype)
        read = sum(side.codec.nbytes(tokens, dtype.itemsize) for side in layers[0].sides) * shape.heads
        full = 2 * shape.heads * tokens * shape.channels * dtype.itemsize
        times = _in_turn(layers, whole, shape, rounds)
        bandwidth = _read_bandwidth()
        found.append(
            {
                **vars(shape),
                "read GB/s": bandwidth / 1e9,
                **{f"{name} ms": 1e3 * seconds for name, seconds in times.items()},
                "kernel share": read / times["kernel"] / bandwidth,
                "step share": read / times["step"] / bandwidth,
                "plain share": read / times["plain"] / bandwidth,
                "sdpa share": full / times["sdpa"] / bandwidth,
            }
        )
    return found


def _layers(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[list[PrunedLayer], list[tuple[Tensor, Tensor]]]:
    """Filled layers, more than caches hold, and a few whole keys and values for the rival."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    per_layer = shape.heads * tokens * (shape.keys + shape.values) * (shape.bits / 8 or dtype.itemsize)
    layers, wholes = [], []
    for i in range(max(3, int(COLD / per_layer))):
        codecs = {
            kind: [
                as_integers(
                    Channels.keeping(
                        np.sort(rng.choice(shape.channels, kept, replace=False)),
                        shape.channels,
                        0.1 * rng.normal(size=(shape.channels - kept, kept)),
                        np.zeros(shape.channels - kept),
                    ),
                    shape.bits,
                    kind,
                )
                for _ in range(shape.heads)
            ]
            for kind, kept in zip(KINDS, (shape.keys, shape.values), strict=True)
        }
        layer = PrunedLayer(LayerPlan(0, codecs, Windows(recent_window=128, sinks=4, generated="prune")))
        keys, values = (torch.randn(1, shape.heads, tokens, shape.channels).to(dtype) for _ in range(2))
        layer.update(keys, values)
        layer.begin(torch.randn(1, shape.heads * shape.group, 1, shape.channels).to(dtype), 1.0, None)
        layer.done()
        layers.append(layer)
        if i < max(3, COLD / (2 * keys.nbytes)):
            wholes.append((keys, values))
    return layers, wholes


def _in_turn(
    layers: Sequence[PrunedLayer], wholes: Sequence[tuple[Tensor, Tensor]], shape: Shape, rounds: int
) -> dict[str, float]:
    """Median seconds a layer: of the kernel alone, of the step around it, of matrix products, of dense SDPA."""
    kernel, plain, alone, work = cpu.CpuKernel(), Plain(), [0.0], cpu_program._run

    def timed_work(*arguments: Any) -> None:
        began = time.perf_counter()
        work(*arguments)
        alone[0] += time.perf_counter() - began

    def step(attend: Callable[[Request], Any]) -> float:
        total = 0.0
        for layer in layers:
            key, value, query = (
                torch.randn(1, heads, 1, shape.channels).to(layer.dtype)
                for heads in (shape.heads, shape.heads, shape.heads * shape.group)
            )
            began = time.perf_counter()
            handle, _ = layer.update(key, value)
            layer.follow(handle, None)
            attend(Request(query, handle, None, shape.channels**-0.5))
            layer.done()
            total += time.perf_counter() - began
        return total / len(layers)

    def sdpa() -> float:
        total = 0.0
        for keys, values in wholes:
            query = torch.randn(1, shape.heads * shape.group, 1, shape.channels).to(keys.dtype)
            began = time.perf_counter()
            scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            total += time.perf_counter() - began
        return total / len(wholes)

    times: dict[str, list[float]] = {"kernel": [], "step": [], "plain": [], "sdpa": []}
    cpu_program._run = timed_work
    try:
        with torch.inference_mode():
            for _ in range(2 + rounds):
                alone[0] = 0.0
                times["step"].append(step(kernel.attend))
                times["kernel"].append(alone[0] / len(layers))
                times["plain"].append(step(plain.attend))
                times["sdpa"].append(sdpa())
    finally:
        cpu_program._run = work
    return {name: statistics.median(each[2:]) for name, each in times.items()}


@numba.njit(fastmath=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum(array: Any) -> float:
    total = np.float32(0)
    for i in range(array.size):  # which LLVM vectorises
        total += array[i]
    return total


def _read_bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second that all threads together read, the best of several passes."""
    array, threads, best = np.ones(size // 4, np.float32), torch.get_num_threads(), float("inf")
    parts = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            began = time.perf_counter()
            list(pool.map(_sum, parts))
            best = min(best, time.perf_counter() - began)
    return size / best
