"""Figures of evaluation records: bytes against KL, KL by position, kept channels by head, needles found.

A record is one method at one ratio, as ``grace-opt evaluate`` writes it to JSON. Every figure is a PNG that reads well
at 900 px width. Colours are those of Okabe and Ito, given to the methods in their order in the records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.errors import InputError
from grace_opt.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Budget = tuple[float, float, float]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"  # 8 and 7 have no common divisor: 56 pairs of marker and colour
WIDTH = 9.0  # inches
MOST_PANELS = 4


def pareto(records: Sequence[Record], path: str | Path) -> None:
    """Bytes a token, percent of the uncompressed cache, against KL, nats a token, on a log axis: a line a method.

    Vertical bars are the intervals over documents, where there are some. A log axis has no place for a KL of 0: such
    points are left out, and counted above the plot. Raises InputError if there is no record.
    """
    _save(_pareto(records), path)


def positions(records: Sequence[Record], path: str | Path) -> None:
    """KL, nats a token, against the position after the prefix: a panel a budget, a line a method, intervals shaded.

    Each bin of positions is drawn at its middle; bins with a KL of 0 are left out. Of more than four budgets (ratio
    and value ratio, or bytes), four are drawn: the lowest, the highest and two between. Raises InputError if
    there is no bin.
    """
    _save(_positions(records), path)


def kept_maps(record: Record, path: str | Path) -> None:
    """Kept channels of each layer (row) and KV head (column), mean over documents; keys and values side by side.

    Raises InputError if keys and values are both whole.
    """
    _save(_kept_maps(record), path)


def needle_maps(records: Sequence[Record], path: str | Path) -> None:
    """Needles found of those asked by prompt length and depth, a panel for each method and ratio that has needles.

    Raises InputError if no needle was asked.
    """
    _save(_needle_maps(records), path)


def draw(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """All figures that the records have data for, written to ``folder``, which is made. Returns their paths.

    ``pareto.png``; ``positions.png`` if a record has more than one bin of positions; for each record with kept channels
    ``kept-METHOD-RATIO.png``, or ``-RATIO-VALUE_RATIO`` if values are pruned, or ``-N-bytes`` for a budget in bytes;
    ``needles.png`` if needles were asked. Characters other than ASCII letters, digits, ``.``, ``_`` and ``-`` become
    ``-`` in names, and a name that is taken gets a number.
    """
    folder = Path(folder)
    paths: list[Path] = []

    def place(stem: str) -> Path:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)
        taken = {path.name.lower() for path in paths}  # some file systems do not tell A from a
        names = (f"{stem}.png", *(f"{stem}-{i}.png" for i in range(2, len(paths) + 3)))
        paths.append(folder / next(name for name in names if name.lower() not in taken))
        return paths[-1]

    if records:
        pareto(records, place("pareto"))
    if any(len(record["kl_positions"]) > 1 for record in records):
        positions(records, place("positions"))
    for record in records:
        if _kept_kinds(record):
            size, ratio, values = _budget(record)
            budget = f"{size:g}-bytes" if size else f"{ratio:g}-{values:g}" if values else f"{ratio:g}"
            kept_maps(record, place(f"kept-{_label(record)[:100]}-{budget}"))
    if any(record["needles"] for record in records):
        needle_maps(records, place("needles"))
    return paths


def _pareto(records: Sequence[Record]) -> Figure:
    if not records:
        raise InputError("there is no record to draw; evaluate at least one method")
    figure = _figure(WIDTH, 5.2)
    axes = figure.subplots()
    axes.set_yscale("log", nonpositive="clip")  # an interval down to 0 reaches the edge
    for label, style in _styles(records).items():
        rows = [record for record in records if _label(record) == label and record["kl"]["mean"] > 0]
        if rows:
            rows.sort(key=lambda record: float(record["bytes_per_token"]))
            x = np.array([100 * record["bytes_per_token"] / record["full_bytes_per_token"] for record in rows])
            mean, low, high = _intervals(record["kl"] for record in rows)
            axes.plot(x, mean, label=label, linewidth=1.6, markersize=6, **style)
            known = np.isfinite(low) & np.isfinite(high)
            axes.vlines(x[known], low[known], high[known], color=style["color"], linewidth=1.2, alpha=0.7)
    hidden = sum(record["kl"]["mean"] <= 0 for record in records)
    if hidden:
        axes.set_title(f"left out for a KL of 0: {hidden} of {len(records)} points", fontsize=10)
    axes.set_xlabel("bytes a token, % of the uncompressed cache")
    axes.set_ylabel("KL, nats a token")
    _finish(figure)
    return figure


def _positions(records: Sequence[Record]) -> Figure:
    budgets = sorted({_budget(record) for record in records if record["kl_positions"]})
    if not budgets:
        raise InputError("no record has KL by position; evaluate the records again")
    if len(budgets) > MOST_PANELS:
        budgets = [budgets[round(i * (len(budgets) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    figure = _figure(WIDTH if len(budgets) > 1 else 6.5, 4.0)
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_yscale("log", nonpositive="clip")
    for axes, budget in zip(panels, budgets, strict=True):
        for record in records:
            bins = [each for each in record["kl_positions"] if each["mean"] > 0]
            if bins and _budget(record) == budget:
                style = _styles(records)[_label(record)]
                x = [(each["from"] + each["to"] - 1) / 2 for each in bins]
                mean, low, high = _intervals(bins)
                axes.plot(x, mean, label=_label(record), linewidth=1.4, markersize=3.5, **style)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_title(_named(budget, "\n"), fontsize=10)
        axes.set_xlabel("token after the prefix")
    panels[0].set_ylabel("KL, nats a token")
    _finish(figure)
    return figure


def _kept_maps(record: Record) -> Figure:
    kinds, layers = _kept_kinds(record), record["layers"]
    if not kinds:
        raise InputError(f"{_label(record)} keeps keys and values whole; there are no kept channels to draw")
    figure = _figure(WIDTH if len(kinds) > 1 else 5.5, min(10.0, max(3.5, 0.17 * len(layers) + 1.6)))
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
    figure.suptitle(f"{_label(record)}, {_named(_budget(record))}", fontsize=11)
    return figure


def _needle_maps(records: Sequence[Record]) -> Figure:
    order = list(_styles(records))
    asked = sorted((r for r in records if r["needles"]), key=lambda r: (order.index(_label(r)), _budget(r)))
    if not asked:
        raise InputError("no record has needles; evaluate with needles to draw them")
    lengths = sorted({needle["length"] for record in asked for needle in record["needles"]})
    depths = sorted({needle["depth"] for record in asked for needle in record["needles"]})
    wide = max(1.5, 0.45 * len(lengths))
    budgets = len({_budget(record) for record in asked})
    columns = max(1, min(len(asked), int((WIDTH - 1.5) / wide)))
    if 1 < budgets <= columns:
        columns = budgets  # a row is a method
    rows = -(-len(asked) // columns)
    figure = _figure(min(WIDTH, 1.5 + wide * columns), 1.0 + rows * (0.75 + 0.3 * len(depths)))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (axes, record) in enumerate(zip(panels, asked, strict=False)):
        counts = np.zeros((2, len(depths), len(lengths)), np.int64)
        for needle in record["needles"]:
            cell = depths.index(needle["depth"]), lengths.index(needle["length"])
            counts[(slice(None), *cell)] += needle["found"], needle["asked"]
        share = np.divide(counts[0], counts[1], out=np.full(counts[0].shape, np.nan), where=counts[1] > 0)
        image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (row, column), value in np.ndenumerate(share):
            if np.isfinite(value):
                text = f"{counts[0, row, column]}/{counts[1, row, column]}"
                colour = "white" if value < 0.55 else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(_label(record) + "\n" + _named(_budget(record), "\n"), fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axes.tick_params(labelbottom=i + columns >= len(asked))
    for axes in panels[len(asked) :]:
        axes.remove()
    figure.colorbar(image, ax=list(panels[: len(asked)]), label="found / asked", aspect=15 * rows, fraction=0.05)
    figure.supxlabel("prompt length, tokens", fontsize=10)
    figure.supylabel("depth of the needle in the prompt", fontsize=10)
    return figure


def _label(record: Record) -> str:
    return str(record["method"]) + (f", {record['bits']} bits" if record.get("bits") else "")


def _budget(record: Record) -> Budget:
    """Bytes a token (0: the budget is the ratios), ratio and value ratio."""
    return record.get("budget_bytes") or 0.0, record["ratio"], record["value_ratio"]


def _named(budget: Budget, between: str = ", ") -> str:
    size, ratio, value_ratio = budget
    if size:
        return f"{size:g} bytes a token"
    return f"ratio {ratio:g}" + (f"{between}value ratio {value_ratio:g}" if value_ratio > 0 else "")


def _styles(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, in the order of the records."""
    labels = dict.fromkeys(_label(record) for record in records)
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }


def _intervals(intervals: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Rows mean, low and high, float64[3, d], NaN where there is no interval."""
    return np.array([[each["mean"], each["low"], each["high"]] for each in intervals], np.float64).T


def _kept_kinds(record: Record) -> list[str]:
    return [kind for kind in ("key", "value") if record["kept"][kind] is not None]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window, and nothing to close

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Figure) -> None:
    """Plain numbers on the shared log axis, grid, no box, and one legend of all panels below them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = figure.axes[0].get_ylim()
    marks = (1.0, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 10 * low else (1.0, 2, 5) if high < 1000 * low else (1.0,)
    narrow = high < 1.5 * low  # there a log axis is as good as a linear one, which has ticks everywhere
    digits = max(6, 2 + math.ceil(math.log10(high / (high - low)))) if narrow else 6  # that tell tick from tick
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=marks))
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))
    figure.axes[0].yaxis.set_minor_locator(NullLocator())
    handles = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.6)
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if handles:
        fit = max(1, int(figure.get_figwidth() * 11) // (max(map(len, handles)) + 8))  # about 11 characters an inch
        columns = -(-len(handles) // -(-len(handles) // fit))  # rows alike
        figure.legend(handles.values(), list(handles), loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
