"""`KVStore`: a mask's codecs over the whole cache of a prompt, in bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import JSON_NAME, load_mask, save_mask
from grace_opt.errors import InputError, shown
from grace_opt.evaluate.capture import Captured, capture
from grace_opt.export.abilities import STORED, Needs, refusals
from grace_opt.export.store.frames import AGAIN, Reader, Writer
from grace_opt.export.store.layer import LayerStore
from grace_opt.files import file_sha256, replacing
from grace_opt.graphs.observed import Observed
from grace_opt.heads import Kind
from grace_opt.reading import opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache

    from grace_opt.compression.plan import LayerPlan

Pairs = Sequence[tuple[Tensor, Tensor]]
FORMAT, VERSION = "grace-opt-kv", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS, ROWS = 1 << 28, 1 << 16  #: of a stored cache, at most


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt's cache as an engine has it that is not transformers, with what attended to it last.

    Attributes:
        past: keys and values [1, H, T, n] of each layer, post-RoPE.
        queries: of each layer, those of the last w tokens, [Hq, w, n], post-RoPE.
        scaling: of the logits.
    """

    past: Pairs
    queries: Sequence[Tensor]
    scaling: float

    def observed(self, index: int, plan: LayerPlan) -> Observed:
        """What a layer's attention saw. Raises InputError if nothing is old."""
        (keys, values), windows = self.past[index], plan.windows
        asked = self.queries[index][:, -plan.queries :]
        return Observed(asked, keys[0], values[0], self.scaling, windows.sinks, windows.recent_window, None, plan.spans)


