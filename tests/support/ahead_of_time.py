"""Compile what `decode` launches for a card that is not there, and look at the machine code.

    TRITON_INTERPRET=0 python -m tests.support.ahead_of_time \\
        '{"sm": 90, "cases": [{"dk": 48, "dv": 48}], "kernels": ["attend_far"]}'

`decode` itself runs, on CPU tensors, under a driver of Triton that only names a target; each launch is compiled and not
made. So what is examined is what the real host code asks for. Prints a list of records as JSON, one a kernel.
"""

from __future__ import annotations

import collections
import json
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
BYTES_A_CYCLE = 12.95  # that a multiprocessor of an H100 copies: 3.0 TB/s of 132, at 1.755 GHz


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


def compiling(names: list[str], found: list[tuple[str, Any]]) -> None:
    """Let each launch of `decode` compile only, of these kernels, and note what it compiled."""
    for name in ("prepare", "attend_far", "attend_codes", "merge"):
        kernel = getattr(host, name)

        def wrapped(*args: Any, kernel: Any = kernel, grid: Any, warmup: bool, name: str = name, **kwargs: Any) -> None:
            if name not in names:
                return
            compiled = type(kernel).run(kernel, *args, grid=grid, warmup=True, **kwargs)
            found.append((name, compiled.result() if hasattr(compiled, "result") else compiled))

        kernel.run = wrapped


def stored(d: int, kind: int, width: int, tokens: int, bits: int, of: dict[str, Any]) -> Stored:
    """Of 2 rows and 8 heads: a random read-out, 4 sinks and a ring of 256 tokens."""
    batch, heads, rest = 2, 8, width - d
    pitch = -(-d // 8) * 8 if of["dtype"].itemsize == 2 else d
    codes = None
    if bits:
        axis: Any = ("channel", "token")[kind]
        like = Tiles(Rows(d), bits, axis).pack(torch.zeros(1, 1, 2, BLOCK, d, **of))  # type: ignore[arg-type]
        held = [each.new_empty(batch, heads, tokens // BLOCK, *each.shape[3:]) for each in like]
        head = torch.empty(batch, heads, 4, d, **of)
        codes = Codes(held[0], held[1], torch.zeros(batch, dtype=torch.int32), bits, head)
    return Stored(
        torch.empty(batch, heads, tokens + 33, pitch, **of),  # an odd number of rows: nothing is aligned by chance
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


def launch(
    dk: int,
    dv: int,
    dtype: str = "bfloat16",
    group: int = 4,
    width: int = 128,
    mask: str | None = None,
    device_length: bool = False,
    bits: int = 0,
) -> dict[str, int]:
    """One decoded token of 2 rows and 8 KV heads at 4096 tokens; what the host expects of the far kernel."""
    of: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    tokens, batch, heads = 4096, 2, 8
    keys, values = (stored(d, kind, width, tokens, bits, of) for kind, d in enumerate((dk, dv)))
    masks = {
        None: None,
        "bool": torch.ones(batch, tokens, dtype=torch.bool),
        "added": torch.zeros(batch, tokens, **of),
    }
    length = torch.tensor(tokens) if device_length else tokens
    query = torch.empty(batch, heads * group, 1, width, **of)
    first = torch.zeros(batch, dtype=torch.int64)
    host.decode(query, keys, values, length, first, Whole(4, 128), masks[mask], 0.1)
    tile, _ = host.tiles_of(keys, values)
    rows = tile.tokens * (keys.padded + values.padded) * of["dtype"].itemsize
    return {"tile": tile.nbytes if bits else rows, "most_shared": tile.shared}


def look(compiled: Any) -> dict[str, Any]:
    """What the machine code is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(TOOLS / "nvdisasm", "-c", file.name)
    registers, _, _, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)[0])
    lines = [line for line in code.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_x)", line)]
    loop = _longest_loop(lines)
    counted = collections.Counter(filter(None, map(_operation, lines)))
    inside = collections.Counter(filter(None, map(_operation, loop)))
    return {
        "shared": compiled.metadata.shared,
        "registers": registers,
        "spills": local + _of(counted, "LDL|STL"),
        "loop": sum(inside.values()),
        "warps": compiled.metadata.num_warps,
        "loads": {size: n for size in (1, 2, 4, 8, 16) if (n := _of(inside, "LDG", size))},
        "instructions": sum(counted.values()),
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
    host.card_of = lambda device: CARDS[asked["sm"]]
    found: list[tuple[str, Any]] = []
    compiling(asked["kernels"], found)
    records = []
    for case in asked["cases"]:
        found.clear()
        expected = launch(**case)
        for name, compiled in found:
            record = look(compiled)
            cycles = record["loop"] * record["warps"] / 4  # a multiprocessor issues four instructions a cycle
            record["issue"] = expected["tile"] / BYTES_A_CYCLE / cycles
            records.append({"case": case, "kernel": name} | expected | record)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
