"""The Triton kernels on a card: every goal of theirs, passed or failed, in under eight minutes.

    python benchmarks/card.py [-o card.json] [--tests/--no-tests]

Prints a line for each goal and writes JSON with all figures. Bandwidth, the rival (dense SDPA) and the kernels are
measured in the same run, in CUDA graphs, so that no launch is waited for. Errors are those of the first and the last
row of a batch against the plain kernel over the same stored cache. Exit code 1 if a goal was missed, 2 where
there is no card that the kernels run on. `benchmarks/kernel.py --device cuda` prints its table alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

from grace_opt.compression.channels import Channels
from grace_opt.compression.integers import as_integers
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import LayerPlan
from grace_opt.heads import KINDS
from grace_opt.runtime.kernels import choose
from grace_opt.runtime.kernels.contract import Request
from grace_opt.runtime.kernels.plain import Plain
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.static import StaticPrunedLayer

Run = Callable[[], Any]
ROOT = Path(__file__).parents[1]
SHARE = 0.85  # of the copy bandwidth, at 16 x 32,768 tokens
WAYS = [(keys, values, bits) for bits in (0, 8, 4) for keys, values in ((48, 48), (56, 56), (64, 64), (48, 128))]
SMALL = [  # rows of the batch, tokens, kept of keys and values, bits
    *((1, 300, 48, 48, 0), (2, 333, 51, 77, 0), (3, 129, 128, 128, 0)),
    *((2, 700, 48, 48, 4), (1, 460, 64, 96, 8), (2, 5, 48, 48, 0)),
]
LAUNCHES = 6  # a layer and token
TOLERANCE = 3e-2  # of the largest output, both in bfloat16


@dataclass(frozen=True)
class Shape:
    """Rows of a batch, KV heads, query heads of each, tokens, channels, those kept of keys and values, bits."""

    batch: int
    tokens: int
    keys: int
    values: int
    bits: int = 0
    heads: int = 8
    group: int = 4
    channels: int = 128


@dataclass
class Report:
    """What was measured, and which goals were met."""

    figures: dict[str, Any] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def goal(self, name: str, met: bool | None, said: str) -> None:
        """Note a goal and print it; None: it could not be tried."""
        self.goals.append({"goal": name, "met": met, "said": said})
        print(f"{ {True: 'pass', False: 'FAIL', None: 'not run'}[met]:8}{name}: {said}", flush=True)


def filled(shape: Shape, device: str, dtype: torch.dtype, max_length: int | None = None) -> PrunedLayer:
    """A layer that holds a random prompt: 4 sinks, 128 recent tokens, static read-outs."""
    rng = np.random.default_rng(0)
    kept = dict(zip(KINDS, (shape.keys, shape.values), strict=True))
    codecs = {
        kind: [as_integers(_channels(rng, width, shape.channels), shape.bits, kind) for _ in range(shape.heads)]
        for kind, width in kept.items()
    }
    plan = LayerPlan(0, codecs, Windows(recent_window=128, sinks=4, generated="prune"))
    layer = PrunedLayer(plan) if max_length is None else StaticPrunedLayer(plan, max_length)
    keys, values = (_random(shape, shape.heads, shape.tokens, device, dtype) for _ in range(2))
    layer.update(keys, values)
    layer.begin(_random(shape, shape.heads * shape.group, 1, device, dtype), 1.0, None)
    layer.done()
    return layer


def _channels(rng: np.random.Generator, width: int, channels: int) -> Channels:
    keep = np.sort(rng.choice(channels, width, replace=False))
    rest = channels - width
    return Channels.keeping(keep, channels, 0.1 * rng.normal(size=(rest, width)), rng.normal(size=rest))


def _random(shape: Shape, heads: int, tokens: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape.batch, heads, tokens, shape.channels, device=device, dtype=dtype)


States = Sequence[torch.Tensor]


def states(shape: Shape, device: str, dtype: torch.dtype) -> States:
    """Query, key and value of one token."""
    return [_random(shape, heads, 1, device, dtype) for heads in (shape.heads * shape.group, shape.heads, shape.heads)]


def step(layer: PrunedLayer, new: States, kernel: Any = None) -> torch.Tensor:
    """One decoded token of a layer, by the first kernel that takes it if none is given: [B, Hq, 1, D]."""
    query, keys, values = new
    handle, _ = layer.update(keys, values)
    layer.follow(handle, None)
    request = Request(query, handle, None, query.shape[-1] ** -0.5)
    out: torch.Tensor = (kernel or choose.choose(request)).attend(request)
    layer.done()
    return out


def error(layer: PrunedLayer, new: States) -> float:
    """Largest difference of a step to the plain kernel's in the first and last row; a share of the largest output."""
    rows = torch.tensor([0, layer.batch - 1], device=layer.device)
    other = deepcopy(layer)
    other.batch_select_indices(rows)
    exact = step(other, [each[rows] for each in new], Plain()).float()
    return float((step(layer, new)[rows].float() - exact).abs().max() / exact.abs().max())