class KVStore:
    """Encodes and decodes caches by a mask; the same mask is needed for both.

    A cache is a list of keys [B, H, T, n] and values [B, H, T, nv] for each layer of the model, post-RoPE, without
    padding. Old tokens are stored as the mask's codecs say, sinks and the recent window whole.

    Args:
        mask: of what `grace_opt.export.abilities.STORED` says.
        layers: of the model, if the mask does not say.

    Raises:
        InputError: for a mask that cannot be stored by.
    """

    def __init__(self, mask: KVMask, layers: int | None = None) -> None:
        for sentence in refusals(STORED, Needs.of_mask(mask)):
            raise InputError(f"a stored cache {sentence}")
        self.mask = mask
        count = layers if layers is not None else mask.layer_count
        self.layers = [LayerStore(mask.plan.layers.get(i), mask.num_key_value_heads, _dims(mask)) for i in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            save_mask(mask, folder)
            self.identity = file_sha256(Path(folder) / JSON_NAME)  #: of the mask, its tensors too

    @classmethod
    def open(cls, folder: str | Path) -> KVStore:
        """The store of a mask's folder, or of one that ``grace-opt export --to kv-store`` wrote. Raises InputError."""
        return cls(load_mask(folder))

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries read-outs are fitted to; 0 if none is fitted."""
        plans = [each.plan for each in self.layers if each.fits]
        return max((plan.queries for plan in plans if plan is not None), default=0)

    def nbytes(self, tokens: int, rows: int = 1, dtype: str = "bfloat16") -> int:
        """Bytes of the layers of a stored cache; its header and checksums add about a kilobyte."""
        return sum(array.nbytes for each in self.layers for array in each.arrays(rows, tokens, DTYPES[dtype]))

    # ------------------------------------------------------------ bytes

    def encode(self, kv: Captured | Prompt | Cache | Pairs, dtype: str | None = None, key: str | None = None) -> bytes:
        """All of `frames` in one."""
        return b"".join(self.frames(kv, dtype, key))

    def frames(
        self, kv: Captured | Prompt | Cache | Pairs, dtype: str | None = None, key: str | None = None
    ) -> Iterator[bytes | bytearray]:
        """A cache as bytes: a header, then a piece for each layer.

        Args:
            kv: what `prefill` gave, a `Prompt`, a transformers cache, or keys and values of each layer. A mask that
                fits its read-outs to each prompt needs one of the first two, which know what the prompt attends to.
            dtype: in which whole tokens are stored; the cache's own if left out.
            key: what it is the cache of, for whoever finds it again; `stream` compares.

        Raises:
            InputError: for a cache of another shape than the mask's model, or with a layer that has no keys and values
                of all tokens; for numbers that are not finite, or that float16 scales do not reach.
        """
        pairs = _pairs(kv)
        first = self._check(pairs)
        stored = _dtype(dtype if dtype is not None else _name(first.dtype))
        rows, tokens = first.shape[0], first.shape[2]
        writer = Writer()
        about = {"format": FORMAT, "version": VERSION, "model": self.mask.model, "mask": self.identity}
        yield writer.header(
            about
            | {"layers": len(self.layers), "rows": rows, "tokens": tokens}
            | {"dtype": _name(first.dtype), "stored": _name(stored)}
            | ({} if key is None else {"key": key})
        )
        for index, (layer, (keys, values)) in enumerate(zip(self.layers, pairs, strict=True)):
            seen: list[Any] = []
            old = [layer.old(kind, tokens) for kind in layer.groups]
            if layer.fits and any(each.stop > each.start for each in old):
                seen = [_seen(kv, layer, index)]
            arrays = layer.arrays(rows, tokens, stored)
            with torch.no_grad():
                frame = writer.frame(arrays, layer.encode(keys.cpu(), values.cpu(), stored, seen))
            yield frame  # outside: whoever takes it runs in a mode of its own

    def decode(self, source: bytes | BinaryIO, name: str = "the stored cache") -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, whole, in the dtype that they had. Raises InputError as `stream`."""
        return list(self.stream(source, name))

    def stream(
        self, source: bytes | BinaryIO, name: str = "the stored cache", key: str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `decode`, layer by layer as the bytes come.

        Each layer's checksum holds before it is given. Raises InputError for what is truncated, altered, or of another
        mask, model, version or ``key`` (if one is given); then what came before is not to be used.
        """
        reader = Reader(source, name)
        rows, tokens, dtype, stored = self._described(reader.header(), name, key)
        for index, layer in enumerate(self.layers):
            arrays = layer.arrays(rows, tokens, stored)
            with torch.no_grad():
                both = layer.decode(reader.frame(arrays, f"layer {index}"), tokens, dtype)
            yield both
        reader.end()

    def verify(self, source: bytes | BinaryIO, name: str = "the stored cache", key: str | None = None) -> int:
        """How many tokens a stored cache has, all of it read and none of it decoded. Raises InputError as `stream`."""
        reader = Reader(source, name)
        rows, tokens, _, stored = self._described(reader.header(), name, key)
        for index, layer in enumerate(self.layers):
            reader.frame(layer.arrays(rows, tokens, stored), f"layer {index}")
        reader.end()
        return tokens

    # ------------------------------------------------------------ transformers

    def prefill(self, model: PreTrainedModel, ids: Sequence[int]) -> Captured:
        """Run a prompt through a model, and keep its cache and what its last queries saw. Raises InputError."""
        self.mask.check_model(model.config, str(model.config.name_or_path))
        return capture(model, ids, len(ids), max(1, self.queries))

    def save(
        self,
        kv: Captured | Prompt | Cache | Pairs,
        path: str | Path,
        dtype: str | None = None,
        key: str | None = None,
    ) -> int:
        """Write a prompt's cache to a file, and return its bytes. The file appears when it is whole."""
        total = 0
        with replacing(path) as temporary, temporary.open("wb") as file:
            for piece in self.frames(kv, dtype, key):
                total += file.write(piece)
        return total

    def load(self, path: str | Path, device: str | torch.device = "cpu") -> DynamicCache:
        """The cache of a file, for ``past_key_values``. Raises InputError as `stream`, and where it cannot be read."""
        with opened(path) as file:
            return dynamic_cache(self.stream(file, str(path)), device)

    # ------------------------------------------------------------ checks

    def _check(self, pairs: Pairs) -> Tensor:
        """The keys of the first layer, if all layers fit them and the mask."""
        if len(pairs) != len(self.layers):
            raise InputError(f"the cache has {len(pairs)} layers, and the mask's model {len(self.layers)}; use its own")
        first = pairs[0][0]
        for index, (layer, pair) in enumerate(zip(self.layers, pairs, strict=True)):
            for kind, states in zip(layer.groups, pair, strict=True):
                wanted = (first.shape[0], layer.heads, first.shape[2], layer.dims[kind])
                if tuple(states.shape) != wanted or states.dtype != first.dtype:
                    raise InputError(
                        f"layer {index} of the cache has {kind}s of {states.dtype}{list(states.shape)}, and the mask's "
                        f"model {first.dtype}{list(wanted)}; use a cache of this model"
                    )
        if not first.shape[2] or not first.shape[0]:
            raise InputError("the cache is empty; run a prompt first")
        if first.shape[2] > TOKENS or first.shape[0] > ROWS:
            raise InputError(f"the cache has {first.shape[0]} rows of {first.shape[2]} tokens; store it in parts")
        return first

    def _described(
        self, about: dict[str, Any], name: str, key: str | None
    ) -> tuple[int, int, torch.dtype, torch.dtype]:
        """Rows, tokens and dtypes of a header. Raises InputError."""
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise InputError(
                f"{name} is of format {shown(str(about.get('format')), 40)} version "
                f"{shown(str(about.get('version')), 40)}, and version {VERSION} of {FORMAT} is read here; use the "
                "grace-opt that wrote it"
            )
        if about.get("mask") != self.identity:
            raise InputError(
                f"{name} was stored by another mask, of {shown(str(about.get('model')), 200)!r}; open it with the mask "
                "that stored it"
            )
        if key is not None and about.get("key") != key:
            raise InputError(f"{name} is the cache of another prompt or model than its name says; {AGAIN}")
        rows, tokens = about.get("rows"), about.get("tokens")
        sizes = type(rows) is int and type(tokens) is int and 0 < rows <= ROWS and 0 < tokens <= TOKENS
        dtype, stored = (DTYPES.get(str(about.get(each))) for each in ("dtype", "stored"))
        if not sizes or dtype is None or stored is None or about.get("layers") != len(self.layers):
            raise InputError(f"{name} has a header that contradicts itself; {AGAIN}")
        return cast(int, rows), cast(int, tokens), dtype, stored


def dynamic_cache(layers: Iterable[tuple[Tensor, Tensor]], device: str | torch.device) -> DynamicCache:
    """transformers' cache of the keys and values of each layer."""
    from transformers.cache_utils import DynamicCache

    past = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        past.update(keys.to(device), values.to(device), index)
    return past


def _dims(mask: KVMask) -> dict[Kind, int]:
    sizes = {codec.n for layer in mask.plan for codec in layer.codecs.get("value", ())} - {0}
    return {"key": mask.head_dim, "value": max(sizes, default=mask.head_dim)}


def _pairs(kv: Any) -> list[tuple[Tensor, Tensor]]:
    past = kv.past if isinstance(kv, Captured | Prompt) else kv
    if not hasattr(past, "layers"):
        return list(past)
    from transformers.cache_utils import DynamicLayer

    for index, layer in enumerate(past.layers):
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            raise InputError(
                f"layer {index} of the cache is a {type(layer).__name__}, which does not hold all of its tokens whole; "
                "run the prompt on a DynamicCache, of a model whose layers attend to all tokens"
            )
    return [(layer.keys, layer.values) for layer in past.layers]


def _seen(kv: Any, layer: LayerStore, index: int) -> Any:
    """What the attention of a layer saw of the prompt."""
    plan = layer.plan
    assert plan is not None
    if isinstance(kv, Prompt):
        return kv.observed(index, plan)
    if not isinstance(kv, Captured):
        raise InputError(
            "this mask fits its read-outs to what a prompt attends to, which a cache alone does not tell; store what "
            "KVStore.prefill gives, or solve with --readout static"
        )
    return kv.observed(plan.queries, plan.windows, plan.spans)[index]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"a cache of {name} cannot be stored; use one of {', '.join(DTYPES)}")
    return DTYPES[name]
