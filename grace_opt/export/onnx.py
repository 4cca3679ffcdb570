"""``onnx``: the folded model of the target ``hf`` as a folder that ONNX Runtime GenAI loads.

The graph is written here, operator by operator (`grace_opt.export.onnx_graph`): GenAI's own builder has one size of
heads for keys and values, and so has the operator that its graphs are made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grace_opt.errors import InputError
from grace_opt.export.card import card
from grace_opt.export.hf import HF, as_replaced, folded
from grace_opt.export.onnx_graph import half_width, write_graph
from grace_opt.export.process import answered, installed
from grace_opt.export.target import Checked, Record, Source
from grace_opt.files import write_json, write_text
from grace_opt.models.config import text_config
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask

FILE = "model.onnx"

USE = """
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
params.set_search_options(max_length=64)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


class ONNX(HF):
    """A stock model with narrower values, in ONNX Runtime GenAI."""

    name = "onnx"
    expresses = "as hf, in float32, where RoPE does not change with the length; in ONNX Runtime GenAI"
    runtime = "onnxruntime-genai"
    tested = ("0.18.0",)

    def supports(self, mask: KVMask, config: Any) -> bool | str:
        text = text_config(config)
        rope, act = getattr(text, "rope_parameters", None) or {}, getattr(text, "hidden_act", "silu")
        if rope.get("rope_type", "default") in ("dynamic", "longrope") or act != "silu":
            return "has one table of RoPE's angles for all lengths and silu alone for this fold; use the target hf"
        return super().supports(mask, config)

    def measure(self, source: Source) -> Record:
        if distribution_version("onnx") == "not installed":  # known before minutes of work
            raise InputError("onnx, which writes the graph, is not installed here; install grace-opt[onnx]")
        return super().measure(source)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        model = folded(source)
        write_graph(model, folder / FILE)
        write_json(folder / "genai_config.json", _genai_config(model))
        cast(Any, source.tokenizer).save_pretrained(folder)
        what = (
            f"{source.name} with values of fewer channels, folded into its projections, for ONNX Runtime GenAI: "
            f"`{FILE}`, in float32. A half of what it caches as a token's key and value is in each of its two caches, "
            "which have one width there. No token stays whole."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=["onnx"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Beside the model itself with each value replaced by what it is read as; the tokenizer beside the model's.

        Raises InputError if GenAI, which has tokenizers of its own, makes other ids of the prompt's text.
        """
        runtime, tokenizer = installed("onnxruntime-genai"), cast(Any, source.tokenizer)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        asked = {"folder": str(folder.resolve()), "prompt": ids, "new_tokens": new_tokens, "text": text}
        told = answered("grace_opt.export.onnx_decode", asked, "ONNX Runtime GenAI")
        if told["ids"] != tokenizer(text).input_ids:
            raise InputError(
                f"{runtime} makes other tokens of a text than the tokenizer of {source.name} does; give it ids of that "
                "tokenizer, and leave the check out"
            )
        return as_replaced(source, ids, runtime, told["tokens"], told["log_probabilities"])


def _genai_config(model: Any) -> dict[str, Any]:
    """What GenAI asks of a model: names in its graph, sizes of its cache, special tokens, how to search."""
    config, said = model.config, model.generation_config
    end = said.eos_token_id if said.eos_token_id is not None else config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0]
    decoder = {
        "session_options": {"provider_options": []},
        "filename": FILE,
        "head_size": half_width(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    }
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": end, "pad_token_id": pad}
    return {
        "model": {
            "type": "llama",  # for GenAI: a decoder with a cache
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": decoder,
        }
        | {name: token for name, token in tokens.items() if token is not None},
        "search": {
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
            "do_sample": False,
        },
    }
