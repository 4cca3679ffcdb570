"""A press of kvpress that applies a mask to a prompt's cache. Imported where kvpress is installed, and nowhere else.

python -m grace_opt.export.kvpress_press ASKED ANSWER      decodes with it, for `grace_opt.export.kvpress`

kvpress knows caches of full width: what a mask drops of a token is read back from what it keeps, so the quality is that
of the mask and no memory is saved.
"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_query_states
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from grace_opt.export.store import KVStore
from grace_opt.graphs.observed import Observed
from grace_opt.heads import KINDS

if TYPE_CHECKING:
    from grace_opt.export.store.layer import LayerStore


@dataclass
class MaskPress(BasePress):  # type: ignore[misc]
    """Old tokens of a prompt as a mask holds them; its sinks and recent window, and what is generated, stay whole.

    Args:
        mask: its folder, of the model that is pressed.

    Raises:
        InputError: for a mask that stored caches cannot be made by (`grace_opt.export.abilities.STORED`).
    """

    mask: str | Path

    @cached_property
    def store(self) -> KVStore:
        """Which holds prompts by the mask."""
        return KVStore.open(self.mask)

    @property
    def compression_ratio(self) -> float:
        """Numbers of an old token that are not held, as a fraction; bits are not counted."""
        plan, layers = self.store.mask.plan, self.store.mask.layer_count
        kept = [
            sum(codec.width / codec.n for codec in plan.layers[i].codecs[kind]) / len(plan.layers[i].codecs[kind])
            if i in plan.layers and kind in plan.layers[i].codecs
            else 1.0
            for i in range(layers)
            for kind in KINDS
        ]
        return 1 - sum(kept) / len(kept)

    def post_init_from_model(self, model: Any) -> None:
        """Raises InputError for a model that the mask was not made for."""
        self.store.mask.check_model(model.config, str(model.config.name_or_path))

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, n] and values [B, H, T, nv] as they come back from the mask's codecs. Rows have no padding."""
        layer = self.store.layers[module.layer_idx]
        old = [layer.old(kind, keys.shape[2]) for kind in layer.groups]
        seen = []
        if layer.fits and any(each.stop > each.start for each in old):
            seen = _observed(layer, module, hidden_states, keys, values, kwargs["position_embeddings"])
        dtype = keys.dtype
        back = layer.decode(layer.encode(keys.cpu(), values.cpu(), dtype, seen), keys.shape[2], dtype)
        return back[0].to(keys.device), back[1].to(values.device)


def _observed(
    layer: LayerStore, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, rotary: tuple[Tensor, Tensor]
) -> list[Observed]:
    """For each row, what the prompt's last queries attend to."""
    plan = layer.plan
    assert plan is not None
    last = slice(-plan.queries, None)
    cos, sin = (each[:, last].unsqueeze(1) for each in rotary)
    queries = get_prerope_query_states(module, hidden[:, last])
    queries = queries * cos + rotate_half(queries) * sin  # type: ignore[no-untyped-call]
    windows = plan.windows
    return [
        Observed(*row, module.scaling, windows.sinks, windows.recent_window, spans=plan.spans)
        for row in zip(queries.cpu(), keys.cpu(), values.cpu(), strict=True)
    ]


def main(asked: str, answer: str) -> None:
    """Decode greedily after a pressed prompt, and write tokens and their scores.

    ``asked``, JSON: ``folder`` (of an export), ``model``, ``dtype``, ``ids``, ``new_tokens``.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    loaded: Any = AutoModelForCausalLM
    model = loaded.from_pretrained(told["model"], dtype=getattr(torch, told["dtype"])).eval()
    press = runpy.run_path(str(Path(told["folder"], "press.py")))["press"]
    past, tokens, scores = DynamicCache(), [], []
    *prompt, last = told["ids"]
    with torch.inference_mode():
        with press(model):
            model(torch.tensor([prompt]), past_key_values=past)
        for _ in range(told["new_tokens"]):
            row = model(torch.tensor([[last]]), past_key_values=past).logits[0, -1].float().log_softmax(-1)
            last = int(row.argmax())
            tokens.append(last)
            scores.append(float(row[last]))
    Path(answer).write_text(json.dumps({"tokens": tokens, "log_probabilities": scores}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
