"""What needs vLLM is collected where it is installed: .ci/vllm makes such an environment and runs it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["in_vllm"]
