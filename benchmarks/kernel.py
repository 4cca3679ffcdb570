"""The decode kernel: time, bytes and bandwidth of one decoded token, against dense SDPA in the same run.

    python benchmarks/kernel.py [--batch 16] [--context 32768] [--ratio 0.5 --ratio 0.6] [-f json]
    python benchmarks/kernel.py --device cpu [--context 8192] [--dtype float32] [-f json]

On a CPU it prints a row for each shape of a layer (`cpu_kernel`). A card needs CUDA and Triton; there it prints one row
a way of storing the cache, after the card's own copy bandwidth. ``error`` is the largest difference to the formula in
float32. Kept widths are rounded to multiples of 8 channels, as 16-byte loads ask.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cpu_kernel
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grace_opt.compression.integers import quantise

if TYPE_CHECKING:
    from grace_opt.runtime.kernels.triton import Tokens

Run = Callable[[], Any]


def milliseconds(runs: Sequence[Run], repeats: int = 20) -> float:
    """Median time of one run. The runs follow one another in a CUDA graph, so that no launch is waited for; each has
    buffers of its own, so that the L2 cache serves none of them."""
    for run in runs:  # compiles, and fills the allocator
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(3 + repeats):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / len(runs))
    return statistics.median(times[3:])


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of the best of several copies of 1 GiB; two pairs in turn leave L2 nothing."""
    pairs = [[torch.randn(size // 4, device="cuda") for _ in range(2)] for _ in range(2)]
    best = min(milliseconds([lambda p=pair: p[0].copy_(p[1]) for pair in pairs]) for _ in range(3))
    return 2 * size / best * 1e3


class Cache:
    """One cache of random keys and values [B, H, T, D] and a query; ``arguments`` are those of `decode`."""

    def __init__(
        self, shape: tuple[int, ...], kept: tuple[int, int], group: int, whole: tuple[int, int], bits: int, **of: Any
    ) -> None:
        batch, heads, context, width = shape
        query = torch.randn(batch, heads, group, width, **of) / math.sqrt(width)
        self.arguments: dict[str, Any] = {
            "query": query[..., : kept[0]].contiguous(),
            "query_rows": query[..., kept[0] :].contiguous(),
            "keys": self._tokens(torch.randn(shape, **of), kept[0], whole, bits, "channel"),
            "values": self._tokens(torch.randn(shape, **of), kept[1], whole, bits, "token"),
            "length": context,
            "sinks": whole[0],
            "first": torch.zeros(batch, dtype=torch.int64, device=query.device),
            "mask": None,
        }

    @staticmethod
    def _tokens(x: Tensor, kept: int, whole: tuple[int, int], bits: int, axis: Literal["channel", "token"]) -> Tokens:
        """The first ``kept`` channels, as integers up to the window's last whole block if there are bits."""
        from grace_opt.runtime.kernels.triton import Tokens

        sinks, recent = whole
        context = x.shape[2]
        rows = torch.cat([x[:, :, :sinks, kept:], x[:, :, context - recent :, kept:]], 2)
        x = x[..., :kept].contiguous()
        if not bits:
            return Tokens(x, rows)
        blocks = (context - recent) // 32
        packed = quantise(x[:, :, : 32 * blocks].unflatten(2, (blocks, 32)), bits, axis)  # type: ignore[arg-type]
        return Tokens(x[:, :, 32 * blocks :].contiguous(), rows, packed)

    def nbytes(self) -> int:
        """What one decoded token must read of keys and values."""
        total = 0
        for tokens in (self.arguments["keys"], self.arguments["values"]):
            total += tokens.kept.nbytes + tokens.rows.nbytes + (tokens.packed.nbytes if tokens.packed else 0)
        return total

    def error(self, splits: int | None) -> float:
        """Largest absolute difference of the first row of the batch to the formula in float32."""
        from grace_opt.runtime.kernels.triton import decode

        of = self.arguments
        sinks, context = of["sinks"], of["length"]
        full = []
        for tokens in (of["keys"], of["values"]):
            kept = tokens.kept[:1].float()
            if tokens.packed:
                kept = torch.cat([tokens.packed.unpack()[:1].float().flatten(2, 3), kept], 2)
            rows = tokens.rows[:1].float()
            between = rows.new_zeros(*rows.shape[:2], context - rows.shape[2], rows.shape[3])
            full.append((kept, torch.cat([rows[:, :, :sinks], between, rows[:, :, sinks:]], 2)))
        scores = of["query"][:1].float() @ full[0][0].mT + of["query_rows"][:1].float() @ full[0][1].mT
        weights = scores.softmax(-1)
        got = decode(**of, splits=splits)
        return float((torch.cat(got, -1)[:1] - weights @ torch.cat(full[1], -1)).abs().max())


def dense(shape: tuple[int, ...], group: int, **of: Any) -> tuple[Run, int]:
    """Dense attention of one decoded token, and the bytes of its keys and values."""
    batch, heads, _, width = shape
    query = torch.randn(batch, heads * group, 1, width, **of)
    keys, values = torch.randn(shape, **of), torch.randn(shape, **of)
    return lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys.nbytes + values.nbytes


def main(
    device: str = "cuda",
    batch: int = 16,
    context: Annotated[int | None, typer.Option(help="32768 on a card, 8192 on a CPU if not given")] = None,
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    ratio: Annotated[list[float] | None, typer.Option(help="share of channels that is pruned")] = None,
    sinks: int = 4,
    recent: int = 128,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a card, float32 on a CPU if not given")] = None,
    splits: Annotated[int | None, typer.Option(help="the kernel's own choice if not given")] = None,
    format: Annotated[str, typer.Option("-f", "--format")] = "table",
) -> None:
    """Measure and print."""
    if device == "cpu":
        context, dtype = context or 8192, dtype or "float32"
        found = cpu_kernel.records(context, getattr(torch, dtype))
        show(found, list(found[0]), f"CPU, {torch.get_num_threads()} threads, {context} tokens, {dtype}", format)
        return
    context, dtype = context or 32768, dtype or "bfloat16"
    if not torch.cuda.is_available():
        typer.echo("this benchmark times a CUDA kernel and this machine has no CUDA device; run it on one", err=True)
        raise typer.Exit(2)
    from grace_opt.runtime.kernels.triton import decode

    of = {"device": "cuda", "dtype": getattr(torch, dtype)}
    shape = (batch, kv_heads, context, head_dim)
    card = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = [{"what": "device-to-device copy", "GB/s": bandwidth / 1e9}]

    def add(what: str, runs: list[Run], nbytes: int, error: float | None) -> None:
        time = milliseconds(runs)
        rows.append(
            {
                "what": what,
                "ms": time,
                "MB": nbytes / 1e6,
                "GB/s": nbytes / time / 1e6,
                "of copy": nbytes / time * 1e3 / bandwidth,
                "speed-up": (rows[1]["ms"] if len(rows) > 1 else time) / time,
                "error": error,
            }
        )

    def sets(nbytes: int) -> int:
        """So many caches that all of them are eight times the L2 cache."""
        return max(2, math.ceil(8 * card.L2_cache_size / nbytes))

    rivals = [dense(shape, group, **of) for _ in range(sets(2 * math.prod(shape) * of["dtype"].itemsize))]
    add("dense, SDPA", [run for run, _ in rivals], rivals[0][1], None)
    del rivals

    ways = [("dense, kernel", (head_dim, head_dim), 0)]
    for share in ratio or [0.5, 0.6]:
        kept = max(8, round((1 - share) * head_dim / 8) * 8)
        ways += [
            (f"keys {kept} of {head_dim}", (kept, head_dim), 0),
            (f"keys and values {kept} of {head_dim}", (kept, kept), 0),
            (f"keys {kept} of {head_dim}, int4", (kept, head_dim), 4),
            (f"keys and values {kept} of {head_dim}, int4", (kept, kept), 4),
        ]
    for what, widths, bits in ways:
        caches = [Cache(shape, widths, group, (sinks, recent), bits, **of)]
        nbytes = caches[0].nbytes()
        caches += [Cache(shape, widths, group, (sinks, recent), bits, **of) for _ in range(sets(nbytes) - 1)]
        error = caches[0].error(splits)
        add(what, [lambda c=each: decode(**c.arguments, splits=splits) for each in caches], nbytes, error)
        del caches

    title = f"{card.name}, {batch} x {kv_heads} KV heads of {group} queries, {context} tokens, {dtype}"
    show(rows, list(rows[1]), title, format)


def show(rows: list[dict[str, Any]], names: list[str], title: str, format: str) -> None:
    """Print the rows, as a table or as JSON."""
    if format == "json":
        print(json.dumps({"records": rows}))
        return
    table = Table(title=f"{title}, torch {torch.__version__}")
    for name in names:
        table.add_column(name, justify="left" if name == "what" else "right")
    for entry in rows:
        values = [entry.get(name) for name in names]
        table.add_row(*("" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in values))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
