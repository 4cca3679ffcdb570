"""The model classes: vLLM's own, with each layer's attention replaced by one that runs the mask's plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import load_mask
from grace_opt.errors import InputError
from grace_opt.export.vllm_plugin.attend import Held, attend
from grace_opt.export.vllm_plugin.caches import Batch, PagedCache
from grace_opt.export.vllm_plugin.pages import Part, block_sizes, layout
from grace_opt.export.vllm_plugin.sinks import SinkWindowSpec


class CompressedAttention(nn.Module):
    """In place of a layer's `Attention`: stores rows and residuals, and attends over them."""

    def __init__(
        self, name: str, stock: Attention, parts: tuple[Part, ...], caches: tuple[PagedCache, ...], windows: tuple[int, int]
    ) -> None:
        super().__init__()
        self.name, self.parts, self.caches, self.windows = name, parts, caches, windows
        self.heads, self.kv_heads, self.size = stock.num_heads, stock.num_kv_heads, stock.head_size
        self.scaling = float(stock.impl.scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Outputs [tokens, heads D] of the step's tokens; query [tokens, heads D], key and value [tokens, KV heads D]."""
        output = torch.empty_like(query)
        torch.ops.grace_opt.attend_paged(query, key, value, output, self.name)
        return output

    def run(self, query: Tensor, states: tuple[Tensor, Tensor], output: Tensor, batches: list[Batch]) -> None:
        """Store the states of a step's tokens and write their outputs."""
        tokens = batches[0].ends[-1]
        grouped = query[:tokens].view(tokens, self.kv_heads, -1, self.size)
        outs = output[:tokens].view(tokens, self.kv_heads, -1, self.size)
        each = [side[:tokens].view(tokens, self.kv_heads, self.size) for side in states]
        for part in self.parts:
            heads = list(part.heads)
            views = self._store(part, [side[:, heads].transpose(0, 1) for side in each], batches)
            for low, high, length, blocks in _requests(batches):
                held = Held(views[0], views[-1], blocks[0], blocks[-1])
                outs[low:high, heads] = attend(part, grouped[low:high, heads], held, length, *self.windows, self.scaling)

    def _store(self, part: Part, states: list[Tensor], batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
        """Put the states [heads, tokens, D] of a step where they belong; the part's views of the caches."""
        views = []
        for cache, batch, places in zip(self.caches, batches, (part.rows, part.residuals), strict=False):
            views.append((places[0].of(cache.pages, cache.block), places[1].of(cache.pages, cache.block)))
        for side, (codec, each) in enumerate(zip(part.codecs, states, strict=True)):
            rows = codec.encode(each)
            numbers = [rows, codec.residual(each, rows)] if len(views) > 1 else [rows]
            for view, batch, some in zip(views, batches, numbers, strict=True):
                view[side][batch.block, batch.inside] = some.transpose(0, 1)
        return views


def _requests(batches: list[Batch]) -> Any:
    """Of each request with tokens in this step: where they begin and end, its length, its blocks in each cache."""
    low = 0
    for index, (high, length) in enumerate(zip(batches[0].ends, batches[0].lengths, strict=True)):
        if high > low:
            yield low, high, length, [batch.blocks[index] for batch in batches]
        low = high


@torch.library.custom_op("grace_opt::attend_paged", mutates_args=["output"])
def _attend_paged(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer: str) -> None:
    """One opaque operation for torch.compile, as vLLM's own attention is."""
    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM tries how much memory a step takes, before there is a cache
        output.zero_()
        return
    attention = context.no_compile_layers[layer]
    batches = [context.attn_metadata[cache.name] for cache in attention.caches]
    attention.run(query, (key, value), output, batches)


def install(model: nn.Module, vllm_config: Any) -> None:
    """Replace the attention of every layer by one that runs the plan of the mask in the model's folder.

    Raises InputError for a mask of another model, and for settings that the plug-in does not run.
    """
    mask = _mask(vllm_config)
    found = {name: each for name, each in model.named_modules() if isinstance(each, Attention)}
    first = next(iter(found.values()))
    _check(vllm_config, mask, list(found.values()))
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layers, n = len(found), mask.head_dim
    shares = [_heads(each, ranks, mask.num_key_value_heads, first.num_kv_heads) for each in range(ranks)]
    layouts = [layout(mask.plan, layers, heads, n) for heads in shares]
    placed, like = layouts[rank], torch.empty(0, dtype=vllm_config.model_config.dtype)
    caches = _caches(
        max(each.rows for each in layouts), max(each.residuals for each in layouts), mask, vllm_config.model_config.dtype
    )
    context = vllm_config.compilation_config.static_forward_context
    for cache in caches:
        context[cache.name] = cache
    for name, stock in found.items():
        index = extract_layer_index(stock.layer_name)
        parts = tuple(_moved(part, like) for part in placed.layers[index])
        windows = mask.plan.layers[index].windows if index in mask.plan.layers else mask.windows
        ours = CompressedAttention(
            stock.layer_name, stock, parts, caches, (windows.recent_window, windows.sinks)
        )
        context[stock.layer_name] = ours
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ours)


def _heads(rank: int, ranks: int, total: int, held: int) -> list[int]:
    """The KV heads of a rank, as vLLM deals them out."""
    first = rank * held if total >= ranks else rank * total // ranks
    return list(range(first, first + held))


def _moved(part: Part, like: Tensor) -> Part:
    key, value = (codec.to(like) for codec in part.codecs)
    return Part(part.heads, (key, value), part.rows, part.residuals)


def _caches(rows: int, residuals: int, mask: KVMask, dtype: torch.dtype) -> tuple[PagedCache, ...]:
    """Of rows, and of residuals if there are any."""
    windows = [layer.windows for layer in mask.plan]
    recent, sinks = max(1, *(each.recent_window for each in windows)), max(each.sinks for each in windows)
    blocks = block_sizes(rows, residuals, recent + sinks)
    page = max(blocks[0] * rows, blocks[1] * residuals) * dtype.itemsize
    alike = {"num_kv_heads": 1, "head_size_v": 0, "dtype": dtype, "page_size_padded": page}
    caches = [PagedCache("rows.0", FullAttentionSpec(block_size=blocks[0], head_size=rows, **alike))]
    if residuals:
        spec = SinkWindowSpec(
            block_size=blocks[1], head_size=residuals, sliding_window=recent, sinks=sinks, **alike
        )
        caches.append(PagedCache("residuals.1", spec))
    return tuple(caches)


def _mask(vllm_config: Any) -> KVMask:
    folder = Path(vllm_config.model_config.model)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give vLLM the folder that grace-opt export wrote")
    mask = load_mask(folder)
    mask.check_model(vllm_config.model_config.hf_config, str(folder))
    return mask


def _check(vllm_config: Any, mask: KVMask, layers: list[Attention]) -> None:
    """Raise InputError for what the plug-in does not run."""
    from vllm.platforms import current_platform

    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    wrong = [
        (vllm_config.cache_config.cache_dtype not in ("auto", "float32", "bfloat16", "float16"), "a quantised KV cache (kv_cache_dtype)"),
        (scheduler.disable_hybrid_kv_cache_manager, "a cache without groups (disable_hybrid_kv_cache_manager)"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.decode_context_parallel_size > 1, "context parallelism"),
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (vllm_config.kv_transfer_config is not None, "a KV connector"),
        (not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager, "CUDA graphs (give --enforce-eager)"),
        (any(layer.sliding_window is not None for layer in layers), "layers that attend in a sliding window"),
    ]
    for is_so, what in wrong:
        if is_so:
            raise InputError(f"models that grace-opt exported do not run with {what} in vLLM; leave it out")


class _Compressed:
    """A stock model class with the attention of its layers replaced."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        install(self, vllm_config)  # type: ignore[arg-type]


class CompressedLlama(_Compressed, LlamaForCausalLM):
    """Llama, and models of its shape."""


class CompressedMistral(_Compressed, MistralForCausalLM):
    """Mistral."""


class CompressedQwen2(_Compressed, Qwen2ForCausalLM):
    """Qwen2: biases in the projections."""


class CompressedQwen3(_Compressed, Qwen3ForCausalLM):
    """Qwen3: norms of queries and keys."""
