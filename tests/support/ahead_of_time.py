"""Compile what `decode` launches for a card that is not there, and look at the machine code.

    TRITON_INTERPRET=0 python -m tests.support.ahead_of_time '{"sm": 90, "cases": [{"dk": 48, "dv": 48}]}'

`decode` itself runs, on CPU tensors, under a driver of Triton that only names a target; each launch is compiled and not
made. So what is examined is what the real host code asks for. Prints a list of records as JSON, one a kernel.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from grace_opt.compression.codec import Whole as Rows
from grace_opt.compression.tiles import BLOCK, Tiles
from grace_opt.runtime.kernels import triton as host
from grace_opt.runtime.kernels import triton_card
from grace_opt.runtime.kernels.triton import Codes, Stored, Whole

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CARDS = {  # multiprocessors; shared memory of a program, and of a multiprocessor
    80: triton_card.Card(108, 166912, 167936),
    86: triton_card.Card(84, 101376, 102400),
    90: triton_card.Card(132, 232448, 233472),
}
BYTES_A_CYCLE = 12.95  # of a multiprocessor of an H100: 3.0 TB/s of copies, 1.755 GHz


class NoDriver:
    """Of no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True


def compiling(names: tuple[str, ...], found: list[tuple[str, Any]]) -> None:
    """Let each launch of these kernels of `decode` compile only, and note what it compiled."""
    for name in names:
        kernel = getattr(host, name)

        def wrapped(*args: Any, kernel: Any = kernel, grid: Any, warmup: bool, name: str = name, **kwargs: Any) -> None:
            compiled = type(kernel).run(kernel, *args, grid=grid, warmup=True, **kwargs)
            found.append((name, compiled.result() if hasattr(compiled, "result") else compiled))

        kernel.run = wrapped


def launch(
    dk: int,
    dv: int,
    dtype: str = "bfloat16",
    group: int = 4,
    width: int = 128,
    mask: str | None = None,
    device_length: bool = False,
    tokens: int = 4096,
    bits: int = 0,
) -> None:
    """One decoded token of 2 rows and 8 KV heads, with read-outs, 4 sinks and 128 recent tokens."""
    of: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    batch, heads = 2, 8
    sides = []
    for d in (dk, dv):
        pitch = -(-d // 8) * 8 if of["dtype"].itemsize == 2 else d
        rest = width - d
        axis: Any = "channel" if not sides else "token"
        codes = None
        if bits:
            held = [
                each[:, :, :0] for each in Tiles(Rows(d), bits, axis).pack(torch.zeros(batch, heads, 2, BLOCK, d, **of))
            ]  # type: ignore[arg-type]
            held = [each.new_empty(batch, heads, 60, *each.shape[3:]) for each in held]
            counts = torch.zeros(batch, dtype=torch.int32)
            codes = Codes(held[0], held[1], counts, bits, torch.empty(batch, heads, 4, d, **of))
        sides.append(
            Stored(
                torch.empty(batch, heads, tokens + 33, pitch, **of),
                d,
                torch.empty(batch, heads, 256, rest, **of),
                0,
                torch.empty(batch, heads, 4, rest, **of),
                torch.zeros(1, heads, width, dtype=torch.int64),
                torch.empty(1, heads, rest, d, **of) if rest else None,
                torch.empty(1, heads, rest, **of) if rest else None,
                torch.empty(batch, heads, 1, width, **of),
                codes=codes,
            )
        )
    given = {
        None: None,
        "bool": torch.ones(batch, tokens, dtype=torch.bool),
        "added": torch.zeros(batch, tokens, **of),
    }[mask]
    length = torch.tensor(tokens) if device_length else tokens
    query = torch.empty(batch, heads * group, 1, width, **of)
    host.decode(query, *sides, length, torch.zeros(batch, dtype=torch.int64), Whole(4, 128), given, 0.1)


def look(compiled: Any) -> dict[str, Any]:
    """What the machine code is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(TOOLS / "nvdisasm", "-c", file.name)
    registers, _, _, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)[0])
    if path := os.environ.get("DUMP"):
        Path(path).write_text(code)
    lines = [line for line in code.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_x)", line)]
    loop = _longest_loop(lines)
    counted = collections.Counter(filter(None, map(_operation, lines)))
    inside = collections.Counter(filter(None, map(_operation, loop)))
    return {
        "shared": compiled.metadata.shared,
        "registers": registers,
        "spills": local + _of(counted, "LDL|STL"),
        "loop": sum(inside.values()),
        "products": _of(inside, "HMMA"),
        "loads": {size: n for size in (1, 2, 4, 8, 16) if (n := _of(inside, "LDG", size))},
        "instructions": sum(counted.values()),
        "inside": dict(inside.most_common()),
    }


def _run(*command: Any) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _operation(line: str) -> str | None:
    found = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line)
    return found[1] if found else None


def _longest_loop(lines: list[str]) -> list[str]:
    """From a label to the branch back to it."""
    label = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = [
        lines[label[found[1]] : i + 1]
        for i, line in enumerate(lines)
        if (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and label.get(found[1], i) < i
    ]
    # code that waits ends in a branch to itself
    return max(loops, key=len, default=[])


def _of(counted: collections.Counter[str], pattern: str, size: int | None = None) -> int:
    return sum(n for name, n in counted.items() if re.match(pattern, name) and size in (None, _bytes(name)))


def _bytes(name: str) -> int:
    found = re.search(r"\.(128|64|U8|S8|U16|S16)\b", name)
    return {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[found[1]] if found else 4


def main() -> None:
    asked = json.loads(sys.argv[1])
    driver.set_active(NoDriver(GPUTarget("cuda", asked["sm"], 32)))
    for module in (host,):
        module.card_of = lambda device: CARDS[asked["sm"]]
    found: list[tuple[str, Any]] = []
    compiling(("prepare", "attend_far", "attend_codes", "merge"), found)
    records = []
    for case in asked["cases"]:
        found.clear()
        launch(**case)
        records += [{"case": case, "kernel": name, **look(compiled)} for name, compiled in found]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
