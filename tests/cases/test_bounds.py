"""Numbers of a file are bounded before anything is made of them; what is large and legal still loads."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from grace_opt import (
    GraphBundle,
    HeadGraph,
    InputError,
    KVMask,
    SubsetProblem,
    load_bundle,
    load_mask,
    mask_from_solutions,
    problems_of,
    save_bundle,
    save_mask,
    solve_many,
)
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS
from grace_opt.compression.readout import ReadoutRecipe
from grace_opt.models.bounds import check_config, check_weights
from grace_opt.reading import parsed, read_json
from grace_opt.tensor_file import tensor_file

ABOUT = {"format": "grace_opt.graphs", "version": "1"}
HEAD = "layers.0.kv_heads.0.key"


def graph(n: int = 8, seed: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((n + 4, n))
    weights: np.ndarray = factor.T @ factor
    return (weights + weights.T) / 2


def bundle_file(path: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: str) -> Path:
    save_file(tensors or {f"{HEAD}.weights": graph()}, path, ABOUT | metadata)
    return path


def written(path: Path, header: Any, rest: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return path


def limited(*arguments: str | Path, memory: int = 1 << 30) -> subprocess.CompletedProcess[str]:
    """A command with so many bytes of data more than the imports take."""
    code = (
        "import resource, sys, torch, grace_opt.compression.mask_file, grace_opt.cli.app as app\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({memory}, {memory}))\n"
        "sys.exit(app.run(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_small_bundle_does_not_take_all_memory(tmp_path: Path) -> None:
    """turn2, F1."""
    file = bundle_file(tmp_path / "head", {"layers.0.kv_heads.999999999.key.weights": graph()})
    with pytest.raises(InputError, match="1000000000 KV heads, and none has over"):
        load_bundle(file)
    file = bundle_file(tmp_path / "layer", {"layers.999999999.kv_heads.0.key.weights": graph()})
    done = limited("solve", file, "-o", tmp_path / "m", "--ratio", "0.5", "--readout", "none", "--solver", "greedy")
    assert done.returncode == 2, done.stderr
    assert "and none has over" in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"num_hidden_layers": "1000000000"}, "num_hidden_layers = '1000000000', which is not a whole number from 0"),
        ({"num_key_value_heads": "1000000000"}, "1000000000 KV heads, and none has over"),
        ({"num_key_value_heads": "0"}, "not a whole number from 1"),
        ({"num_hidden_layers": "9" * 500}, "which is not a whole number"),
        ({"num_hidden_layers": "two"}, "'two', which is not a whole number"),
        ({"num_hidden_layers": "٢"}, "which is not a whole number"),
        ({"model": "x" * 3_000_000}, "'model' has 3000000 characters, of 4096"),
        ({f"key {i}": "x" * 4000 for i in range(20)}, "the metadata has .* of 65536 allowed"),
        ({"model": "a\0b"}, "holds a NUL"),
    ],
)
def test_metadata_is_bounded(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_bundle(bundle_file(tmp_path / "file", **metadata))


@pytest.mark.parametrize(
    ("metadata", "scope", "said"),
    [
        ({"softmax_scale": "half"}, "none", "softmax_scale = 'half', which is not a positive number"),
        ({"softmax_scale": "nan"}, "none", "which is not a positive number"),
        ({"observation_window": "0"}, "none", "observation_window = '0'"),
        ({"window": "many"}, "static", "window = 'many'"),
    ],
)
def test_metadata_that_is_no_number(metadata: dict[str, str], scope: str, said: str, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_file(tmp_path / "file", **metadata))

    def solved() -> None:
        solutions = solve_many(problems_of(bundle, METHODS["grace-opt"], Budget(0.25)), "greedy")
        mask_from_solutions(bundle, solutions, readout_scope=scope)

    with pytest.raises(InputError, match=said):
        solved()


@pytest.mark.parametrize("name", [f"layers.{'9' * 300}.kv_heads.0.key", "layers.00.kv_heads.0.key"])
def test_a_name_that_no_head_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no head of a model") as caught:
        load_bundle(bundle_file(tmp_path / "file", {f"{name}.weights": graph(), f"{HEAD}.weights": graph()}))
    assert len(str(caught.value)) < 300


def test_a_bool_bundle_of_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    n = 8192
    header = {f"{HEAD}.weights": {"dtype": "BOOL", "shape": [n, n], "data_offsets": [0, n * n]}}
    file = written(tmp_path / "file", {"__metadata__": ABOUT, **header})
    with file.open("ab") as sparse:
        sparse.truncate(file.stat().st_size + n * n)
    with pytest.raises(InputError, match="square matrix of up to 4096"):
        load_bundle(file)
    header = {
        f"layers.{i}.kv_heads.0.key.weights": {
            "dtype": "F8_E4M3",
            "shape": [4096, 4096],
            "data_offsets": [i << 24, (i + 1) << 24],
        }
        for i in range(3)
    }
    file = written(tmp_path / "narrow", {"__metadata__": ABOUT, **header})
    with file.open("ab") as sparse:
        sparse.truncate(file.stat().st_size + (3 << 24))
    with pytest.raises(InputError, match="tensors of F8_E4M3 take 402653184 bytes as float64; save them as F32"):
        load_bundle(file)


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.uint8, np.complex64])
def test_weights_are_real_floating_point_numbers(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold real floating-point numbers, not (BOOL|I64|U8|C64)"):
        load_bundle(bundle_file(tmp_path / "file", {f"{HEAD}.weights": np.eye(4).astype(dtype)}))


@pytest.mark.parametrize("weights", [np.eye(3) * 1j, np.eye(3, dtype=bool), [["1", "0"], ["0", "1"]], [[10**400]]])
def test_a_problem_takes_real_numbers(weights: Any) -> None:
    with pytest.raises(InputError, match="weights must be numbers in a square matrix"):
        SubsetProblem(weights, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_narrow_types_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every code of each type, torch being the reference."""
    codes = torch.arange(256 if dtype.itemsize == 1 else 65536, dtype=torch.int32)
    held = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    save_torch({"all": held}, tmp_path / "all")
    with tensor_file(tmp_path / "all") as file:
        np.testing.assert_array_equal(file["all"].astype(np.float32), held.float().numpy())
    weights = torch.from_numpy(graph()).to(dtype)
    save_torch({f"{HEAD}.weights": weights}, tmp_path / "bundle", ABOUT)
    np.testing.assert_array_equal(load_bundle(tmp_path / "bundle").heads[0].weights, weights.double().numpy())


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    weights = torch.eye(4).to(torch.float8_e4m3fnuz)
    save_torch({f"{HEAD}.weights": weights}, tmp_path / "file", ABOUT)
    with pytest.raises(InputError, match="of type F8_E4M3FNUZ, which cannot be read here; save it as F32"):
        load_bundle(tmp_path / "file")


