"""The two caches of a model in vLLM: what vLLM allocates and fills block tables for, and how a layer reaches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from grace_opt.compression.method import Windows
from grace_opt.export.vllm_plugin.decoding import Stretches


@dataclass(frozen=True, eq=False)
class Batch(AttentionMetadata):
    """Where the tokens of a step lie in one of the caches.

    Attributes:
        ends: one past each request's last token in the step, of all the tokens of the step.
        lengths: tokens of each request, those of this step with it.
        blocks: int[requests, _], the blocks of each request in order.
        block, inside: int64[tokens], the block of each token of the step, and its place there.
        stretches: what `lying` found.
    """

    ends: list[int]
    lengths: list[int]
    blocks: Tensor
    block: Tensor
    inside: Tensor
    stretches: dict[Windows, Stretches] = field(default_factory=dict)

    @property
    def single(self) -> list[int]:
        """The requests of which one token came."""
        return [request for request, (low, high) in enumerate(pairwise([0, *self.ends])) if high - low == 1]

    def lying(self, other: Batch, blocks: tuple[int, int], windows: Windows) -> Stretches:
        """Where the tokens of `single` requests lie in this cache and another. Found once a step."""
        if windows not in self.stretches:
            tables = [each.blocks[self.single].numpy().astype(np.int64) for each in (self, other)]
            lengths = [self.lengths[request] for request in self.single]
            self.stretches[windows] = Stretches.of(lengths, (tables[0], tables[1]), blocks, windows)
        return self.stretches[windows]


class Builder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch` of what vLLM says of a step."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """The batch of a step."""
        about, block = common_attn_metadata, self.kv_cache_spec.block_size
        ends = about.query_start_loc_cpu[1 : about.num_reqs + 1].tolist()
        slots = about.slot_mapping[: ends[-1]]
        return Batch(
            ends,
            about.seq_lens[: about.num_reqs].tolist(),
            about.block_table_tensor,
            slots // block,
            slots % block,
        )


class Backend(AttentionBackend):
    """What vLLM asks of a layer's attention; the model's layers attend themselves (`CompressedAttention`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "GRACE_OPT"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class PagedCache(AttentionLayerBase):
    """One of the two caches, for all layers of the model: vLLM sees it as a layer of its own.

    ``pages`` [blocks, numbers of a block]: what vLLM allocated.
    """

    pages: Tensor

    def __init__(self, name: str, spec: AttentionSpec) -> None:
        self.name, self.spec, self.kv_cache = name, spec, torch.tensor([])

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int(self.spec.block_size)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take what vLLM allocated: [blocks, 1, tokens, numbers of a token]."""
        self.kv_cache, self.pages = kv_cache, kv_cache.flatten(1)

    def get_attn_backend(self) -> type[Backend]:
        """`Backend`."""
        return Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> AttentionSpec:
        """What to allocate."""
        return self.spec