def milliseconds(runs: Sequence[Run], repeats: int = 20) -> float:
    """Median time of one run, on a card. The runs follow one another in a CUDA graph, so that no launch is waited for;
    each has buffers of its own, so that the L2 cache serves none of them."""
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


def sets(nbytes: int) -> int:
    """So many caches that all of them are four times the L2 cache."""
    return max(1, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / nbytes))


def records(
    batches: Sequence[int], tokens: int, ways: Sequence[tuple[int, int, int]], bandwidth: float
) -> Iterator[dict[str, Any]]:
    """A row for dense SDPA and each way of storing the cache: a layer's step, its bytes, and the share of the copy."""
    of: Any = {"device": "cuda", "dtype": torch.bfloat16}
    for batch in batches:
        shape = Shape(batch, tokens, 128, 128)
        query = states(shape, **of)[0]
        whole = 2 * shape.heads * batch * tokens * shape.channels * 2
        pairs = [[_random(shape, shape.heads, tokens, **of) for _ in range(2)] for _ in range(sets(whole))]
        attend = partial(scaled_dot_product_attention, enable_gqa=True)
        dense = milliseconds([partial(attend, query, *pair) for pair in pairs])
        yield _record("dense, SDPA", shape, dense, whole, bandwidth, dense, None)
        del pairs
        for keys, values, bits in ways:
            shape = Shape(batch, tokens, keys, values, bits)
            layers = [filled(shape, **of)]
            nbytes = batch * shape.heads * sum(side.codec.nbytes(tokens, 2) for side in layers[0].sides)
            layers += [filled(shape, **of) for _ in range(sets(nbytes) - 1)]
            new = states(shape, **of)
            wrong = error(layers[0], new)
            time = milliseconds([partial(step, each, new) for each in layers])
            name = f"keys {keys}, values {values}, {f'int{bits}' if bits else 'bf16'}"
            yield _record(name, shape, time, nbytes, bandwidth, dense, wrong)


def _record(
    what: str, shape: Shape, time: float, nbytes: int, bandwidth: float, dense: float, wrong: float | None
) -> dict[str, Any]:
    rate = nbytes / time * 1e3
    shares = {"GB/s": rate / 1e9, "of copy": rate / bandwidth, "speed-up": dense / time, "error": wrong}
    return {"what": what, "batch": shape.batch, "tokens": shape.tokens, "ms": time, "MB": nbytes / 1e6} | shares


def judged(report: Report, rows: Sequence[dict[str, Any]], batch: int) -> None:
    """The goals of `records`: the bandwidth in a full batch, and errors everywhere."""
    for row in rows:
        if row["error"] is None:
            continue
        name = f"{row['what']}, {row['batch']} x {row['tokens']}"
        report.goal(
            f"{name}: error", row["error"] <= TOLERANCE, f"{row['error']:.1e} of the output, {TOLERANCE} at most"
        )
        if row["batch"] == batch:
            said = f"{row['of copy']:.2f} of copies, {SHARE} at least; {row['speed-up']:.2f} times as fast as SDPA"
            report.goal(f"{name}: bandwidth", row["of copy"] >= SHARE, said)


def small(report: Report, device: str, dtype: torch.dtype) -> None:
    """Small shapes against the plain kernel: what a sanitiser looks at."""
    for each in SMALL:
        shape = Shape(*each, heads=2)
        layer = filled(shape, device, dtype)
        wrong = error(layer, states(shape, device, dtype))
        report.goal(f"small shape {each}", wrong <= TOLERANCE, f"{wrong:.1e} of the output")