@pytest.mark.parametrize("number", [1e308, 1e200])
def test_weights_whose_sums_overflow(number: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sums and squares overflow; divide them"):
        load_bundle(bundle_file(tmp_path / "file", {f"{HEAD}.weights": np.full((4, 4), number)})).check()


@pytest.mark.parametrize("number", [np.nan, 1e300])
def test_moments_that_overflow(number: float) -> None:
    moments = {f"{name}_gram": np.eye(4) * number for name in ("key", "attention")}
    moments |= {f"{name}_mean": np.ones(4) for name in ("key", "attention")}
    bundle = GraphBundle((HeadGraph(0, 0, "key", graph(4), **moments),), {"window": "90"})  # type: ignore[arg-type]
    solutions = solve_many(bundle.problems(0.5), "greedy")
    with pytest.raises(InputError, match="moments of layers.0.kv_heads.0.key are not finite"):
        mask_from_solutions(bundle, solutions, readout_scope="static")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F64", "shape": [1 << 40, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}, "b": {"dtype": "F64", "shape": [1]}},
        {"a": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8.0]}},
        {c: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]} for c in "ab"},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 16]}},
        {"a": [], "__metadata__": {"x": "y"}},
        {"__metadata__": {"x": 1}},
        [],
    ],
)
def test_a_header_that_lies(header: Any, tmp_path: Path) -> None:
    file = written(tmp_path / "file", header, b"8 bytes.")
    with pytest.raises(InputError, match="is truncated or not a safetensors file"), tensor_file(file):
        pass


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = bundle_file(tmp_path / "file", {f"{HEAD}.weights": graph(128)})
    with tensor_file(file) as tensors, file.open("rb+") as other:
        other.truncate(60_000)
        with pytest.raises(InputError, match="it became shorter while it was read"):
            tensors[f"{HEAD}.weights"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("9" * 5000, "4300"),
        ("9" * 400, "more than 300 digits"),
        ("1e999", "not finite"),
        ("NaN", "not finite"),
        (r'{"\udcff": 1}', "half of a surrogate pair"),
    ],
)
def test_json_within_bounds(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(InputError, match=f"file.json is truncated or not JSON .*{said}"):
        read_json(tmp_path / "file.json")
    assert parsed('{"a": [1, 2.5, "\\ud83e\\udd99", null]}') == {"a": [1, 2.5, "🦙", None]}


# ---------------------------------------------------------------- masks


def mask_folder(path: Path, **change: Any) -> Path:
    """A mask whose JSON is changed: a dotted path of fields, with __ for the dots, and its value."""
    keep = {0: (np.array([0, 2], np.int32), np.array([1, 3], np.int32))}
    save_mask(KVMask.of_channels("m", 2, 8, keep, keep, num_hidden_layers=2), path)
    described(path, change)
    return path


def described(path: Path, change: dict[str, Any]) -> None:
    said = json.loads((path / "kv_mask.json").read_text())
    for fields, value in change.items():
        *places, last = [int(each) if each.isdigit() else each for each in fields.split("__")]
        where = said
        for place in places:
            where = where[place]
        where[last] = value
    (path / "kv_mask.json").write_text(json.dumps(said))


WHOLE = {"codec": "whole", "channels": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"geometry__head_dim": 10**9}, "1000000000 channels of a head, and none has over"),
        ({"geometry__num_key_value_heads": 10**9, "layers": [{"index": 0, "key": WHOLE}] * 2}, "1000000000 KV heads"),
        ({"layers": [{"index": i, "skip": True} for i in range(9000)], "geometry__num_hidden_layers": None}, "layers"),
        ({"layers__0__value__n": 10**12}, "a head has from 1 to 4096 channels"),
        ({"geometry__num_attention_heads": "many"}, "num_attention_heads must be a whole number"),
        ({"base_model__id": "x" * 10**6}, "base_model.id must be a text of up to 4096"),
        ({"softmax_scale": "1"}, "lacks a field or has one of the wrong type"),
        ({"softmax_scale": -1.0}, "softmax_scale must be positive"),
        ({"policy__readout": {"readout_fit": "best"}}, "readout_fit must be one of none, mean"),
        ({"version": True}, "is a mask of version True"),
        ({"tensors__file": "x" * 400}, "File name too long"),
        ({"tensors__file": "a\0b"}, "cannot read"),
        ({"tensors__file": ".."}, "is a folder"),
        (
            {
                "layers__0__key": {
                    "codec": "integers",
                    "bits": 4,
                    "axis": "channel",
                    "inner": {
                        "codec": "integers",
                        "bits": 4,
                        "axis": "channel",
                        "inner": {"codec": "channels", "width": 2, "n": 8},
                    },
                }
            },
            "cannot be packed once more",
        ),
    ],
)
def test_a_mask_says_nothing_beyond_a_model(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_mask(mask_folder(tmp_path, **change))
    assert len(str(caught.value)) <= 1200


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("keep", np.zeros((60_000, 0), np.int32), "60000 KV heads"),
        ("offsets", np.zeros(50_000, np.int32), "49999 KV heads"),
        ("keep", np.zeros((2, 2), np.complex64), "must hold whole numbers"),
        ("keep", np.zeros((2, 2, 1), np.int32), "0 KV heads|do not fit"),
    ],
)
def test_tensors_of_a_mask_are_as_many_as_its_heads(name: str, array: np.ndarray, said: str, tmp_path: Path) -> None:
    path = mask_folder(tmp_path)
    tensors = load_file(path / "kv_mask.safetensors") | {f"layers.0.k.{name}": array}
    if name == "offsets":
        tensors["layers.0.k.keep"] = tensors["layers.0.k.keep"].ravel()
    save_file(tensors, path / "kv_mask.safetensors")
    described(path, {"tensors__sha256": hashlib.sha256((path / "kv_mask.safetensors").read_bytes()).hexdigest()})
    with pytest.raises(InputError, match=said):
        load_mask(path)


