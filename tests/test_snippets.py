"""The snippets of the pages run, and print what the pages say.

The pages' commands run in make test where they take seconds; the tutorial, on the real model, in make test-all.
The tests also run from a copy of this folder alone, where there is no documentation: then there is nothing to collect.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import grace_opt
from grace_opt import save_mask
from grace_opt.models.texts import prose
from tests.support import DATA, ROOT
from tests.support.families import tiny_model
from tests.support.generation import random_mask
from tests.support.snippets import RUN, bash, blocks, differs, python, run

DOCS, README = ROOT / "docs", ROOT / "README.md"
#: pages whose blocks all run, or say why not; commands of the service run in tests/service
QUICK = ["problem.md", "formats.md", "solvers.md", "compare.md", "tasks.md"]
PAGES = [*QUICK, "cache.md", "tutorial.md"]


def test_what_counts_as_the_same_output() -> None:
    assert differs("a 1.0000 b\n...\nend", "a 1.0001 b\nx\ny\nend") is None
    assert differs("took 3.21 s", "took 0.1 s\n") is None
    assert differs("a ... c", "a b c") is None
    assert differs("32 of 64", "33 of 64") is not None
    assert differs("1.5", "1.6") is not None
    assert differs("a", "a\nb") == "goes on with 'b'"
    assert differs("a\nb", "a") == "ends before 'b'"
    assert differs("a\n...\nb", "a\nc") is not None
    assert differs("a", "calibrate, tokens: 1024 of 4096, 20 s\nh.key: gap 1e-09: 9 of 90, 1 s\na") is None


if DOCS.is_dir():

    @pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md"))])
    def test_every_block_is_run_or_says_why_not(name: str) -> None:
        text = (DOCS / name).read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w+)$", text, flags=re.MULTILINE)
        assert len([each for each in blocks(DOCS / name) if each.language in RUN]) == sum(
            each in RUN for each in fences
        )
        elsewhere = {"adding-a-codec.md": "tests/test_plugin_codec.py", "adding-a-solver.md": "tests/test_docs.py"}
        if name not in (*PAGES, *elsewhere):
            assert not any(each.run for each in blocks(DOCS / name))

    @pytest.mark.parametrize("name", QUICK)
    def test_a_page_prints_what_it_says(name: str, tmp_path: Path) -> None:
        shutil.copy(DATA / "heads-smollm2-135m.safetensors", tmp_path / "graphs.safetensors")
        run(DOCS / name, tmp_path)

    @pytest.mark.parametrize("page", [README, DOCS / "cache.md"], ids=lambda page: page.name)
    def test_how_a_cache_is_used(page: Path, tmp_path: Path) -> None:
        model = tiny_model("Llama")
        save_mask(random_mask(model, 8, recent_window=8, sinks=2), tmp_path / "mask")
        names = {"grace_opt": grace_opt, "model": model, "inputs": {"input_ids": torch.arange(4, 60)[None]}}
        snippets = [block for block in blocks(page) if block.language == "python"]
        assert snippets
        for block in snippets:
            python(block.text, tmp_path, names, page.name)

    @pytest.mark.slow
    @pytest.mark.model
    def test_the_readmes_commands(tmp_path: Path) -> None:
        """Of the section on your model, with the tutorial's; make demo and make test are what .ci/run runs."""
        (tmp_path / "my.txt").write_text("\n".join(prose()), encoding="utf-8")
        text = README.read_text(encoding="utf-8")
        section = text[text.index("## On your model") :]
        block = re.search(r"^```bash\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        assert block is not None
        lines = [line for line in block[1].splitlines() if line.startswith("grace-opt")]
        assert len(lines) == 3
        for line in lines:
            more = " --tokens 1024" if "calibrate" in line else " --max-new-tokens 4" if "generate" in line else ""
            bash(line.partition("#")[0].replace("MODEL", "smollm2-135m") + more, tmp_path, "README.md")
        assert (tmp_path / "mask" / "kv_mask.json").exists()

    @pytest.mark.slow
    @pytest.mark.model
    def test_the_tutorial_prints_what_it_says(tmp_path: Path) -> None:
        run(DOCS / "tutorial.md", tmp_path)
