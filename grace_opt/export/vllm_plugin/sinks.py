"""vLLM's sliding-window cache, and the first tokens of each request beside the window.

What of a request is behind the window is freed, its first blocks are not; a prefix is found again only with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec


class SinkWindowManager(SlidingWindowManager):
    """Which blocks a request holds under a `SinkWindowSpec`."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, **more: Any) -> None:
        super().__init__(kv_cache_spec, **more)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what is behind the window, but not the first blocks."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *others: Any,
        **more: Any,
    ) -> int:
        """As of a sliding window; first blocks that are found again and that nobody holds come out of the free ones."""
        count: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *others, **more
        )
        if request_id in self.num_cached_block:
            return count
        return count + self._get_num_evictable_blocks(self._behind(new_computed_blocks, total_computed_tokens))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """As of a sliding window, with the first blocks."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        sinks = self._behind(new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens)
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _behind(self, blocks: Sequence[Any], computed: int) -> list[Any]:
        """The first blocks that a sliding window would leave out."""
        return list(blocks[: min(self.sink_blocks, self.get_num_skipped_tokens(computed) // self.block_size)])

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: SinkWindowSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **more: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """As of a sliding window, with the first blocks; nothing, if these are gone."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **more,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for index in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[index] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: SinkWindowSpec, **more: Any
    ) -> list[bool] | None:
        """As of a sliding window; the first blocks are always kept."""
        mask: list[bool] | None = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, **more
        )
        if mask is not None:
            for index in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[index - start_block] = True
        return mask


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window, and the first ``sinks`` tokens."""

    sinks: int

    @property
    def sink_blocks(self) -> int:
        """Blocks that a request never frees."""
        return -(-self.sinks // self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """As of a sliding window, and the first blocks."""
        blocks: int = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return blocks + self.sink_blocks
