"""What the figures of evaluation records share: names, colours, the axes' looks, and files.

Colours are those of Okabe and Ito, given to the methods in their order in the records. Every figure is a PNG that reads
well at 900 px width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Budget = tuple[float, ...]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"  # 8 and 7 have no common divisor: 56 pairs of marker and colour
WIDTH = 9.0  # inches


def method_of(record: Record) -> str:
    """Its name in legends."""
    return str(record["method"])


def budget_of(record: Record) -> Budget:
    """What figures tell budgets apart by, in an order of their own."""
    share, size = record.get("budget_share") or 0.0, record.get("budget_bytes") or 0.0
    return (share, size, record["ratio"], record["value_ratio"]) if not (share or size) else (share, size, 0.0, 0.0)


def budget_title(budget: Budget, between: str = ", ") -> str:
    """A budget in a title."""
    share, size, ratio, values = budget
    if share:
        return f"{share:.3g} of the bytes"
    if size:
        return f"{size:g} bytes a token"
    return f"ratio {ratio:g}" + (f"{between}value ratio {values:g}" if values > 0 else "")


def held_percent(record: Record) -> float:
    """Bytes held, percent of the uncompressed cache: the x of every front."""
    return float(100 * record["bytes_per_token"] / record["full_bytes_per_token"])


def styles_of(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, in the order of the records."""
    labels = dict.fromkeys(method_of(record) for record in records)
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }


def intervals_of(intervals: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Rows mean, low and high, float64[3, d], NaN where there is no interval."""
    return np.array([[each["mean"], each["low"], each["high"]] for each in intervals], np.float64).T


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure  # without pyplot: no window, and nothing to close

    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure) -> None:
    """Grid, no box, and one legend of all panels below them."""
    handles = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.6)
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if handles:
        fit = max(1, int(figure.get_figwidth() * 11) // (max(map(len, handles)) + 8))  # about 11 characters an inch
        columns = -(-len(handles) // -(-len(handles) // fit))  # rows alike
        figure.legend(handles.values(), list(handles), loc="outside lower center", ncols=columns, frameon=False)


def plain_log_axis(figure: Figure) -> None:
    """Plain numbers on the log axis that the panels share."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = figure.axes[0].get_ylim()
    marks = (1.0, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 10 * low else (1.0, 2, 5) if high < 1000 * low else (1.0,)
    narrow = high < 1.5 * low  # there a log axis is as good as a linear one, which has ticks everywhere
    digits = max(6, 2 + math.ceil(math.log10(high / (high - low)))) if narrow else 6  # that tell tick from tick
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=marks))
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}g}"))
    figure.axes[0].yaxis.set_minor_locator(NullLocator())


def save(figure: Figure, path: str | Path) -> None:
    """Write it as a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


class Names:
    """Paths of figures in a folder: characters other than ASCII letters, digits, ``.``, ``_`` and ``-`` become ``-``,
    and a name that is taken gets a number."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.paths: list[Path] = []

    def place(self, stem: str) -> Path:
        """The path of the next figure."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)
        taken = {path.name.lower() for path in self.paths}  # some file systems do not tell A from a
        names = (f"{stem}.png", *(f"{stem}-{i}.png" for i in range(2, len(self.paths) + 3)))
        self.paths.append(self._folder / next(name for name in names if name.lower() not in taken))
        return self.paths[-1]
