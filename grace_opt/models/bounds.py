"""A model folder's own numbers, held against what its files hold, before a library makes anything of them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError, shown
from grace_opt.heads import LAYERS
from grace_opt.reading import read_json
from grace_opt.tensor_file import tensor_file

NUMBER_LIMIT = 2**31  #: of a size in a configuration
WEIGHTS_A_BYTE = 16  #: that a checkpoint may hold at most, with room for any packing
SMALL = 1 << 24  #: weights that need no file to bear them out

_LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"}
_WIDTHS = {"hidden_size", "n_embd", "d_model"}
_BESIDE_WIDTH = {
    "vocab_size",
    "n_positions",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "moe_intermediate_size",
} | _LAYERS
_NO_SIZES = ("token_id", "token_ids", "token_index", "seed", "model_max_length")
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")  #: what transformers opens by itself


def check_config(source: str) -> None:
    """Look at a folder's configuration; a hub id passes. Raises InputError with a reason.

    For what is no file, a configuration that is no object, and sizes that no model has or that the folder's weights
    cannot bear out: a number of layers alone makes a library build them all.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    held = 0
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ or not path.exists():
            continue
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise InputError(f"{path.name} is a pipe or a device, and no file")
        held += about.st_size if path.suffix in (".safetensors", ".bin") else 0
    config = read_json(folder / "config.json", strict=False)
    if not isinstance(config, dict):
        raise InputError("config.json is not an object")
    for part in _parts(config):
        _check_part(part, max(WEIGHTS_A_BYTE * held, SMALL))


def check_weights(source: str) -> None:
    """Look at the headers of a folder's safetensors files; a hub id passes. Raises InputError with a reason."""
    folder = Path(source)
    if not folder.is_dir():
        return
    config, tensors = read_json(folder / "config.json", strict=False), 0
    with ExitStack() as files:
        for path in sorted(folder.glob("model*.safetensors")):
            tensors += len(files.enter_context(tensor_file(path)))
    for name, value in _sizes(config) if tensors else ():
        if name in _LAYERS and value > tensors:
            raise InputError(f"the configuration says {name} = {value}, and the weights have {tensors} tensors")


def _check_part(part: dict[str, Any], most: int) -> None:
    sizes = dict(_sizes(part))
    for name, value in _sizes(part):
        limit = LAYERS if name in _LAYERS else NUMBER_LIMIT
        if not -limit <= value <= limit:
            raise InputError(f"the configuration says {shown(name, 60)} = {_short(value)}, which no model has")
    for width in (sizes[name] for name in _WIDTHS if name in sizes):
        for name in _BESIDE_WIDTH & sizes.keys():
            if width * sizes[name] > most:
                raise InputError(f"the configuration says {name} = {sizes[name]}, for more weights than the files hold")


def _sizes(part: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a part of a configuration, also those in lists (a number a layer)."""
    for name, value in part.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and not isinstance(each, bool) and not name.endswith(_NO_SIZES):
                yield name, each


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those within it: of the language model, of an encoder."""
    yield config
    for value in config.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from _parts(each)


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
