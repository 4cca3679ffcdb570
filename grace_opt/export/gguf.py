"""``gguf``: the folded model of the target ``hf`` as a file of llama.cpp.

llama.cpp's ``llama`` has one width for keys and values, its ``mimo2`` (MiMo-V2-Flash) two, so that is what the file
calls itself, as the checkpoint does. Its layers have no biases, and one of them at least must have a sliding window:
the first has one of the whole context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError
from grace_opt.export.card import card
from grace_opt.export.hf import Unbiased, as_replaced
from grace_opt.export.process import answered, installed
from grace_opt.export.target import Checked, Record, Source
from grace_opt.files import write_text

FILE = "model.gguf"
ARCHITECTURE = "mimo2"
#: what llama.cpp calls how a byte-level BPE cuts a text: types of the pre-tokenizer's parts, as `tokenizers` has them
CUTS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}

USE = """
from xllamacpp import CommonParams, Server

params = CommonParams()
params.model.path = "FOLDER/model.gguf"  # or: llama-server -m FOLDER/model.gguf
print(Server(params).handle_completions({"prompt": "Once upon a time", "max_tokens": 16}))
"""


class GGUF(Unbiased):
    """A stock model with narrower values, in llama.cpp."""

    name = "gguf"
    expresses = "as hf, for Llama and Mistral without biases or scaled RoPE: values alone, no read-outs; in llama.cpp"
    runtime = "xllamacpp"
    tested = ("2026.10.11549",)
    program = "llama.cpp"

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        _write(self.folded(source), source, folder / FILE)
        what = (
            f"{source.name} with values of fewer channels, folded into its projections, for llama.cpp: `{FILE}`. It "
            "calls itself MiMo-V2-Flash, which has a width of values of its own there. No token stays whole."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=["gguf"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Beside the model itself with each value replaced by what it is read as."""
        runtime = installed("xllamacpp")
        exact = source.model.dtype.itemsize == 4
        asked = {"file": str((folder / FILE).resolve()), "prompt": ids, "new_tokens": new_tokens, "exact": exact}
        told = answered("grace_opt.export.gguf_decode", asked, self.program)
        return as_replaced(source, ids, runtime, told["tokens"], told["log_probabilities"])


def _write(model: Any, source: Source, path: Path) -> None:
    """The folded model's weights in its dtype (norms in float32), its sizes, and the tokenizer."""
    import torch
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from gguf.constants import Keys

    config, writer = model.config, GGUFWriter(path, ARCHITECTURE)
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    writer.add_name(source.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(0)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.v_head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_float32(Keys.Rope.FREQ_BASE_SWA.format(arch=ARCHITECTURE), theta)
    writer.add_sliding_window(config.max_position_embeddings)
    writer.add_sliding_window_pattern([index == 0 for index in range(config.num_hidden_layers)])
    _write_tokenizer(source, writer, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.MIMO2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        held = weight.cpu().contiguous()
        known = names.get_name(name, (".weight",))
        if known is None:
            raise InputError(f"llama.cpp has no place for {name} of {source.name}; use the target hf")
        if held.dim() == 1 or held.dtype == torch.bfloat16:  # numpy has no bfloat16
            held = held.float()
        writer.add_tensor(known, held.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(source: Source, writer: Any, size: int) -> None:
    """A byte-level BPE. Raises InputError for others, which llama.cpp might cut otherwise than the model's own does."""
    from gguf import TokenType

    tokenizer: Any = source.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if backend is not None else {}
    cut, bpe = told.get("pre_tokenizer") or {}, told.get("model") or {}
    parts = cut.get("pretokenizers", [cut])
    wanted = {"individual_digits": True, "add_prefix_space": False, "use_regex": True}
    plain = all(part.get(name, value) == value for part in parts for name, value in wanted.items())
    pre = CUTS.get(tuple(part.get("type") for part in parts)) if plain else None
    odd = told.get("normalizer") is not None or any(bpe.get(each) for each in ("byte_fallback", "ignore_merges"))
    if pre is None or bpe.get("type") != "BPE" or odd:
        raise InputError(
            f"the tokenizer of {source.name} is not a byte-level BPE as that of GPT-2 or SmolLM2, and might cut texts "
            "otherwise in llama.cpp; use the target hf"
        )
    added = {each["id"]: each for each in told.get("added_tokens", [])}
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = [
        TokenType.UNUSED
        if index not in known
        else TokenType.CONTROL
        if added.get(index, {}).get("special")
        else TokenType.USER_DEFINED
        if index in added
        else TokenType.NORMAL
        for index in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([known.get(index, f"[UNUSED{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    sample = tokenizer("a").input_ids
    writer.add_add_bos_token(sample[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(sample[-1:] == [tokenizer.eos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
