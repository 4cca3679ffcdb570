"""Figures of task records: bytes against scores, and scores by the place of a needle.

A record is one method at one budget on one task, as ``grace-opt evaluate --task NAME`` writes it to JSON.
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
    save,
    styles_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 4  #: side by side


def draw(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """``scores-PROTOCOL-LENGTH.png`` for each protocol and length, and ``places-TASK-PROTOCOL.png`` where prompts have
    a ``depth``; written to ``folder``, which is made. Returns their paths."""
    names = Names(folder)
    for protocol, length in dict.fromkeys((record["protocol"], record["length"]) for record in records):
        of = [record for record in records if (record["protocol"], record["length"]) == (protocol, length)]
        save(scores(of), names.place(f"scores-{protocol}-{length}"))
    for task, protocol in dict.fromkeys((record["task"], record["protocol"]) for record in records):
        of = [record for record in records if (record["task"], record["protocol"]) == (task, protocol)]
        if any("depth" in place for record in of for place in record["places"]):
            save(place_maps(of), names.place(f"places-{task}-{protocol}"))
    return names.paths


def scores(records: Sequence[Record]) -> Figure:
    """Bytes, percent of the uncompressed cache, against scores, percent: a panel a task, a line a method.

    Vertical bars are the intervals over prompts; the dashed line is the uncompressed cache. Raises InputError if there
    is no record.
    """
    if not records:
        raise InputError("there is no record to draw; evaluate at least one task")
    tasks = list(dict.fromkeys(record["task"] for record in records))
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = new_figure(max(4.5, WIDTH * columns / PANELS), 0.8 + 2.1 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    compressed = [record for record in records if record["method"] != "full"]
    for i, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        of_task = [record for record in records if record["task"] == task]
        axes.axhline(100 * of_task[0]["full_score"], linestyle="--", color="gray", linewidth=1, label="uncompressed")
        for label, style in styles_of(compressed).items():
            line = sorted((r for r in of_task if method_of(r) == label), key=held_percent)
            if line:
                x = np.array([held_percent(record) for record in line])
                mean, low, high = 100 * intervals_of(record["score"] for record in line)
                axes.plot(x, mean, label=label, linewidth=1.4, markersize=4, **style)
                known = np.isfinite(low) & np.isfinite(high)
                axes.vlines(x[known], low[known], high[known], color=style["color"], linewidth=1, alpha=0.6)
        axes.set_title(task if of_task[0]["solved"] else f"{task} (not solved)", fontsize=9)
        axes.set_ylim(-3, 103)
        if lowest := i + columns >= len(tasks):
            axes.set_xlabel("bytes held, %", fontsize=9)
        axes.tick_params(labelbottom=lowest)
    for axes in panels[len(tasks) :]:
        axes.remove()
    figure.supylabel("score, %", fontsize=10)
    figure.suptitle(f"{records[0]['protocol']}, {records[0]['length']} tokens", fontsize=11)
    finish(figure)
    return figure


def place_maps(records: Sequence[Record]) -> Figure:
    """Scores of one task by prompt length and depth: a panel for each method and budget.

    Raises InputError if no record has places.
    """
    order = list(styles_of(records))
    panels_of: dict[tuple[int, tuple[float, ...]], list[Record]] = {}
    for record in records:
        if record["places"]:
            panels_of.setdefault((order.index(method_of(record)), budget_of(record)), []).append(record)
    if not panels_of:
        raise InputError("no record has places; evaluate a task whose prompts have a depth to draw them")
    shown = [panels_of[place] for place in sorted(panels_of)]
    lengths = sorted({record["length"] for of in shown for record in of})
    depths = sorted({place["depth"] for of in shown for record in of for place in record["places"]})
    wide = max(1.5, 0.45 * len(lengths))
    columns = max(1, min(len(shown), int((WIDTH - 1.5) / wide)))
    rows = -(-len(shown) // columns)
    figure = new_figure(min(WIDTH, 1.5 + wide * columns), 1.0 + rows * (0.75 + 0.3 * len(depths)))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (axes, of) in enumerate(zip(panels, shown, strict=False)):
        share = np.full((len(depths), len(lengths)), np.nan)
        for record in of:
            for place in record["places"]:
                row, column = depths.index(place["depth"]), lengths.index(record["length"])
                share[row, column] = place["score"]
                colour = "white" if place["score"] < 0.55 else "black"
                text = f"{place['score'] * place['asked']:.3g}/{place['asked']}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        name = method_of(of[0])
        axes.set_title(name if name == "full" else f"{name}\n{budget_title(budget_of(of[0]), chr(10))}", fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axes.tick_params(labelbottom=i + columns >= len(shown))
    for axes in panels[len(shown) :]:
        axes.remove()
    figure.colorbar(image, ax=list(panels[: len(shown)]), label="score", aspect=15 * rows, fraction=0.05)
    figure.supxlabel("prompt length, tokens", fontsize=10)
    figure.supylabel("depth in the prompt", fontsize=10)
    return figure
