"""Prompts that one process of vLLM computes and stores, and another one loads, beside a third that computes all.

    python benchmarks/connector.py MODEL MASK [--prefix 2048] [--question 16] [--scored 128] [--prompts 2] [-f json]

Run it with the Python that has vLLM and grace-opt. MODEL is smollm2-135m or a folder, MASK the folder of a mask. Prints
the bytes of the stored prompts beside those of the 16-bit cache; how many tokens were loaded, as vLLM counts them; KL
to the process that computes all, in nats a token, over the text's own next tokens; and seconds to the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

COUNTED = ("vllm:external_prefix_cache_hits", "vllm:prefix_cache_hits")
MODULE = "grace_opt.export.vllm_plugin.connector"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("mask", metavar="MASK")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens that are stored")
    parser.add_argument("--question", type=int, default=16, help="tokens after them, computed by whoever loads")
    parser.add_argument("--scored", type=int, default=128, help="tokens after these that are compared")
    parser.add_argument("--prompts", type=int, default=2, help="prompts")
    parser.add_argument("--text", help="as of grace-opt evaluate; prose of Python's library if left out")
    parser.add_argument("--dtype", default="float32", help="that vLLM runs the model in")
    parser.add_argument("-f", "--format", choices=("table", "json"), default="table")
    parser.add_argument("--one", metavar="ASKED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(json.loads(Path(options.one).read_text(encoding="utf-8")))
    else:
        show(measured(options), options.format)


def measured(options: Any) -> dict[str, Any]:
    """Run the three processes, and compare."""
    prompts = tokens_of(options)
    head = options.prefix + options.question
    with tempfile.TemporaryDirectory() as work:
        extra = {"mask": str(Path(options.mask).resolve()), "folder": str(Path(work, "stores")), "dtype": "bfloat16"}
        asked = {"model": str(folder_of(options.model)), "dtype": options.dtype, "longest": len(prompts[0])}
        whole = [{"ids": ids[:head], "forced": ids[head:]} for ids in prompts]
        plain = run(asked | {"requests": whole}, work, "plain")
        first = [{"ids": ids[: options.prefix], "forced": ids[options.prefix : options.prefix + 1]} for ids in prompts]
        run(asked | {"requests": first, "connector": extra, "role": "kv_producer"}, work, "storing")
        files = sorted(Path(work, "stores").glob("*.kv"))
        loaded = run(asked | {"requests": whole, "connector": extra, "role": "kv_consumer"}, work, "loading")
        kl, same = compared(plain["logs"], loaded["logs"])
        stored = sum(each.stat().st_size for each in files)
    full = cache_bytes(folder_of(options.model)) * options.prefix * len(prompts)
    return {
        "prompts": len(prompts),
        "stored tokens of each": options.prefix,
        "tokens loaded, as vLLM counts": loaded["counts"][COUNTED[0]],
        "bytes of the 16-bit cache": full,
        "bytes stored": stored,
        "times smaller": full / stored,
        "KL, nats a token": sum(kl) / len(kl),
        "KL of each": kl,
        "same likeliest token": same,
        "seconds to the first token, computed": plain["seconds"],
        "seconds to the first token, loaded": loaded["seconds"],
        "load of the machine": os.getloadavg()[0],
    }


def tokens_of(options: Any) -> list[list[int]]:
    """Each prompt, and what follows it in its text."""
    from transformers import AutoTokenizer

    from grace_opt.evaluate.documents import Document, passages, read_documents
    from grace_opt.models.texts import prose

    tokenizer = AutoTokenizer.from_pretrained(folder_of(options.model))
    texts = [Document("prose", "".join(prose()), cut=True)] if options.text is None else read_documents(options.text)
    return passages(texts, tokenizer, options.prefix + options.question, options.scored, options.prompts).ids


def folder_of(model: str) -> Path:
    """Where a model is."""
    from grace_opt.models.load import smollm2_folder

    return smollm2_folder() if model == "smollm2-135m" else Path(model)


def cache_bytes(folder: Path) -> int:
    """Of a token, at 16 bits."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * size)


def run(asked: dict[str, Any], work: str, name: str) -> dict[str, Any]:
    """What a process of vLLM says; what it logs is shown if it fails."""
    paths = {key: str(Path(work, f"{name}.{key}")) for key in ("asked", "answer", "logs")}
    Path(paths["asked"]).write_text(json.dumps(asked | paths), encoding="utf-8")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
    command = [sys.executable, __file__, asked["model"], "-", "--one", paths["asked"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not Path(paths["answer"]).is_file():
        sys.exit(f"the {name} process failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(Path(paths["answer"]).read_text(encoding="utf-8"))
    return answer | {"logs": torch.load(paths["logs"], weights_only=True), "said": done.stdout + done.stderr}


def compared(plain: list[Tensor], ours: list[Tensor]) -> tuple[list[float], float]:
    """KL of each prompt's tokens on average, and the share of all tokens where the likeliest is the same."""
    kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(plain, ours, strict=True)]
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(plain, ours, strict=True)])
    return kl, float(same.float().mean())


def one(asked: dict[str, Any]) -> None:
    """In a process of its own: vLLM reads prompts and the text's own tokens after them."""
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessor

    heard: list[Tensor] = []
    forced: list[int] = []

    class Forced(LogitsProcessor):
        """Keeps what the model says, and decodes the text's own token."""

        def __init__(self, *about: Any) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: Tensor) -> Tensor:
            if len(heard) < len(forced):
                heard.append(logits[0].float().log_softmax(-1).clone())
                logits.fill_(-torch.inf)[:, forced[len(heard) - 1]] = 0
            return logits

    settings: dict[str, Any] = {}
    if "connector" in asked:
        settings["kv_transfer_config"] = {
            "kv_connector": "GraceOptConnector",
            "kv_connector_module_path": MODULE,
            "kv_role": asked["role"],
            "kv_connector_extra_config": asked["connector"],
        }
    longest = asked["longest"] + 1
    llm = LLM(
        asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=longest,
        max_num_batched_tokens=longest,  # a prompt is one step, so that the first logits are its own
        max_num_seqs=1,
        disable_log_stats=False,
        logits_processors=[Forced],
        async_scheduling=False,
        **settings,
    )

    def generate(ids: list[int], count: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]

    generate(list(range(5, 45)), 2)  # whatever comes up only once
    logs, seconds = [], []
    for request in asked["requests"]:
        heard.clear()
        forced[:] = request["forced"]
        began = time.monotonic()
        output = generate(request["ids"], len(forced))
        seconds.append(output.metrics.first_token_ts - began)
        assert list(output.outputs[0].token_ids) == forced
        logs.append(torch.stack(heard))
    counts = {each.name: each.value for each in llm.get_metrics() if each.name in COUNTED}
    torch.save(logs, asked["logs"])
    answer = {"counts": counts, "seconds": sum(seconds) / len(seconds)}
    Path(asked["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def show(record: dict[str, Any], format: str) -> None:
    """Print a record."""
    if format == "json":
        print(json.dumps(record))
        return
    for name, value in record.items():
        text = ", ".join(f"{each:.3g}" for each in value) if isinstance(value, list) else value
        print(f"{name:40}{text:.3g}" if isinstance(text, float) else f"{name:40}{text}")


if __name__ == "__main__":
    main()
