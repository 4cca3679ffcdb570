"""Figures of evaluation records: what is drawn, read back from the figure."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from grace_opt.errors import InputError
from grace_opt.reports import figures
from grace_opt.reports.drawing import COLOURS

METHODS = ("think", "grace", "grace-opt")


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def interval(mean: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "low": low, "high": high}


def record(method: str = "grace", ratio: float = 0.5, kl: float = 0.1, **fields: Any) -> dict[str, Any]:
    """A record of one document, all heads whole, unless ``fields`` say otherwise."""
    return {
        "method": method,
        "ratio": ratio,
        "value_ratio": 0.0,
        "kl": interval(kl),
        "nll": interval(kl / 2),
        "bytes_per_token": 1000 * (1 - ratio / 2),
        "full_bytes_per_token": 1000.0,
        "documents": 1,
        "length": 512,
        "scored": 128,
        "kl_positions": [],
        "kept": {"key": None, "value": None},
        "layers": [0, 1, 2],
        "head_dim": 64,
    } | fields


def bins(kl: float) -> list[dict[str, Any]]:
    return [{"from": 32 * i, "to": 32 * (i + 1), **interval(kl * (i + 1), kl, kl * (i + 3))} for i in range(4)]


def full(method: str, ratio: float, kl: float) -> dict[str, Any]:
    """A record of several documents with everything to draw."""
    kept = [[64 * (1 - ratio), 40.0], [30.0, 20.0], [10.0, 64.0]]
    maps = {"key": kept, "value": kept}
    several = record(method, ratio, kl, kl_positions=bins(kl), kept=maps, documents=6)
    return several | {"kl": interval(kl, kl / 2, kl * 2)}


def grid() -> list[dict[str, Any]]:
    return [full(name, ratio, ratio / (i + 1)) for ratio in (0.75, 0.5) for i, name in enumerate(METHODS)]


def saved(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_draw_writes_a_png_for_all_that_there_is(tmp_path: Path) -> None:
    paths = figures.draw(grid(), tmp_path / "new")
    kept = [f"kept-{name}-{ratio}.png" for ratio in ("0.75", "0.5") for name in METHODS]
    assert [path.name for path in paths] == ["pareto.png", "positions.png", *kept]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())  # and no temporary file
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert content.endswith(b"IEND\xaeB`\x82")
        assert len(content) > 2000


def test_draw_leaves_out_what_there_is_no_data_for(tmp_path: Path) -> None:
    assert figures.draw([], tmp_path) == []
    one_bin = record(kl_positions=bins(0.1)[:1])
    assert [path.name for path in figures.draw([one_bin], tmp_path)] == ["pareto.png"]


def test_names_are_safe_and_never_taken_twice(tmp_path: Path) -> None:
    heads = {"key": [[3.0]] * 3, "value": None}
    names = ["../a b", ".. a/b", "Grace", "grace", "é" * 300]
    records = [record(name, kept=heads) for name in names]
    records += [record(kept=heads, value_ratio=0.25), record("grace+int4", kept=heads, budget_share=0.25)]
    paths = figures.draw(records, tmp_path)
    assert [path.name for path in paths[1:]] == [
        "kept-..-a-b-0.5.png",
        "kept-..-a-b-0.5-2.png",
        "kept-Grace-0.5.png",
        "kept-grace-0.5-2.png",
        "kept---0.5.png",
        "kept-grace-0.5-0.25.png",
        "kept-grace-int4-0.25-share.png",
    ]
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_pareto_draws_each_method_by_bytes_with_its_intervals() -> None:
    (axes,) = saved(figures._pareto(grid())).axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlim()[0] < axes.get_xlim()[1]
    drawn = lines(axes)
    assert list(drawn) == list(METHODS)
    for i, name in enumerate(METHODS):
        np.testing.assert_allclose(drawn[name].get_xdata(), [62.5, 75.0])  # given the other way round
        np.testing.assert_allclose(drawn[name].get_ydata(), [0.75 / (i + 1), 0.5 / (i + 1)])
        assert drawn[name].get_color() == COLOURS[i]
    bars = [each for each in axes.collections if isinstance(each, LineCollection)]
    ends = np.array([segment[:, 1] for bar in bars for segment in bar.get_segments()])
    np.testing.assert_allclose(ends[:2], [[0.375, 1.5], [0.25, 1.0]])
    assert len(ends) == 6


def test_pareto_leaves_out_zeros_and_missing_intervals() -> None:
    records = [record("grace", 0.25, 0.0), record("grace", 0.5, 0.1), record("svd", 0.5, 0.0), record("think", kl=0.2)]
    records[3]["kl"] = interval(0.2, 0.0, 0.3)  # reaches below what a log axis can show
    (axes,) = saved(figures._pareto(records)).axes
    assert {name: list(line.get_ydata()) for name, line in lines(axes).items()} == {"grace": [0.1], "think": [0.2]}
    assert lines(axes)["think"].get_color() == COLOURS[2]  # svd's colour is not passed on
    assert axes.get_ylim()[0] > 0
    assert axes.get_title() == "left out for a KL of 0: 2 of 4 points"
    assert sum(len(bar.get_segments()) for bar in axes.collections) == 1
    (axes,) = saved(figures._pareto([record(kl=0.0)])).axes
    assert not axes.get_lines()
    with pytest.raises(InputError, match="no record"):
        figures._pareto([])


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.1), (0.06, 0.07), (0.01, 0.05), (1e-4, 0.1), (1e-9, 10)])
def test_a_log_axis_of_any_extent_has_a_few_plain_numbers(low: float, high: float) -> None:
    (axes,) = saved(figures._pareto([record(kl=low), record(kl=high)])).axes
    bottom, top = axes.get_ylim()
    shown = [label.get_text() for label in axes.get_yticklabels(which="both")]
    values = [float(text) for text in shown if bottom <= float(text) <= top]
    assert 2 <= len(values) <= 13
    assert len(set(values)) == len(values)


def test_positions_have_a_panel_a_ratio_and_a_line_a_method() -> None:
    panels = saved(figures._positions(grid())).axes
    assert [axes.get_title() for axes in panels] == ["ratio 0.5", "ratio 0.75"]
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert panels[0].get_yscale() == "log"
    for axes, ratio in zip(panels, (0.5, 0.75), strict=True):
        assert list(lines(axes)) == list(METHODS)
        for i, line in enumerate(axes.get_lines()):
            np.testing.assert_allclose(line.get_xdata(), [15.5, 47.5, 79.5, 111.5])
            np.testing.assert_allclose(line.get_ydata(), ratio / (i + 1) * np.arange(1, 5))
            assert line.get_color() == COLOURS[i]
            assert to_hex(axes.collections[i].get_facecolor()[0]).upper() == COLOURS[i]
            heights = axes.collections[i].get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [ratio / (i + 1), 6 * ratio / (i + 1)])


def test_positions_stand_zeros_missing_intervals_and_many_ratios() -> None:
    gaps = [interval(0.0), interval(0.1), interval(0.2, 0.0, 0.3)]
    kl = [{"from": i, "to": i + 1, **each} for i, each in enumerate(gaps)]
    one_document = [{"from": i, "to": i + 1, **interval(0.1)} for i in range(2)]
    records = [record(kl_positions=kl), record("svd"), record("think", kl_positions=one_document)]
    (axes,) = saved(figures._positions(records)).axes
    drawn = {name: list(line.get_xdata()) for name, line in lines(axes).items()}
    assert drawn == {"grace": [1.0, 2.0], "think": [0.0, 1.0]}
    assert axes.get_ylim()[0] > 0
    ratios = [record(ratio=i / 10, value_ratio=0.25, kl_positions=kl) for i in range(1, 10)]
    titles = [axes.get_title() for axes in saved(figures._positions(ratios)).axes]
    assert titles == [f"ratio {ratio}\nvalue ratio 0.25" for ratio in (0.1, 0.4, 0.6, 0.9)]
    with pytest.raises(InputError, match="position"):
        figures._positions([record()])


def test_a_budget_in_bytes_takes_the_place_of_the_ratios(tmp_path: Path) -> None:
    sizes = (9216.0, 4608.0)
    records = [full("grace", 0.0, 0.1) | {"budget_bytes": size} for size in sizes]
    names = ["9216 bytes a token", "4608 bytes a token"]
    assert [axes.get_title() for axes in saved(figures._positions(records)).axes] == names[::-1]
    assert figures._kept_maps(records[0]).get_suptitle() == f"grace, {names[0]}"
    paths = figures.draw(records, tmp_path)
    assert [path.name for path in paths[2:4]] == ["kept-grace-9216-bytes.png", "kept-grace-4608-bytes.png"]


def test_kept_maps_show_layers_by_heads_on_a_scale_of_all_channels() -> None:
    kept = {"key": [[1.0, 2.0], [3.0, 4.5], [5.0, 64.0]], "value": [[7.0, 8.0], [9.0], [10.0, 11.0]]}
    figure = saved(figures._kept_maps(record(kept=kept, layers=[0, 2, 5], value_ratio=0.25)))
    keys, values, bar = figure.axes
    np.testing.assert_array_equal(keys.images[0].get_array(), kept["key"])
    drawn = np.ma.filled(values.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(drawn, [[7, 8], [9, np.nan], [10, 11]])
    assert [label.get_text() for label in keys.get_yticklabels()] == ["0", "2", "5"]
    assert keys.images[0].get_clim() == values.images[0].get_clim() == (0, 64)
    assert bar.get_ylim() == (0, 64)
    assert figure.get_suptitle() == "grace, ratio 0.5, value ratio 0.25"
    assert len(saved(figures._kept_maps(record(kept=kept | {"key": None}))).axes) == 2  # values alone and their bar
    with pytest.raises(InputError, match="grace keeps keys and values whole"):
        figures._kept_maps(record())
