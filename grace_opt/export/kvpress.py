"""``kvpress``: a press that applies a mask, for kvpress' evaluations and its leaderboard."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from grace_opt.compression.mask_file import save_mask
from grace_opt.export.abilities import STORED
from grace_opt.export.card import card
from grace_opt.export.checkpoint import save_checkpoint
from grace_opt.export.kv_store import KVStoreTarget, without_integers
from grace_opt.export.process import answered, installed
from grace_opt.export.target import Checked, Record, Source, Target, compared
from grace_opt.files import write_text
from grace_opt.versions import distribution_version

CODE = '''\
"""A press of kvpress by the mask beside this file. Written by grace-opt {version}.

from press import press
with press(model): ...
"""

from pathlib import Path

from grace_opt.export.kvpress_press import MaskPress

press = MaskPress(Path(__file__).resolve().parent)
'''

USE = """
from kvpress import KVPressTextGenerationPipeline  # registers the pipeline "kv-press-text-generation"
from transformers import pipeline

from press import press  # of this folder

pipe = pipeline("kv-press-text-generation", model={name})
print(pipe("A long context ...", question="A question?", press=press)["answer"])
"""


class KVPress(Target):
    """A press file beside the mask."""

    name = "kvpress"
    expresses = "what kv-store does, applied to a prompt's cache at full width: the quality of a mask, no memory saved"
    runtime = "kvpress"
    tested = ("0.5.5",)
    can = replace(STORED, models=("llama", "mistral", "phi3", "qwen2", "qwen3"), sliding_layers=False)

    def measure(self, source: Source) -> Record:
        """As of a stored prompt: the same codecs, read back to full width."""
        return KVStoreTarget().measure(source)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        write_text(folder / "press.py", CODE.format(version=distribution_version("grace-opt")))
        write_text(folder / "requirements.txt", f"grace-opt>={distribution_version('grace-opt')}\nkvpress==0.5.5\n")
        what = (
            "A press of kvpress: a prompt's old keys and values become what the mask holds of them, read back to full "
            "width. It shows the quality of the mask beside other presses; kvpress saves no memory by it."
        )
        use = USE.format(name=repr(source.name))
        write_text(folder / "README.md", card(source, measured, what=what, use=use, tags=["kvpress"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Without integers, as of the target kv-store. In a process of its own: kvpress wraps every attention function.

        The prompt is pressed up to its last token, which is decoded with.
        """
        import torch

        runtime = installed("kvpress")
        mask = without_integers(source.mask)
        with tempfile.TemporaryDirectory() as work:
            press, model = Path(work, "press"), Path(work, "model")
            save_mask(mask, press)
            shutil.copy(folder / "press.py", press)
            save_checkpoint(source, source.model, model)
            asked: dict[str, Any] = {"folder": str(press), "model": str(model), "ids": ids, "new_tokens": new_tokens}
            asked["dtype"] = str(source.model.dtype).removeprefix("torch.")
            told = answered("grace_opt.export.kvpress_press", asked, "kvpress")
        scores = torch.tensor(told["log_probabilities"])
        ours = replace(source, mask=mask)
        return compared(ours, ids, runtime, told["tokens"], scores, prompt=len(ids) - 1)
