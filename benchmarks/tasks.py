"""Scores of tasks at equal bytes, every method at the shares that it can reach, in one run.

    python benchmarks/tasks.py MODEL -o FOLDER [--length 4096] [--prompts 3] [--task ruler/vt ...] [-f markdown]

`grace-opt evaluate` asks each method at each share. Integers alone hold what they hold, so here a share has a list of
its own: an integer method stands at the least share that it stays below. A prompt is run once for all rows. FOLDER
keeps the answers (a killed run goes on), and the records.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from quality.study import show

from grace_opt import InputError, load_model
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate.measurements import Measurements
from grace_opt.evaluate.run import Plan, run
from grace_opt.evaluate.trial import Trial
from grace_opt.files import check_writable, write_json
from grace_opt.records import Measurement
from grace_opt.records_file import RecordsFile

ROWS = {
    0.6: ("int8",),
    0.52: ("think", "grace"),  # whose heads prune the same: in 16 bits by 8 channels, beside the windows
    0.5: ("grace-opt", "streaming"),
    0.35: ("int4",),
    0.3: ("int3",),
    0.27: ("think", "grace"),
    0.25: ("grace-opt", "streaming", "int2", "grace-opt+int4", "grace-opt+int3"),
    0.15: ("think", "grace-opt"),
    0.125: ("streaming", "grace-opt+int4", "grace-opt+int3", "grace-opt+int2"),
}
TASKS = ("ruler", "longeval/lines", "needle/single")


def main(
    model: Annotated[str, typer.Argument(help="As in grace-opt evaluate.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for answers and records.")],
    task: Annotated[list[str] | None, typer.Option(help="As in grace-opt evaluate; repeatable.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 4096,
    prompts: Annotated[int, typer.Option(help="Of each task.")] = 3,
    dtype: str = "float32",
    format: Annotated[str, typer.Option("-f", "--format", help="table, markdown or json.")] = "table",
) -> None:
    """Measure and print."""
    trials = [Trial(name, method(name), Budget(share=share)) for share, names in ROWS.items() for name in names]
    began = time.monotonic()

    def progress(words: str, done: int = 0, total: int = 0) -> None:
        if total and done * 50 // total > (done - 1) * 50 // total:
            print(f"{words}: {done} of {total}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    try:
        check_writable(output / "measurements.jsonl")
        loaded, tokenizer = load_model(model, dtype=dtype)
        with RecordsFile(output / "measurements.jsonl", Measurement, print) as file:
            plan = Plan(tuple(task or TASKS), (length,), prompts)
            records = run(loaded, tokenizer, trials, plan, Measurements(file), progress, print)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    write_json(output / "records.json", records)
    solved = [record["task"] for record in records if record["method"] == "full" and record["solved"]]
    print(f"solved by the uncompressed cache: {', '.join(dict.fromkeys(solved)) or 'none'}", file=sys.stderr)
    for protocol in ("query-aware", "context-only"):
        of = [record for record in records if record["protocol"] == protocol and record["task"] in solved]
        show(f"{protocol}, {length} tokens, {prompts} prompts a task", table(of), format)


def table(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each share and method, a column for each task: scores in percent."""
    rows: dict[tuple[Any, str], dict[str, str]] = {}
    for record in records:
        share = record["budget_share"]
        row = rows.setdefault(
            (share, record["method"]), {"share": "-" if share is None else f"{share:g}", "method": record["method"]}
        )
        row.setdefault("bytes %", f"{100 * record['bytes_per_token'] / record['full_bytes_per_token']:.1f}")
        name = record["task"].removeprefix("ruler/").removesuffix("/lines").removesuffix("/single")
        row[f"{name}, mean of {len(record['tasks'])}" if len(record["tasks"]) > 1 else name] = (
            f"{100 * record['score']['mean']:.0f}"
        )
    return list(rows.values())


if __name__ == "__main__":
    typer.run(main)
