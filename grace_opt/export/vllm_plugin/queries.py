"""The last queries of prompts, as vLLM's attention layers are asked them: what read-outs of a prompt are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention


@dataclass(frozen=True)
class Save:
    """A prompt of which a step brings tokens, and that is to be stored under a name once its last has come.

    Attributes:
        request, name: of the request in vLLM, and in the folder of stores.
        blocks: of its first ``tokens`` tokens, which they hold.
        start, stop: the tokens of the request that this step computes.
    """

    request: str
    name: str
    blocks: tuple[int, ...]
    tokens: int
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether all of its tokens are there after the step."""
        return self.stop >= self.tokens


@dataclass(frozen=True)
class _Held:
    queries: list[Tensor]  # of each layer, [Hq, w, n]
    seen: Tensor  # bool[w]


class LastQueries:
    """Keeps the last ``count`` queries of prompts, by hooks on the attention layers; a step may bring some of them.

    A compiled model runs no hooks.
    """

    def __init__(self, layers: Sequence[Attention], block: int, count: int) -> None:
        self._layers, self._block, self._count = layers, block, count
        self._held: dict[str, _Held] = {}
        self._saves: Sequence[Save] = ()
        self._rows: list[tuple[_Held, Tensor, Tensor]] | None = None
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._see, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def begin(self, saves: Sequence[Save]) -> None:
        """Before each step."""
        self._saves, self._rows = saves, None

    def take(self, request: str) -> list[Tensor] | None:
        """The last queries of a prompt in each layer, on the CPU, once; None if not all of them were computed here."""
        held = self._held.pop(request, None)
        return [each.cpu() for each in held.queries] if held is not None and bool(held.seen.all()) else None

    def forget(self, requests: set[str]) -> None:
        """Of requests that ended."""
        for request in requests & self._held.keys():
            del self._held[request]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _see(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._saves:
            return
        query = (args[0] if args else kwargs["query"]).view(-1, layer.num_heads, layer.head_size)
        if self._rows is None:
            self._rows = [self._wanted(save, layer, query) for save in self._saves]
        for held, rows, places in self._rows:
            held.queries[index][:, places] = query[rows].transpose(0, 1)

    def _wanted(self, save: Save, layer: Any, query: Tensor) -> tuple[_Held, Tensor, Tensor]:
        """Which of a step's queries are among a prompt's last ones, and which of those."""
        count = min(self._count, save.tokens)
        if save.request not in self._held:
            queries = [query.new_zeros(layer.num_heads, count, layer.head_size) for _ in self._layers]
            self._held[save.request] = _Held(queries, torch.zeros(count, dtype=torch.bool))
        held, first = self._held[save.request], save.tokens - count
        at = torch.arange(max(first, save.start), min(save.tokens, save.stop))
        slots = torch.tensor(save.blocks)[at // self._block] * self._block + at % self._block
        written = get_forward_context().slot_mapping[layer.layer_name]  # where each token of the step is put
        found = written.cpu() == slots[:, None]
        held.seen[at - first] = found.any(1)
        return held, found.int().argmax(1).to(query.device), (at - first).to(query.device)
