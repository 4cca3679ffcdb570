"""What needs a runtime is collected where that is installed: .ci/vllm and .ci/runtimes make such environments."""

from importlib.util import find_spec

RUNTIMES = {
    "vllm": "in_vllm",
    "kvpress": "in_kvpress",
    "xllamacpp": "in_llama_cpp",
    "mlx_lm": "in_mlx",
    "onnxruntime_genai": "in_onnx",
}
collect_ignore = [folder for module, folder in RUNTIMES.items() if not find_spec(module)]
