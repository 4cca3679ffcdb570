"""Figures of task records, and the page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_opt.errors import InputError
from grace_opt.reports import evaluation, score_figures
from tests.reports.test_figures import full, interval, lines, saved


def scored(method: str, share: float | None, score: float, **fields: Any) -> dict[str, Any]:
    """A record of a task."""
    return {
        "model": "m",
        "task": "ruler/vt",
        "tasks": ["ruler/vt"],
        "length": 1024,
        "protocol": "query-aware",
        "method": method,
        "ratio": 0.0,
        "value_ratio": 0.0,
        "budget_bytes": None,
        "budget_share": share,
        "score": interval(score, score - 0.05, min(1, score + 0.05)),
        "full_score": 0.9,
        "solved": True,
        "prompts": 4,
        "bytes_per_token": 100 * (share or 1),
        "full_bytes_per_token": 100.0,
        "places": [],
        **fields,
    }


def grid(**fields: Any) -> list[dict[str, Any]]:
    of_methods = [scored(name, share, share) for name in ("think", "grace-opt") for share in (0.5, 0.25)]
    return [each | fields for each in (scored("full", None, 0.9), *of_methods)]


def test_scores_have_a_panel_a_task_and_the_uncompressed_score() -> None:
    records = [*grid(), *grid(task="ruler/cwe", solved=False, full_score=0.2)]
    figure = saved(score_figures.scores(records))
    assert [axes.get_title() for axes in figure.axes] == ["ruler/vt", "ruler/cwe (not solved)"]
    drawn = lines(figure.axes[0])
    assert list(drawn) == ["uncompressed", "think", "grace-opt"]
    np.testing.assert_allclose(drawn["think"].get_xdata(), [25, 50])
    np.testing.assert_allclose(drawn["think"].get_ydata(), [25, 50])
    np.testing.assert_allclose(drawn["uncompressed"].get_ydata(), [90, 90])
    with pytest.raises(InputError, match="no record"):
        score_figures.scores([])


def test_place_maps_have_a_panel_a_budget() -> None:
    places = [{"depth": depth, "score": depth, "asked": 2} for depth in (0.5, 1.0)]
    records = [*grid(places=places), *grid(places=places[:1], length=2048)]
    panels = saved(score_figures.place_maps(records)).axes[:-1]
    assert [axes.get_title() for axes in panels] == [
        "full",
        *(f"{name}\n{share} of the bytes" for name in ("think", "grace-opt") for share in ("0.25", "0.5")),
    ]
    np.testing.assert_allclose(panels[0].images[0].get_array().filled(-1), [[0.5, 0.5], [1, -1]])
    assert [text.get_text() for text in panels[0].texts] == ["1/2", "2/2", "1/2"]
    with pytest.raises(InputError, match="no record has places"):
        score_figures.place_maps(grid())


def test_the_page_holds_its_tables_and_pictures_and_refers_to_nothing(tmp_path: Path) -> None:
    places = [{"depth": 0.5, "score": 0.5, "asked": 2}]
    kl = [full("grace", 0.5, 0.1), full("think", 0.5, 0.2)]
    base = {"task": "kl", "model": "m", "budget_bytes": None, "budget_share": None, "top1": 0.9}
    answered = grid(places=places) + grid(protocol="context-only")
    records = [{**base, **each} for each in kl] + answered + [scored("<b>", 0.5, 0.5)]
    paths = evaluation.write(records, tmp_path, {"command": "grace-opt evaluate <m>", "seed": 0})
    names = [str(path.relative_to(tmp_path)) for path in paths]
    assert names[:3] == [
        "scores-query-aware-1024.png",
        "scores-context-only-1024.png",
        "places-ruler-vt-query-aware.png",
    ]
    assert "pareto.png" in names
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == len(paths)
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "grace-opt evaluate &lt;m&gt;" in page
