"""The plug-in of vLLM: models whose attention runs a cache plan (entry point ``vllm.general_plugins``).

`pages` and `attend` need torch alone; the other modules import vLLM, and only vLLM imports them.
"""

from __future__ import annotations

#: architecture of a checkpoint -> the class in `grace_opt.export.vllm_plugin.models` that runs it with a plan
ARCHITECTURES = {
    "LlamaForCausalLM": "CompressedLlama",
    "MistralForCausalLM": "CompressedMistral",
    "Qwen2ForCausalLM": "CompressedQwen2",
    "Qwen3ForCausalLM": "CompressedQwen3",
}
PREFIX = "GraceOpt"  #: before the architecture's name, in the configuration of an exported folder


def register() -> None:
    """Tell vLLM which class runs which architecture. vLLM calls it in each of its processes, perhaps more than once."""
    from vllm import ModelRegistry

    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(PREFIX + architecture, f"{__name__}.models:{name}")
