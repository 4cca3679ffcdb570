"""Mutated small files and requests for all that reads what others have written: only sentences, or success.

python -m tests.support.fuzz FIRST COUNT [KIND]
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MEMORY, SECONDS = 1 << 30, 60  #: of data segments (RLIMIT_DATA: torch maps far more than it uses), and of CPU time
SHARES = {"bundle": 27, "mask": 53, "request": 13, "model": 7}  #: of a hundred cases
DEEP = "@deep@"
NUMBERS = (
    *(0, 1, -1, 2, 7, 10**4, 10**9, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.5, 1e-320),
    *(1e308, -1e308, float("nan"), float("inf")),
)
TEXTS = (
    *("", "x", "x" * 5000, "\x00", "\udcff", "é\u202e\x1b[31m", "🦙", "9" * 400, "-1", "nan", "1e400", "../../x", "١٢"),
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64", "I64", "U64", "BOOL", "F4", "int8", "none"),
    *("channels", "lowrank", "integers", "whole", "streaming", "greedy", "grace-opt", "static", "key", "value"),
    *("layers.999999999.kv_heads.0.key.weights", "layers.00.kv_heads.0.key.weights", f"layers.{'9' * 300}.k.keep"),
)
LISTS: tuple[Any, ...] = ([], {}, [0], [1 << 40, 0], [[1]], [None], {"a": 1}, [2**63], [-1, 8], None, True, DEEP)


def main() -> None:
    """Run cases; the last line of stdout is the number of the one at hand, or ``done``."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        kinds = {name: kind(Path(place) / name) for name, kind in KINDS.items() if name in (sys.argv[3:] or KINDS)}
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 5))
        for seed in range(first, first + count):
            wanted = list(kinds)
            name = random.Random(seed).choices(wanted, [SHARES[each] for each in wanted])[0]
            print(f"{name} {seed}", flush=True)
            try:
                run(kinds[name], seed)
            except Exception:
                traceback.print_exc()
                sys.exit(f"python -m tests.support.fuzz {seed} 1 {name}")
        spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
        print(f"{count} cases, {spent:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most")
    print("done")


def run(kind: Callable[[random.Random], None], seed: int) -> None:
    """One case: success, or an `InputError` of one sentence."""
    from grace_opt import InputError

    try:
        kind(random.Random(f"case {seed}"))
    except InputError as error:
        check_sentence(str(error))


def check_sentence(text: str) -> None:
    """It can be shown anywhere."""
    assert text, "says nothing"
    assert text.isprintable(), repr(text)
    assert len(text) <= 1300, len(text)


# ---------------------------------------------------------------- mutations


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, left out; or the end cut off."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, many = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 100))
        data = rng.choice(
            (
                data[:at] + rng.randbytes(many) + data[at + many :],
                data[:at] + rng.randbytes(many) + data[at:],
                data[:at] + data[at + many :],
                data[:at],
                data[:at] + data[max(0, at - many) :],
                data[:at] + rng.choice((b"\xff", b"9", b"[", b'"', b"-", b"e", b"\x00")) + data[at + 1 :],
            )
        )
    return data


def changed_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it changed: a number, a text, a type, a name, what is there."""
    where: Any = None
    while isinstance(value, dict | list) and value and (where is None or rng.random() < 0.8):
        where = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = where[key]
    if where is None:
        return other(rng, value)
    act = rng.random()
    if act < 0.1:
        del where[key]
    elif act < 0.2 and isinstance(where, dict):
        where[rng.choice(TEXTS)] = where.pop(key) if rng.random() < 0.7 else other(rng, value)
    elif act < 0.25 and isinstance(where, list):
        where += where * rng.choice((1, 3))
    else:
        where[key] = other(rng, value)
    return None


def other(rng: random.Random, value: Any) -> Any:
    """Something else in a value's place, most often of its own type."""
    if rng.random() < 0.2:
        return rng.choice(LISTS)
    if isinstance(value, bool) or value is None or rng.random() < 0.2:
        return rng.choice((*NUMBERS, *TEXTS, *LISTS))
    if isinstance(value, str):
        number = value.replace(".", "").isdigit() and rng.random() < 0.7
        return str(rng.choice(NUMBERS)) if number else rng.choice((*TEXTS, value * 2))
    return rng.choice(NUMBERS)


