"""The whole path on a real model in one call: calibrate, solve, apply, generate, beside ThinK and GRACE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import mask_from_solutions, problems_of
from grace_opt.compression.mask_file import save_mask
from grace_opt.compression.method import METHODS
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.files import write_json
from grace_opt.graphs import save_bundle
from grace_opt.graphs.calibrate import Calibration, calibrate
from grace_opt.models.inputs import input_device, require_rows
from grace_opt.models.texts import DEFAULT_TEXT, prose, read_pieces, token_windows
from grace_opt.reports.kept_channels import kept_channels
from grace_opt.solution import Limits, Solver
from grace_opt.solve import solve_many

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedModel

    from grace_opt.runtime.generate import Forced


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured (one record a cache, the full one first) and the picture it drew."""

    records: list[dict[str, Any]]
    picture: Path

    def table(self) -> Table:
        """The one table."""
        from rich import box
        from rich.table import Table

        first = self.records[0]
        title = f"{first['model']}, {first['prompt_tokens']} prompt tokens, {first['new_tokens']} new ones"
        table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
        for name in ("cache", "keys kept", "cache bytes", "KL/token", "agree", "prefill", "per token"):
            table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
        for record in self.records:
            table.add_row(
                str(record["cache"]),
                f"{record['kept_channels']:g} of {record['head_dim']}",
                f"{record['cache_bytes'] / 1e6:.1f} MB ({record['cache_bytes'] / first['cache_bytes']:.0%})",
                f"{record['kl']:.4f}",
                f"{record['agree']} of {record['new_tokens']}",
                f"{record['prefill_seconds']:.1f} s",
                f"{record['decode_seconds'] / record['new_tokens'] * 1e3:.0f} ms",
            )
        return table


def run(
    model_name: str,
    load: Callable[[], tuple[Any, Any]],
    folder: Path,
    *,
    ratio: float,
    solver: Solver,
    limits: Limits,
    text: str | None,
    calibration: Calibration,
    context: int,
    new_tokens: int,
    progress: Callable[[str, int, int], None],
) -> DemoResult:
    """Calibrate a model, solve at ``ratio``, generate from a long prompt with the full and with pruned caches.

    ``load`` gives the model and its tokenizer. ``think`` and ``grace`` choose their channels from the prompt, as they
    do; ``grace-opt`` is the calibrated mask that ``grace-opt solve`` makes. All have the calibration's windows, run on
    the same kind of cache and decode greedily (``text`` of a record, and its times). Then each is fed the full cache's
    tokens, so that ``kl`` (nats, mean over the new tokens) and ``agree`` (how often it would have chosen the same
    token) compare like with like. ``text`` as `read_pieces` takes it; the prompt is prose of the documentation of
    Python's library. Leaves graphs.safetensors, mask/, kept-channels.png and demo.json in ``folder``. Raises
    InputError for what does not fit the model, and for a head without a solution.
    """
    import torch

    from grace_opt.runtime.generate import check_context, forced, kl_per_token

    if new_tokens < 1 or not 0 < ratio < 1:
        raise InputError(f"the demo needs a new token and a ratio between 0 and 1, got {new_tokens} and {ratio}")
    method = METHODS["grace-opt"]
    progress(f"load {model_name}", 0, 1)
    model, tokenizer = load()
    check_context(model, context, new_tokens)
    bundle = calibrate(
        model,
        tokenizer,
        read_pieces(text),
        calibration,
        model_name=model_name,
        text_name=text or DEFAULT_TEXT,
        progress=lambda done, total: progress("calibrate, tokens", done, total),
    )
    save_bundle(bundle, folder / "graphs.safetensors")
    solutions = solve_many(problems_of(bundle, method, Budget(ratio)), solver, limits=limits)
    mask = mask_from_solutions(bundle, solutions, method, readout_scope="prefill")
    save_mask(mask, folder / "mask")
    picture = folder / "kept-channels.png"
    kept_channels(mask, picture, f"{model_name}: key channels kept at ratio {ratio:g} by {solver.name}")
    ids = next(token_windows(prose(), tokenizer, context, context))
    require_rows(model, ids)
    prompt = torch.tensor([ids], device=input_device(model))

    def decode(tokens: torch.Tensor | int, used: CachePlan | None, what: str) -> tuple[Forced, torch.Tensor]:
        return forced(model, prompt, tokens, used, lambda done: progress(what, done, new_tokens))

    reference, reference_tokens = decode(new_tokens, None, "generate, full cache")
    plans = {"full": None, **_prompt_plans(model, prompt[0].tolist(), ratio, calibration), "grace-opt": mask.plan}
    records = []
    for name, used in plans.items():
        free, judged, tokens = reference, reference, reference_tokens
        if used is not None:
            free, tokens = decode(new_tokens, used, f"generate, {name}")
            judged, _ = decode(reference_tokens, used, f"{name}, the full one's tokens")
        records.append(
            {
                "model": model_name,
                "cache": name,
                "ratio": 0.0 if used is None else ratio,
                "solver": solver.name if used is mask.plan else None,
                "kept_channels": mask.head_dim if used is None else mean_width(used),
                "head_dim": mask.head_dim,
                "prompt_tokens": prompt.shape[1],
                "new_tokens": new_tokens,
                "cache_bytes": free.cache_bytes,
                "kl": float(kl_per_token(reference.logits, judged.logits).mean()),
                "agree": int((judged.logits.argmax(-1) == reference_tokens).sum()),
                "prefill_seconds": free.prefill_seconds,
                "decode_seconds": free.decode_seconds,
                "text": tokenizer.decode(tokens),
            }
        )
    write_json(folder / "demo.json", {"records": records})
    return DemoResult(records, picture)


def _prompt_plans(
    model: PreTrainedModel, ids: list[int], ratio: float, calibration: Calibration
) -> dict[str, CachePlan]:
    """What ThinK and GRACE choose from a prompt, with the calibration's windows."""
    from grace_opt.evaluate.capture import capture

    methods = {name: METHODS[name] for name in ("think", "grace")}
    captured = capture(model, ids, len(ids), max(each.selection.observation_window for each in methods.values()))
    plans = {}
    for name, named in methods.items():
        windows = replace(named.windows, recent_window=calibration.recent_window, sinks=calibration.sinks)
        each = replace(named, windows=windows)
        seen = captured.observed(each.selection.observation_window, each.windows, each.selection.spans)
        plans[name] = apply(each, seen, Budget(ratio))
    return plans


def mean_width(plan: CachePlan) -> float:
    """Key channels that the average head keeps."""
    widths = [width for heads in plan.widths("key").values() for width in heads]
    return sum(widths) / len(widths)
