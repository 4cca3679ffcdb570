"""The commands of docs/lm-eval.md print what it says. Run by .ci/lm-eval."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT, snippets

PAGE = ROOT / "docs" / "lm-eval.md"


@pytest.mark.model
def test_the_example_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(r"`([\w.]+)`:\n\n(?:<!--[^>]*-->\n)?```\w+\n(.*?)```", text, flags=re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (block,) = [each for each in snippets.blocks(PAGE) if each.language == "bash" and "MODEL" not in each.text]
    printed = snippets.bash(block.text, tmp_path, PAGE.name)
    assert block.printed is not None
    assert snippets.differs(block.printed, printed) is None, printed
    assert len(list(tmp_path.glob("results/**/results_*.json"))) == 3
