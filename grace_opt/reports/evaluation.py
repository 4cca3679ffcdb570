"""Figures and report.html of an evaluation: one page with its tables and pictures, which needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from grace_opt.files import write_text
from grace_opt.reports import figures, score_figures
from grace_opt.reports.report import filled, page_part
from grace_opt.reports.tables import quality_row, score_row

Record = Mapping[str, Any]

_ABOUT_SCORES = (
    "Scores in percent with 95 % intervals over prompts; bytes are all that the cache holds, in percent of the "
    "uncompressed cache. query-aware: the question was compressed with its context; context-only: it came after. A "
    "task counts as solved where the uncompressed cache scores at least 60 %; the rows of a family are the mean of "
    "its solved tasks."
)
_ABOUT_KL = (
    "KL of the compressed predictions from the uncompressed ones, nats a token, with 95 % intervals over documents; "
    "bytes as above."
)


def write(records: Sequence[Record], folder: str | Path, run: Mapping[str, Any]) -> list[Path]:
    """All figures that the records have data for, and report.html; ``folder`` is made. Returns the figures' paths.

    ``run``: what the page states of the run, words -> text. Raises InputError if a file cannot be written.
    """
    folder = Path(folder)
    kl = [record for record in records if record["task"] == "kl"]
    answered = [record for record in records if record["task"] != "kl"]
    pictures = {
        "Scores": score_figures.draw(answered, folder) if answered else [],
        "Divergence": [path for of in _lengths(kl) for path in figures.draw(of, _place(folder, of, kl))],
    }
    tables = {"Scores": [score_row(record) for record in answered], "Divergence": [quality_row(r) for r in kl]}
    notes = {"Scores": _ABOUT_SCORES, "Divergence": _ABOUT_KL}
    sections = [
        f"<section>\n<h2>{name}</h2>\n<p class='note'>{escape(notes[name])}</p>\n{_table(tables[name])}\n"
        + "\n".join(_picture(path, folder) for path in pictures[name])
        + "\n</section>"
        for name in tables
        if tables[name]
    ]
    models = ", ".join(sorted({str(record["model"]) for record in records}))
    parts = {
        "TITLE": escape(f"Evaluation of {models}"),
        "CSS": page_part("report.css"),
        "FACTS": "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in run.items()),
        "SECTIONS": "\n".join(sections),
    }
    write_text(folder / "report.html", filled("evaluation.html", parts))
    return [path for of in pictures.values() for path in of]


def _lengths(records: Sequence[Record]) -> Iterator[list[Record]]:
    for length in dict.fromkeys(record["length"] for record in records):
        yield [record for record in records if record["length"] == length]


def _place(folder: Path, of: Sequence[Record], kl: Sequence[Record]) -> Path:
    """Where figures of one length lie: a folder of their own if there are several."""
    return folder if len(of) == len(kl) else folder / f"kl-{of[0]['length']}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _picture(path: Path, folder: Path) -> str:
    name = escape(str(path.relative_to(folder)))
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{data}' alt='{name}'><figcaption>{name}</figcaption></figure>"