def parts(report: Report, shape: Shape) -> None:
    """Whether the number of splits that the host chooses is the best, to within a twentieth."""
    from grace_opt.runtime.kernels import triton

    layer, of = filled(shape, "cuda", torch.bfloat16), {}
    new, decode = states(shape, "cuda", torch.bfloat16), triton.decode
    for count in (None, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        triton.decode = lambda *given, c=count: decode(*given, parts=c)
        of[str(count)] = milliseconds([partial(step, layer, new)], 10)
    triton.decode = decode
    best = min(of, key=lambda each: of[each])
    report.figures[f"splits of {shape.batch} x {shape.tokens}"] = of
    said = f"{of['None']:.3f} ms chosen, {of[best]:.3f} ms of {best}"
    report.goal(f"splits of {shape.batch} x {shape.tokens}", of["None"] <= 1.05 * of[best], said)


def far_apart(report: Report) -> None:
    """A cache of more than 2^31 elements; the last row of the batch lies behind them."""
    shape = Shape(20, 300_000, 48, 48)
    layer = filled_in_parts(shape)
    wrong = error(layer, states(shape, "cuda", torch.bfloat16))
    report.goal("offsets beyond 2^31", wrong <= TOLERANCE, f"{wrong:.1e} of the output")


def filled_in_parts(shape: Shape) -> PrunedLayer:
    """As `filled`, a chunk of the prompt at a time, so that whole keys and values need no room."""
    chunk = 10_000
    layer = filled(replace(shape, tokens=chunk), "cuda", torch.bfloat16)
    for side in layer.sides:
        side.buffer.reserve(shape.tokens)
    for at in range(chunk, shape.tokens, chunk):
        for side in layer.sides:
            rows = torch.randn(shape.batch, shape.heads, chunk, side.codec.width, device="cuda", dtype=torch.bfloat16)
            side.buffer.put(rows, at)
    layer.length = shape.tokens
    return layer


def captured(report: Report) -> None:
    """A step of a preallocated layer: nothing waits for the device, few launches, the same when replayed."""
    shape = Shape(2, 2048, 48, 48)
    layer, other = (filled(shape, "cuda", torch.bfloat16, 4096) for _ in range(2))
    news = [states(shape, "cuda", torch.bfloat16) for _ in range(6)]
    worst = torch.zeros((), device="cuda", dtype=torch.bfloat16)
    for one in (layer, other):
        step(one, news[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(layer, news[1])
        step(other, news[1])
        graph, held = torch.cuda.CUDAGraph(), [each.clone() for each in news[2]]
        with torch.cuda.graph(graph):
            out = step(layer, held)
        for new in news[2:]:
            for to, each in zip(held, new, strict=True):
                to.copy_(each)
            graph.replay()
            exact = step(other, new)
            worst = torch.maximum(worst, (out - exact).abs().max())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    report.figures["kernels of a step"] = kernels
    report.goal("launches of a layer's step", len(kernels) <= LAUNCHES, f"{len(kernels)}, {LAUNCHES} at most")
    report.goal("a captured step, replayed", float(worst) == 0.0, f"off by {float(worst):.1e}")


def sanitised(report: Report) -> None:
    """The small shapes under compute-sanitizer, if it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.goal("compute-sanitizer", None, "it is not installed")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--only-small"]
    report.goal("compute-sanitizer", *_done(command, 120))


def tested(report: Report) -> None:
    """The kernels' tests, on the card."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests/runtime/kernels/test_triton.py")]
    report.goal("tests of the kernels", *_done(command, 150))


def _done(command: list[str], seconds: int) -> tuple[bool, str]:
    """Whether a command ends well in time, and its last line."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "0"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done in {seconds} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def refusal() -> str | None:
    """Why this machine's card cannot be measured; None if it can."""
    if not torch.cuda.is_available():
        return "this script measures kernels on a CUDA card and this machine has none; run it on one"
    try:
        from grace_opt.runtime.kernels import triton
    except ImportError:
        return "Triton is not installed; it comes with CUDA builds of torch on Linux"
    why = triton.missing(torch.empty(1, device="cuda"))
    return why and f"the kernels cannot run on this card: {why}"


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="where the figures go")] = Path("card.json"),
    tests: Annotated[bool, typer.Option(help="run the kernels' tests and the sanitiser too")] = True,
    only_small: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure, print and write."""
    if why := refusal():
        typer.echo(why, err=True)
        raise typer.Exit(2)
    report, began = Report(), time.perf_counter()
    with torch.inference_mode():
        small(report, "cuda", torch.bfloat16)
        if not only_small:
            _all(report, tests)
    report.figures["seconds"] = time.perf_counter() - began
    missed = [each["goal"] for each in report.goals if each["met"] is False]
    if not only_small:
        output.write_text(json.dumps(vars(report), indent=1), encoding="utf-8")
        print(f"{len(missed)} of {len(report.goals)} goals missed; figures: {output}")
    raise typer.Exit(1 if missed else 0)


def _all(report: Report, tests: bool) -> None:
    card = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    report.figures |= {"card": card.name, "torch": torch.__version__, "copy GB/s": bandwidth / 1e9}
    print(f"{card.name}, torch {torch.__version__}, copies at {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = list(records((1, 16), 32768, WAYS, bandwidth))
    report.figures["rows"] = rows
    judged(report, rows, 16)
    for batch in (1, 16):
        parts(report, Shape(batch, 32768, 48, 48))
    captured(report)
    far_apart(report)
    after = copy_bandwidth()
    report.figures["copy GB/s, at the end"] = after / 1e9
    steady = abs(after / bandwidth - 1) < 0.05
    report.goal("a steady card", steady, f"copies at {after / bandwidth:.2f} of what they were")
    if tests:
        tested(report)
        sanitised(report)


if __name__ == "__main__":
    typer.run(main)
