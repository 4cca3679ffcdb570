"""A cache layer whose KV heads differ in the codecs' signatures, or hold tokens of their own: `PrunedLayer`s."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from grace_opt.compression.plan import LayerPlan
from grace_opt.graphs.observed import Index, OutputProjection, index_of, queries_of
from grace_opt.models.rotary import Turn
from grace_opt.runtime.handle import RaggedHandle
from grace_opt.runtime.layer import PrunedLayer, shapes_of
from grace_opt.runtime.prompt import Staying, observed, staying


class RaggedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Heads of one signature (of keys, and of values) side by side, as a pruned layer; nothing is padded.

    Under a token policy ``per_head`` each head is a part, with as many tokens as it keeps.

    ``plan``: of the whole layer; ``heads``: the KV heads of each part; ``parts``: their layers. One part of no heads
    becomes a part for each when the first tokens come, and says how many there are.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, plan: LayerPlan, heads: Sequence[Sequence[int]], parts: Sequence[PrunedLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.index = plan, plan.index
        self.heads = [torch.tensor(each) for each in heads]
        self.parts = list(parts)
        self.picked: list[Index] = []  #: the same as ``heads``, known with their device
        self._queries: dict[int, list[Index]] = {}
        self.is_compileable = parts[0].is_compileable

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come."""
        return self.parts[0].is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """The base class sets it on creation; the parts know better."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.parts[0].dtype

    @property
    def offloading(self) -> bool:
        """Whether the tensors stay on the CPU between uses."""
        return self.parts[0].offloading

    @offloading.setter
    def offloading(self, value: bool) -> None:
        for part in self.parts:
            part.offloading = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As of `PrunedLayer`."""
        self.plan.check(key_states, value_states)
        self.shapes = shapes_of(key_states, value_states)
        if not len(self.heads[0]):
            self._split(key_states.shape[1])
        self.heads = [heads.to(key_states.device) for heads in self.heads]
        self.picked = [index_of(heads) for heads in self.heads]
        for heads, part in zip(self.picked, self.parts, strict=True):
            part.lazy_initialization(key_states[:, heads], value_states[:, heads])

    def _split(self, heads: int) -> None:
        (one,) = self.parts
        self.heads, self.parts = [torch.tensor([head]) for head in range(heads)], []
        for head in range(heads):
            part = copy.copy(one)
            part.plan = self.plan.part([head])
            part.reset()
            self.parts.append(part)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store new tokens [B, Hkv, n, D]; returns a handle that only `attention` can read, for keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handles = [
            part.update(key_states[:, heads], value_states[:, heads])[0]
            for heads, part in zip(self.picked, self.parts, strict=True)
        ]
        handle = RaggedHandle(self, handles)
        if handles[0].prompt is not None:
            handle.prompt = key_states, value_states
        return handle, handle

    def begin(self, query: Tensor, scaling: float, mask: Tensor | None, output: OutputProjection | None = None) -> None:
        """As of `PrunedLayer`; a token policy sees all heads of the layer."""
        if not self.parts[0].waits:
            return
        stays: Sequence[Staying | None] = self._staying(query, scaling, mask) or [None]
        if len(stays) < len(self.parts):
            stays = [*stays] * len(self.parts)
        for asked, part, stay in zip(self.queries(query.shape[1]), self.parts, stays, strict=True):
            part.begin(query[:, asked], scaling, mask, output and output.part(asked), stay)

    def queries(self, count: int) -> list[Index]:
        """Which of ``count`` query heads each part answers."""
        if count not in self._queries:
            group = count // sum(map(len, self.heads))
            self._queries[count] = [queries_of(heads, group) for heads in self.picked]
        return self._queries[count]

    def joined(self, outs: Sequence[Tensor]) -> Tensor:
        """What the parts say, [B, n, _, D] each, as [B, n, Hq, D]."""
        starts = [each.start for each in self.picked if isinstance(each, slice)]
        if len(starts) == len(outs):
            return torch.cat(
                [out for _, out in sorted(zip(starts, outs, strict=True), key=lambda pair: pair[0])], dim=2
            )
        whole = torch.cat(list(outs), dim=2)
        heads = torch.arange(whole.shape[2], device=whole.device)
        return whole[:, :, torch.cat([heads[asked] for asked in self.queries(len(heads))]).argsort()]

    def _staying(self, query: Tensor, scaling: float, mask: Tensor | None) -> list[Staying] | None:
        """What the policy says of the whole layer, or of each head."""
        if self.plan.tokens is None:
            return None
        prompts = [part.prompt for part in self.parts]
        order = torch.cat(self.heads).argsort()
        keys, values = (torch.cat(each, dim=1)[:, order] for each in zip(*prompts, strict=True))
        first = self.parts[0].first_of(mask)
        return staying(self.plan, observed(self.plan, keys, values, query, scaling, first, None), keys.shape[2])

    def done(self) -> None:
        """The attention of the tokens that came last was computed."""
        self._each(lambda part: part.done())

    def unbroken(self) -> int | None:
        """As of `PrunedLayer`."""
        return min((each for each in (part.unbroken() for part in self.parts) if each is not None), default=None)

    @property
    def turn(self) -> Turn | None:
        """As of `PrunedLayer`."""
        return self.parts[0].turn

    @turn.setter
    def turn(self, value: Turn | None) -> None:
        for part in self.parts:
            part.turn = value

    @property
    def stepwise(self) -> bool:
        """As of `PrunedLayer`."""
        return self.parts[0].stepwise

    @stepwise.setter
    def stepwise(self, value: bool) -> None:
        for part in self.parts:
            part.stepwise = value

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def full_nbytes(self) -> int:
        """Bytes of as many whole keys and values, without growth space."""
        return sum(part.full_nbytes() for part in self.parts)

    def get_seq_length(self) -> Any:
        """How many tokens have come."""
        return self.parts[0].get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """As of `PrunedLayer`."""
        return self.parts[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """As of `PrunedLayer`."""
        return self.parts[0].get_max_length()

    get_max_cache_shape = get_max_length  # its name in transformers before 5.10

    def removable(self, tokens_to_remove: int) -> int:
        """As of `PrunedLayer`."""
        return max(part.removable(tokens_to_remove) for part in self.parts)

    def _each(self, call: Callable[[PrunedLayer], None]) -> None:
        for part in self.parts:
            call(part)

    def reset(self) -> None:
        """Forget all tokens."""
        self._each(lambda part: part.reset())

    def crop(self, tokens_to_remove: int) -> None:
        """As of `PrunedLayer`."""
        self._each(lambda part: part.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row b becomes what row beam_idx[b] was."""
        self._each(lambda part: part.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._each(lambda part: part.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given rows."""
        self._each(lambda part: part.batch_select_indices(indices))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda part: part.offload())

    def prefetch(self) -> None:
        """Move everything back."""
        self._each(lambda part: part.prefetch())
