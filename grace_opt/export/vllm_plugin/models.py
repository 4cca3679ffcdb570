"""The model classes: vLLM's own, with each layer's attention replaced by one that runs the mask's plan."""

from __future__ import annotations

from collections.abc import Iterator
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
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from grace_opt.compression.codec import Codec
from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import load_mask
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan
from grace_opt.errors import InputError
from grace_opt.export.vllm_plugin.attend import Held, attend
from grace_opt.export.vllm_plugin.caches import Batch, PagedCache
from grace_opt.export.vllm_plugin.decoding import Decoder, decodes
from grace_opt.export.vllm_plugin.pages import Part, block_sizes, layout
from grace_opt.export.vllm_plugin.sinks import SinkWindowSpec

DTYPES = ("float32", "bfloat16", "float16")  #: of a cache that is not quantised


class CompressedAttention(nn.Module):
    """In place of a layer's `Attention`: stores rows and residuals, and attends over them.

    Args:
        stock: what it replaces.
        parts: of the layer, their codecs on the model's device.
        windows: the recent window, and the sinks.
        caches: of rows, and of residuals if there are any.
    """

    def __init__(
        self, stock: Attention, parts: tuple[Part, ...], windows: Windows, caches: tuple[PagedCache, ...]
    ) -> None:
        super().__init__()
        self.name, self.parts, self.windows, self.caches = stock.layer_name, parts, windows, caches
        self.decoders: dict[Part, Decoder] = {}
        self.kv_heads, self.size, self.scaling = stock.num_kv_heads, stock.head_size, float(stock.impl.scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Outputs [tokens, Hq D] of a step's tokens; query [tokens, Hq D], key and value [tokens, Hkv D]."""
        output = torch.empty_like(query)
        torch.ops.grace_opt.attend_paged(query, key, value, output, self.name)
        return output

    def run(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, batches: list[Batch]) -> None:
        """Store the keys and values of a step's tokens, and write the outputs; ``batches``: of each cache."""
        asked, keys, values, outs = (
            each[: batches[0].ends[-1]].view(batches[0].ends[-1], self.kv_heads, -1, self.size)
            for each in (query, key, value, output)
        )
        for part in self.parts:
            heads = list(part.heads)
            views = [
                [place.of(cache.pages, cache.block) for place in places]
                for cache, places in zip(self.caches, (part.rows, part.residuals), strict=False)
            ]
            for side, states in enumerate((keys, values)):
                _store(part.codecs[side], states[:, heads, 0].transpose(0, 1), [each[side] for each in views], batches)
            decoded = self._decode(part, asked, outs, batches)
            for low, high, length, blocks in _requests(batches):
                if decoded and high - low == 1:
                    continue
                held = Held(views[0], views[-1], blocks[0], blocks[-1])
                outs[low:high, heads] = attend(part, asked[low:high, heads], held, length, self.windows, self.scaling)

    def _decode(self, part: Part, asked: Tensor, outs: Tensor, batches: list[Batch]) -> bool:
        """Write the outputs of all requests of which one token came, if the kernel runs here; else say so."""
        tokens, caches = [batches[0].ends[request] - 1 for request in batches[0].single], self.caches
        if not tokens or not decodes(asked.dtype, asked.device):
            return False
        if part not in self.decoders:
            self.decoders[part] = Decoder(part, asked.shape[2], asked.dtype)
        pages, sizes = [cache.pages for cache in caches], (caches[0].block, caches[-1].block)
        at = batches[0].lying(batches[-1], sizes, self.windows)
        where = torch.tensor(tokens)[:, None], torch.tensor(part.heads)
        outs[where] = self.decoders[part].attend(asked[where], pages, sizes, at, self.scaling)
        return True


def _store(codec: Codec, states: Tensor, views: list[Tensor], batches: list[Batch]) -> None:
    """Put keys or values [heads, tokens, D] of a step where they belong in each cache [blocks, block, heads, _]."""
    rows = codec.encode(states)
    numbers = [rows] if len(views) == 1 else [rows, codec.residual(states, rows)]
    for view, batch, each in zip(views, batches, numbers, strict=True):
        view[batch.block, batch.inside] = each.transpose(0, 1)


def _requests(batches: list[Batch]) -> Iterator[tuple[int, int, int, list[Tensor]]]:
    """Of each request in a step: its tokens there from .. to, how many it has in all, its blocks in each cache."""
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
    attention.run(query, key, value, output, batches)


def install(model: nn.Module, vllm_config: Any) -> None:
    """Replace the attention of every layer by one that runs the plan of the mask in the model's folder.

    Raises InputError for a mask of another model, and for settings that the plug-in does not run.
    """
    found = {name: each for name, each in model.named_modules() if isinstance(each, Attention)}
    _check(vllm_config, list(found.values()))
    mask, dtype = _mask(vllm_config), vllm_config.model_config.dtype
    held, ranks = next(iter(found.values())).num_kv_heads, get_tensor_model_parallel_world_size()
    shares = [_heads(rank, ranks, mask.num_key_value_heads, held) for rank in range(ranks)]
    layouts = [layout(mask.plan, len(found), heads, mask.head_dim) for heads in shares]
    # Blocks are of one size in all ranks.
    caches = _caches(max(each.rows for each in layouts), max(each.residuals for each in layouts), mask.plan, dtype)
    layers = layouts[get_tensor_model_parallel_rank()].layers
    context = vllm_config.compilation_config.static_forward_context
    context.update({cache.name: cache for cache in caches})
    like = torch.empty(0, dtype=dtype)  # on the device that vLLM makes the model on
    for name, stock in found.items():
        index = extract_layer_index(stock.layer_name)
        parts = tuple(part.to(like) for part in layers[index])
        windows = mask.plan.layers[index].windows if index in mask.plan.layers else mask.windows
        parent, _, attribute = name.rpartition(".")
        ours = CompressedAttention(stock, parts, windows, caches)
        setattr(model.get_submodule(parent), attribute, ours)
        context[ours.name] = ours


def _heads(rank: int, ranks: int, total: int, held: int) -> list[int]:
    """The KV heads of a rank, as vLLM deals them out."""
    first = rank * held if total >= ranks else rank * total // ranks
    return list(range(first, first + held))


def _caches(rows: int, residuals: int, plan: CachePlan, dtype: torch.dtype) -> tuple[PagedCache, ...]:
    """Of so many rows' numbers a token, and of residuals if there are any. Layers are numbered for vLLM's sake."""
    recent = max(1, *(layer.windows.recent_window for layer in plan))
    sinks = max(layer.windows.sinks for layer in plan)
    blocks = block_sizes(rows, residuals, recent + sinks)
    page = max(blocks[0] * rows, blocks[1] * residuals) * dtype.itemsize
    alike = {"num_kv_heads": 1, "head_size_v": 0, "dtype": dtype, "page_size_padded": page}
    caches = [PagedCache("rows.0", FullAttentionSpec(block_size=blocks[0], head_size=rows, **alike))]
    if residuals:
        spec = SinkWindowSpec(block_size=blocks[1], head_size=residuals, sliding_window=recent, sinks=sinks, **alike)
        caches.append(PagedCache("residuals.1", spec))
    return tuple(caches)


def _mask(vllm_config: Any) -> KVMask:
    folder = Path(vllm_config.model_config.model)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give vLLM the folder that grace-opt export wrote")
    mask = load_mask(folder)
    mask.check_model(vllm_config.model_config.hf_config, str(folder))
    return mask


def _check(vllm_config: Any, layers: list[Attention]) -> None:
    """Raise InputError for what the plug-in does not run."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    wrong = {
        "a quantised KV cache (kv_cache_dtype)": vllm_config.cache_config.cache_dtype not in ("auto", *DTYPES),
        "one block table (disable_hybrid_kv_cache_manager)": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "graphs on a card (give --enforce-eager)": not (current_platform.is_cpu() or model.enforce_eager),
        "layers that attend in a sliding window": any(layer.sliding_window is not None for layer in layers),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise InputError(f"vLLM cannot run a model that grace-opt exported with {what}; leave it out")


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