def test_python_is_bounded_as_files_are() -> None:
    for numbers in ({"num_hidden_layers": 10**9}, {"head_dim": 10**9}, {"num_key_value_heads": 10**6}):
        fields: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, **numbers}
        with pytest.raises(InputError, match="and none has over"):
            KVMask.of_channels("m", key_keep={}, **fields)
    with pytest.raises(InputError, match="readout_fit must be one of"):
        ReadoutRecipe("best")  # type: ignore[arg-type]
    for prune in (float("nan"), float("inf"), "2", None):
        with pytest.raises(InputError, match="prune must be a whole number"):
            SubsetProblem(np.eye(4), prune)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="groups have labels beyond 63 bits"):
        SubsetProblem(np.eye(2), 1, groups=np.array([0, 2**64 - 1], np.uint64))
    far = SubsetProblem(np.eye(4), 2, groups=np.array([2**63 - 1, 2**63 - 1, -1, -(2**63)]))
    assert far.contraction.sizes.tolist() == [2, 1, 1]


def test_what_is_large_and_legal_loads(tmp_path: Path) -> None:
    """126 layers of 8 KV heads; a mask of 200 layers of heads of 128 channels, with static read-outs of some."""
    weights = graph()
    heads = [HeadGraph(i, h, "key", weights, key_mean=np.ones(8)) for i in range(126) for h in range(8)]
    save_bundle(GraphBundle(tuple(heads), {"num_hidden_layers": "126"}), tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    bundle.check()
    assert (len(bundle.heads), bundle.geometry()) == (1008, (126, 8))
    keep = {i: [np.arange(0, 128, 2)] * 8 for i in range(200)}
    save_mask(KVMask.of_channels("m", 8, 128, keep, keep, num_hidden_layers=200), tmp_path / "mask")
    assert load_mask(tmp_path / "mask").keep_matrix("value").sum() == 200 * 8 * 64
    wide = {"key_keep": {0: [np.arange(500)] * 16}, "num_hidden_layers": 61}
    save_mask(KVMask.of_channels("m", 16, 576, **wide), tmp_path / "wide")
    assert load_mask(tmp_path / "wide").head_dim == 576


# ---------------------------------------------------------------- model folders


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, which no model has"),
        ({"text_config": {"num_hidden_layers": 10**30}}, "a number of 31 digits, which no model has"),
        ({"vocab_size": 10**12, "hidden_size": 64}, "vocab_size = 1000000000000, which no model has"),
        ({"vocab_size": 10**9, "hidden_size": 64}, "for more weights than the files hold"),
        ({"head_dim": -(10**12)}, "head_dim = -1000000000000"),
        ({"layers": [1, 10**12]}, "which no model has"),
        ([], "config.json is not an object"),
    ],
)
def test_a_configuration_beyond_its_weights(config: Any, said: str, tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        check_config(str(tmp_path))


def test_weights_of_a_folder_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3, "time_step_limit": [0.0, Infinity]}')
    save_file({"a": np.ones(4), "b": np.ones(4)}, tmp_path / "model.safetensors")
    check_config(str(tmp_path))
    with pytest.raises(InputError, match="num_hidden_layers = 3, and the weights have 2 tensors"):
        check_weights(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="model.safetensors is truncated"):
        check_weights(str(tmp_path))
    check_config("someone/some-model")
