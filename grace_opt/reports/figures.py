"""Figures of KL records: bytes against KL, KL by position, kept channels by head.

A record is one method at one budget, as ``grace-opt evaluate --task kl`` writes it to JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grace_opt.errors import InputError
from grace_opt.reports.drawing import (
    WIDTH,
    Names,
    Record,
    budget_of,
    budget_title,
    finish,
    held_percent,
    intervals_of,
    method_of,
    new_figure,
    plain_log_axis,
    save,
    styles_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 4


def pareto(records: Sequence[Record], path: str | Path) -> None:
    """Bytes a token, percent of the uncompressed cache, against KL, nats a token, on a log axis: a line a method.

    Vertical bars are the intervals over documents, where there are some. A log axis has no place for a KL of 0: such
    points are left out, and counted above the plot. Raises InputError if there is no record.
    """
    save(_pareto(records), path)


def positions(records: Sequence[Record], path: str | Path) -> None:
    """KL, nats a token, against the position after the prefix: a panel a budget, a line a method, intervals shaded.

    Each bin of positions is drawn at its middle; bins with a KL of 0 are left out. Of more than four budgets (ratio
    and value ratio, or bytes), four are drawn: the lowest, the highest and two between. Raises InputError if
    there is no bin.
    """
    save(_positions(records), path)


def kept_maps(record: Record, path: str | Path) -> None:
    """Kept channels of each layer (row) and KV head (column), mean over documents; keys and values side by side.

    Raises InputError if keys and values are both whole.
    """
    save(_kept_maps(record), path)


def draw(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """All figures that the records have data for, written to ``folder``, which is made. Returns their paths.

    ``pareto.png``; ``positions.png`` if a record has more than one bin of positions; for each record with kept channels
    ``kept-METHOD-RATIO.png``, or ``-RATIO-VALUE_RATIO`` if values are pruned, ``-N-bytes`` or ``-N-share`` for other
    budgets (`Names`).
    """
    names = Names(folder)
    if records:
        pareto(records, names.place("pareto"))
    if any(len(record["kl_positions"]) > 1 for record in records):
        positions(records, names.place("positions"))
    for record in records:
        if _kept_kinds(record):
            share, size, ratio, values = budget_of(record)
            ratios = f"{ratio:g}-{values:g}" if values else f"{ratio:g}"
            budget = f"{share:g}-share" if share else f"{size:g}-bytes" if size else ratios
            kept_maps(record, names.place(f"kept-{method_of(record)[:100]}-{budget}"))
    return names.paths


def _pareto(records: Sequence[Record]) -> Figure:
    if not records:
        raise InputError("there is no record to draw; evaluate at least one method")
    figure = new_figure(WIDTH, 5.2)
    axes = figure.subplots()
    axes.set_yscale("log", nonpositive="clip")  # an interval down to 0 reaches the edge
    for label, style in styles_of(records).items():
        rows = [record for record in records if method_of(record) == label and record["kl"]["mean"] > 0]
        if rows:
            rows.sort(key=lambda record: float(record["bytes_per_token"]))
            x = np.array([held_percent(record) for record in rows])
            mean, low, high = intervals_of(record["kl"] for record in rows)
            axes.plot(x, mean, label=label, linewidth=1.6, markersize=6, **style)
            known = np.isfinite(low) & np.isfinite(high)
            axes.vlines(x[known], low[known], high[known], color=style["color"], linewidth=1.2, alpha=0.7)
    hidden = sum(record["kl"]["mean"] <= 0 for record in records)
    if hidden:
        axes.set_title(f"left out for a KL of 0: {hidden} of {len(records)} points", fontsize=10)
    axes.set_xlabel("bytes a token, % of the uncompressed cache")
    axes.set_ylabel("KL, nats a token")
    plain_log_axis(figure)
    finish(figure)
    return figure


def _positions(records: Sequence[Record]) -> Figure:
    budgets = sorted({budget_of(record) for record in records if record["kl_positions"]})
    if not budgets:
        raise InputError("no record has KL by position; evaluate the records again")
    if len(budgets) > MOST_PANELS:
        budgets = [budgets[round(i * (len(budgets) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    figure = new_figure(WIDTH if len(budgets) > 1 else 6.5, 4.0)
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_yscale("log", nonpositive="clip")
    for axes, budget in zip(panels, budgets, strict=True):
        for record in records:
            bins = [each for each in record["kl_positions"] if each["mean"] > 0]
            if bins and budget_of(record) == budget:
                style = styles_of(records)[method_of(record)]
                x = [(each["from"] + each["to"] - 1) / 2 for each in bins]
                mean, low, high = intervals_of(bins)
                axes.plot(x, mean, label=method_of(record), linewidth=1.4, markersize=3.5, **style)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_title(budget_title(budget, "\n"), fontsize=10)
        axes.set_xlabel("token after the prefix")
    panels[0].set_ylabel("KL, nats a token")
    plain_log_axis(figure)
    finish(figure)
    return figure


def _kept_maps(record: Record) -> Figure:
    kinds, layers = _kept_kinds(record), record["layers"]
    if not kinds:
        raise InputError(f"{method_of(record)} keeps keys and values whole; there are no kept channels to draw")
    figure = new_figure(WIDTH if len(kinds) > 1 else 5.5, min(10.0, max(3.5, 0.17 * len(layers) + 1.6)))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        heads = max(len(row) for row in record["kept"][kind])
        kept = np.full((len(layers), heads), np.nan)  # layers may have different numbers of heads
        for i, row in enumerate(record["kept"][kind]):
            kept[i, : len(row)] = row
        width = record["head_dim"] if kind == "key" else record.get("value_head_dim", record["head_dim"])
        image = axes.imshow(kept, cmap="viridis", vmin=0, vmax=width, aspect="auto", interpolation="nearest")
        axes.set_title(f"{kind}s: {np.nanmean(kept):.4g} of {width} on average", fontsize=10)
        axes.set_xticks(range(0, heads, max(1, heads // 16)))
        axes.set_xlabel("KV head")
    step = max(1, len(layers) // 20)
    panels[0].set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="kept channels", aspect=30)
    figure.suptitle(f"{method_of(record)}, {budget_title(budget_of(record))}", fontsize=11)
    return figure


def _kept_kinds(record: Record) -> list[str]:
    return [kind for kind in ("key", "value") if record["kept"][kind] is not None]