def changed_json(rng: random.Random, value: Any) -> bytes:
    """The JSON of a value with a few changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        replaced = changed_value(rng, value)
        value = value if replaced is None else replaced
        if not isinstance(value, dict | list):
            break
    depth = rng.choice((30, 100, 5000))
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * depth + "1" + "]" * depth)
    return text.encode() if rng.random() < 0.9 else changed_bytes(rng, text.encode())


def changed_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with something changed: its bytes, its header's values, a tensor's numbers."""
    act = rng.random()
    if act < 0.2:
        return changed_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    if act < 0.5 and len(rest) >= 8:  # numbers
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(rest) // 8) * 8
            number = rng.choice((1e308, 1e200, 1e150, -1e308, float("nan"), float("inf"), 1e-320, 0.0, -1.0))
            rest[at : at + 8] = struct.pack("<d", number) if rng.random() < 0.7 else rng.randbytes(8)
        text = json.dumps(header).encode()
    elif act < 0.6 and names:  # another type of the same size
        name = rng.choice(names)
        header[name]["dtype"] = rng.choice(TEXTS[13:27])
        if rng.random() < 0.5:
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            header[name]["shape"] = rng.choice(([size], [size // 8, 8], [int(size**0.5)] * 2, [size, 1, 1]))
        text = json.dumps(header).encode()
    else:
        text = changed_json(rng, header if rng.random() < 0.5 else {"__metadata__": header["__metadata__"], **header})
        if rng.random() < 0.3:  # the metadata alone
            header["__metadata__"] = json.loads(json.dumps(header["__metadata__"]))
            changed_value(rng, header["__metadata__"])
            text = json.dumps(header).encode()
    said = len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) + 1, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + text + bytes(rest)


# ---------------------------------------------------------------- what reads them


def small_bundle(path: Path) -> None:
    """Two layers of two KV heads of eight channels, keys and values, with all that a bundle may hold."""
    from grace_opt import GraphBundle, HeadGraph, save_bundle

    rng, heads = np.random.default_rng(0), []
    for layer in range(2):
        for head in range(2):
            for kind in ("key", "value"):
                grams = [(a := rng.standard_normal((12, 8))).T @ a for _ in range(4)]
                of_kind = {f"{kind}_gram": grams[1], f"{kind}_mean": rng.standard_normal(8)}
                heads.append(
                    HeadGraph(
                        layer,
                        head,
                        kind,  # type: ignore[arg-type]
                        grams[0],
                        query_gram=grams[2],
                        **of_kind,  # type: ignore[arg-type]
                        attention_gram=grams[3],
                        attention_mean=rng.standard_normal(8),
                        protected=np.arange(8) < 1 if kind == "key" else None,
                    )
                )
    about = {"model": "small", "num_hidden_layers": "2", "num_key_value_heads": "2", "num_attention_heads": "4"}
    about |= {"head_dim": "8", "window": "64", "sinks": "2", "recent_window": "8", "observation_window": "4"}
    save_bundle(GraphBundle(tuple(heads), {**about, "softmax_scale": "0.35", "tokens": "64"}), path)


def solved(path: Path, rng: random.Random) -> Any:
    """The mask of a bundle, as `grace-opt solve` makes it."""
    from grace_opt import Budget, load_bundle, mask_from_solutions, solve_many
    from grace_opt.compression.from_bundle import problems_of
    from grace_opt.compression.method import method

    bundle = load_bundle(path)
    bundle.check()
    chosen = method("grace-opt", {"budget": rng.choice(("uniform", "shared")), "floor": 1})
    budget = rng.choice((Budget(0.5, 0.25), Budget(bytes_per_token=100.0)))
    solutions = solve_many(problems_of(bundle, chosen, budget), "greedy")
    json.dumps([solution.record() for solution in solutions], allow_nan=False)
    return mask_from_solutions(bundle, solutions, chosen, readout_scope=rng.choice(("none", "prefill", "static")))


def of_bundles(place: Path) -> Callable[[random.Random], None]:
    """`grace-opt solve`."""
    from grace_opt import save_mask

    place.mkdir()
    small_bundle(place / "sound")
    sound = (place / "sound").read_bytes()

    def case(rng: random.Random) -> None:
        (place / "file").write_bytes(changed_tensors(rng, sound))
        mask = solved(place / "file", rng)
        if rng.random() < 0.2:
            save_mask(mask, place / "mask")

    return case


def of_masks(place: Path) -> Callable[[random.Random], None]:
    """`load_mask`, and what is made of a mask then."""
    from grace_opt import KVMask, load_mask, save_mask
    from grace_opt.compression.apply import apply, online
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.method import method
    from tests.support.observed import LAYERS, observed_layers

    place.mkdir()
    small_bundle(place / "bundle")
    masks = {f"solved-{seed}": solved(place / "bundle", random.Random(seed)) for seed in range(4)}
    for name, options in {"grace-opt": {"key_bits": 4}, "kq-svd": {"value_bits": 8}, "streaming": {}}.items():
        plan = apply(method(name, options), observed_layers(0), Budget(0.5, 0.25))
        masks[name] = KVMask("m", LAYERS["heads"], LAYERS["n"], plan, num_hidden_layers=3)
    chosen = online(method("think", {"key_bits": 8, "sinks": 2}), [0, 2], Budget(0.5, 0.25))
    masks["choice"] = KVMask("m", LAYERS["heads"], LAYERS["n"], chosen, num_hidden_layers=3)
    files = []
    for name, mask in masks.items():
        save_mask(mask, place / name)
        files.append([(place / name / f"kv_mask.{part}").read_bytes() for part in ("json", "safetensors")])

    def case(rng: random.Random) -> None:
        text, tensors = rng.choice(files)
        if rng.random() < 0.5:
            tensors = changed_tensors(rng, tensors)
        said = json.loads(text)
        said["tensors"]["sha256"] = hashlib.sha256(tensors).hexdigest()
        sound = json.dumps(said).encode()
        folder = place / "case"
        folder.mkdir(exist_ok=True)
        (folder / "kv_mask.json").write_bytes(changed_json(rng, said) if rng.random() < 0.7 else sound)
        (folder / "kv_mask.safetensors").write_bytes(tensors)
        mask = load_mask(folder)
        for kind in ("key", "value"):
            mask.keep_matrix(kind)
            mask.plan.widths(kind)
        if rng.random() < 0.5:
            save_mask(mask, place / "again")

    return case


def of_models(place: Path) -> Callable[[random.Random], None]:
    """`load_model`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    from grace_opt import load_model

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    words = Tokenizer(WordLevel({f"w{each}": each for each in range(16)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(place)
    sound = {path.name: path.read_bytes() for path in place.iterdir()}
    load_model(str(place))  # imports what is imported late

    def case(rng: random.Random) -> None:
        name = rng.choice(["config.json", "model.safetensors", *sorted(sound)])
        data = sound[name]
        if name.endswith(".safetensors"):
            data = changed_tensors(rng, data)
        else:
            data = changed_json(rng, json.loads(data)) if rng.random() < 0.8 else changed_bytes(rng, data)
        (place / name).write_bytes(data)
        try:
            load_model(str(place))
        finally:
            (place / name).write_bytes(sound[name])

    return case


def of_requests(place: Path) -> Callable[[random.Random], None]:
    """Uploads, registrations and runs, over the service's own application; nothing is solved."""
    from starlette.testclient import TestClient

    from grace_opt.engines.dask import Cluster
    from grace_opt.service.db.storage import opened
    from grace_opt.service.http.app import create_app
    from grace_opt.service.http.state import Service

    place.mkdir()
    small_bundle(place / "bundle")
    sound = (place / "bundle").read_bytes()
    storage = opened(place / "data", None).__enter__()
    service = Service(storage, Cluster(None, 1), queue_limit=10**9)
    http = TestClient(create_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)
    digest = http.post("/api/bundles", content=sound).json()["digest"]
    body = {
        "bundle": digest,
        "solvers": [{"solver": "greedy", "options": {"direction": "best"}}, {"solver": "spectral"}],
        "method": "grace-opt",
        "method_options": {"budget": "shared", "floor": 1, "protection": {"multiple": 1.0, "at_least": 0.0}},
        "ratios": [0.5, 0.25],
        "value_ratio": 0.25,
        "budget_bytes": [100.0],
        "limits": {"time_limit": 10, "gap_rel": 1e-6, "node_limit": 100, "seed": 3, "threads": 1},
        "config": {"protect": None, "readout": "static", "recent_window": 8, "sinks": 2},
        "name": "a run",
    }
    (storage.offered / "offered").write_bytes(sound)
    assert http.post("/api/runs", json=body).status_code == 202, http.post("/api/runs", json=body).text

    def case(rng: random.Random) -> None:
        act, headers = rng.random(), {"content-type": "application/json"}
        if act < 0.6:
            answer = http.post("/api/runs", content=changed_json(rng, body), headers=headers)
        elif act < 0.7:
            answer = http.post("/api/bundles/register", content=changed_json(rng, {"path": "offered"}), headers=headers)
        elif act < 0.9:
            data, name = changed_tensors(rng, sound), rng.choice(TEXTS).encode("utf-8", "surrogatepass")
            answer = http.post("/api/bundles", content=data, params={"name": name} if act < 0.8 else {})
        else:
            query = f"{rng.choice(('ratio', 'limit', 'problem', 'sort', 'run'))}={rng.choice(NUMBERS)}"
            answer = http.get(f"/api/{rng.choice(('runs', 'runs/1/records', 'compare', 'bundles'))}?{query}")
        said = answer.json()
        assert answer.status_code < 500, (answer.status_code, said)
        if answer.status_code >= 400:
            check_sentence(said["detail"])

    return case


KINDS: dict[str, Callable[[Path], Callable[[random.Random], None]]] = {
    "bundle": of_bundles,
    "mask": of_masks,
    "request": of_requests,
    "model": of_models,
}

if __name__ == "__main__":
    main()
