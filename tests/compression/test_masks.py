from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from grace_opt import InputError, KVMask, load_bundle, load_mask, mask_from_solutions, save_mask, solve_many
from grace_opt.compression.apply import apply, online
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, method
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.readout import Readout, ReadoutRecipe
from grace_opt.models.config import config_sha256
from tests.support import DATA
from tests.support.families import tiny_model
from tests.support.observed import LAYERS, observed_layers


def some_mask(**changes: Any) -> KVMask:
    keep = (np.array([0, 2, 5], np.int32), np.array([1, 2, 7], np.int32))
    fields: dict[str, Any] = {
        "model": "some/model",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "key_keep": {0: keep, 2: keep},
        "num_hidden_layers": 4,
        "config_sha256": "0" * 64,
        "softmax_scale": 0.125,
        "calibration": {"tokens": "64"},
        "solver": {"name": "greedy"},
    }
    return KVMask.of_channels(**{**fields, **changes})


STATIC = {
    (kind, layer, head): Readout(np.arange(5.0) + layer, np.ones((5, 3)) / (1 + head))
    for kind in ("key",)
    for layer in (0, 2)
    for head in (0, 1)
}


RAGGED = (np.array([3], np.int32), np.array([], np.int32))
MASKS = {
    "uniform": some_mask(),
    "ragged": some_mask(key_keep={1: RAGGED}, recent_window=0, sinks=0),
    "values": some_mask(value_keep={3: RAGGED, 0: (np.arange(8, dtype=np.int32),) * 2}),
    "read-out": some_mask(readouts=STATIC),
    "fitted": some_mask(readout=ReadoutRecipe("least-squares", 0.2, 0.4, 0.0), generated="keep"),
    "pairs": some_mask(structure="rope_pair", align=4),
    "bare": some_mask(num_hidden_layers=None, config_sha256=None, softmax_scale=None),
}


def assert_same(mask: KVMask, read: KVMask) -> None:
    for field in mask.__dataclass_fields__:
        if field != "plan":
            assert getattr(mask, field) == getattr(read, field), field
    assert mask.plan.layers.keys() == read.plan.layers.keys()
    for mine, theirs in zip(mask.plan, read.plan, strict=True):
        for field in mine.__dataclass_fields__:
            if field != "codecs":
                assert getattr(mine, field) == getattr(theirs, field), field
        assert mine.codecs.keys() == theirs.codecs.keys()
        for kind in mine.codecs:
            for a, b in zip(mine.codecs[kind], theirs.codecs[kind], strict=True):
                assert a.signature() == b.signature()
                for name, tensor in a.tensors().items():
                    torch.testing.assert_close(tensor, b.tensors()[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    mask = MASKS[name]
    save_mask(mask, tmp_path / "mask")
    read = load_mask(tmp_path / "mask")
    assert_same(mask, read)
    assert sorted(path.name for path in (tmp_path / "mask").iterdir()) == ["kv_mask.json", "kv_mask.safetensors"]


def test_the_files_say_what_implementers_need(tmp_path: Path) -> None:
    save_mask(some_mask(), tmp_path)
    said = json.loads((tmp_path / "kv_mask.json").read_text())
    assert (said["format"], said["version"]) == ("kv-channel-mask", 2)
    assert said["layers"] == [
        {"index": 0, "key": {"codec": "channels", "width": 3, "n": 8}},
        {"index": 1, "skip": True},
        {"index": 2, "key": {"codec": "channels", "width": 3, "n": 8}},
        {"index": 3, "skip": True},
    ]
    assert said["key"] == {
        "stage": "post_rope",
        "numbering": "model",
        "align": 1,
        "structure": "channel",
        "count": "uniform",
    }
    assert said["policy"]["recent_window"] == 32
    tensors = load_file(tmp_path / "kv_mask.safetensors")
    assert tensors["layers.0.k.keep"].dtype == np.int32
    np.testing.assert_array_equal(tensors["layers.2.k.keep"], [[0, 2, 5], [1, 2, 7]])
    matrix = some_mask().keep_matrix()
    assert matrix.shape == (4, 2, 8)
    assert matrix[1].all()
    assert matrix[0, 1].nonzero()[0].tolist() == [1, 2, 7]


def test_a_solved_bundle_becomes_a_mask(real_heads: Path) -> None:
    bundle = load_bundle(real_heads)
    solutions = solve_many(bundle.problems(0.6), "greedy")
    if real_heads.name.startswith("heads-qwen"):  # the last layer holds one head of two
        with pytest.raises(InputError, match=r"KV heads \[1\] of 2 in layer 26"):
            mask_from_solutions(bundle, solutions)
        return
    mask = mask_from_solutions(bundle, solutions, sinks=1)
    assert sorted(mask.key_keep) == [0, 8, 16, 28]
    assert (mask.windows.recent_window, mask.windows.sinks) == (32, 1)
    for solution in solutions:
        layer, head = int(solution.problem.split(".")[1]), int(solution.problem.split(".")[3])
        assert set(mask.key_keep[layer][head]) | set(solution.pruned or ()) == set(range(64))
        assert len(mask.key_keep[layer][head]) == 64 - 38


def tampered(folder: Path, change: Any) -> None:
    """Change the tensors and make the sha256 fit again, as a careless program would."""
    import hashlib

    tensors = load_file(folder / "kv_mask.safetensors")
    change(tensors)
    save_file(tensors, folder / "kv_mask.safetensors")
    said = json.loads((folder / "kv_mask.json").read_text())
    said["tensors"]["sha256"] = hashlib.sha256((folder / "kv_mask.safetensors").read_bytes()).hexdigest()
    (folder / "kv_mask.json").write_text(json.dumps(said))


def described(folder: Path, change: Any) -> None:
    said = json.loads((folder / "kv_mask.json").read_text())
    change(said)
    (folder / "kv_mask.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "kv_mask.json").unlink(), "holds no mask"),
        (lambda f: (f / "kv_mask.json").write_text('{"format": '), "truncated or not JSON"),
        (lambda f: (f / "kv_mask.json").write_text("[]"), "is not a mask"),
        (lambda f: described(f, lambda s: s.update(version=3)), "version 3; this grace-opt reads versions 1 and 2"),
        (lambda f: described(f, lambda s: s.pop("policy")), "lacks a field.*policy"),
        (lambda f: described(f, lambda s: s["layers"][0]["key"].update(width=4)), "should keep 4 channels"),
        (lambda f: described(f, lambda s: s["policy"].update(sinks=-1)), "sinks must be a whole number from 0"),
        (lambda f: described(f, lambda s: s["geometry"].update(head_dim="x")), "head_dim must be a whole number"),
        (lambda f: described(f, lambda s: s["key"].update(stage="pre_rope")), "only 'post_rope'"),
        (lambda f: described(f, lambda s: s.update(layers=[])), "says 4 layers and lists 0"),
        (lambda f: described(f, lambda s: s.update(layers={})), "says 4 layers and lists 0"),
        (
            lambda f: described(f, lambda s: s["layers"].append({"index": 1, "skip": True})),
            "says 4 layers and lists 5",
        ),
        (lambda f: described(f, lambda s: s["layers"][1].update(index=3)), "not numbered from 0 on"),
        (lambda f: described(f, lambda s: s["layers"][0].update(skip=True)), "does not match its tensors"),
        (lambda f: described(f, lambda s: s["geometry"].update(num_hidden_layers=10**30)), "whole number from 0"),
        (lambda f: described(f, lambda s: s["layers"][0]["key"].update(codec="chanels")), "did you mean 'channels'"),
        (lambda f: described(f, lambda s: s["policy"].update(generated="maybe")), "keep or prune, got 'maybe'"),
        (
            lambda f: described(
                f, lambda s: s["policy"].update(tokens={"policy": "steaming", "share": 1, "parameters": {}})
            ),
            "unknown token policy 'steaming'; did you mean 'streaming'",
        ),
        (lambda f: described(f, lambda s: s["key"].update(structure="block")), "structure must be one of channel"),
        (lambda f: tampered(f, lambda t: t.update({"layers.0.k.keep": np.full((2, 3), 2**32)})), "out of range"),
        (lambda f: (f / "kv_mask.safetensors").unlink(), "no such file"),
        (lambda f: (f / "kv_mask.safetensors").write_bytes(b"short"), "truncated"),
        (lambda f: save_file({"a": np.ones(3)}, f / "kv_mask.safetensors"), "sha256 differs"),
        (lambda f: tampered(f, lambda t: t["layers.0.k.keep"].__setitem__((0, 2), 8)), "sorted, distinct and in 0..7"),
        (lambda f: tampered(f, lambda t: t["layers.0.k.keep"].__setitem__((0, 1), 0)), "sorted, distinct"),
        (lambda f: tampered(f, lambda t: t.pop("layers.2.k.keep")), "lacks a field.*layers.2.k.keep"),
        (lambda f: tampered(f, lambda t: t.update({"layers.1.k.keep": np.ones((2, 3), np.int32)})), "layers.1.k.keep"),
        (lambda f: tampered(f, lambda t: t.update({"layers.0.k.keep": np.ones((2, 3))})), "whole numbers"),
        (lambda f: tampered(f, lambda t: t.update({"layers.0.k.keep": np.arange(3)})), "do not fit together"),
    ],
)
def test_a_damaged_mask_is_refused_in_a_sentence(damage: Any, message: str, tmp_path: Path) -> None:
    save_mask(some_mask(), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_mask(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_mask_belongs_to_its_model() -> None:
    model = tiny_model("Llama")
    mask = some_mask(config_sha256=config_sha256(model.config), num_hidden_layers=2, key_keep={}, head_dim=16)
    mask.check_model(model.config, "mine")
    with pytest.raises(InputError, match="made for 'some/model', not for 'other'"):
        mask.check_model(tiny_model("Llama", num_hidden_layers=3).config, "other")
    for change in (
        {"num_hidden_layers": 3},
        {"intermediate_size": 32},
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
    ):
        assert config_sha256(tiny_model("Llama", **change).config) != config_sha256(model.config)
    assert config_sha256(tiny_model("Llama", seed=7).config) == config_sha256(model.config)


def test_an_interrupted_save_leaves_the_old_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mask(some_mask(), tmp_path)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grace_opt.compression.mask_file.file_sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_mask(some_mask(key_keep={0: RAGGED}), tmp_path)
    monkeypatch.undo()
    assert load_mask(tmp_path).key_keep.keys() == {0, 2}
    assert len(list(tmp_path.iterdir())) == 2


def of_plan(plan: CachePlan, **changes: Any) -> KVMask:
    return KVMask("m", LAYERS["heads"], LAYERS["n"], plan, num_hidden_layers=3, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_says_all_of_a_plan(name: str, tmp_path: Path) -> None:
    options = {"key_bits": 4} if name in ("grace-opt", "kq-svd") else {}
    mask = of_plan(apply(method(name, options), observed_layers(0), Budget(0.5, 0.25)))
    save_mask(mask, tmp_path)
    assert_same(mask, load_mask(tmp_path))


def test_a_plan_that_chooses_from_each_prompt_is_a_mask_too(tmp_path: Path) -> None:
    mask = of_plan(online(method("think", {"key_bits": 8, "sinks": 2}), [0, 2], Budget(0.5, 0.25)))
    save_mask(mask, tmp_path)
    read = load_mask(tmp_path)
    assert_same(mask, read)
    assert read.plan.layers[2].choice == mask.plan.layers[2].choice


def test_layers_may_have_policies_of_their_own(tmp_path: Path) -> None:
    plan = apply(METHODS["grace-opt"], observed_layers(0), Budget(0.5))
    other = plan.changed(recent_window=7, generated="prune")
    mask = of_plan(CachePlan({**plan.layers, 1: other.layers[1]}))
    save_mask(mask, tmp_path)
    assert_same(mask, load_mask(tmp_path))


def test_fields_of_a_later_release_are_kept(tmp_path: Path) -> None:
    save_mask(some_mask(), tmp_path)
    described(tmp_path, lambda said: said.update(pivot={"layer": 3}))
    read = load_mask(tmp_path)
    assert read.unknown == {"pivot": {"layer": 3}}
    save_mask(read, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "kv_mask.json").read_text())["pivot"] == {"layer": 3}


@pytest.mark.parametrize("scope", ["none", "prefill", "static"])
def test_version_1_is_read(scope: str) -> None:
    """Files that version 1 wrote (tests/data): what it left to its runtime is said now."""
    mask = load_mask(DATA / f"mask-1-{scope}")
    assert mask.readout_scope == scope
    assert (mask.windows.sinks, mask.windows.recent_window, mask.windows.generated) == (3, 16, "prune")
    assert mask.key_keep.keys() == {0, 8, 16, 28}
    assert len({len(kept) for heads in mask.key_keep.values() for kept in heads}) > 1
    layer = mask.plan.layers[0]
    assert layer.readout == (ReadoutRecipe() if scope == "prefill" else None)
    readout = mask.static_readout("key", 0, 0)
    assert (readout is not None) == (scope == "static")
    if readout is not None:
        assert np.isfinite(readout.matrix).all()
        assert readout.matrix.shape == (64 - len(mask.key_keep[0][0]), len(mask.key_keep[0][0]))


@pytest.mark.parametrize("part", ["matrix", "constant"])
def test_a_static_readout_of_version_1_that_is_missing_is_named(part: str, tmp_path: Path) -> None:
    folder = tmp_path / "mask"
    shutil.copytree(DATA / "mask-1-static", folder)
    tampered(folder, lambda tensors: tensors.pop(f"layers.8.k.kv_heads.1.readout.{part}"))
    with pytest.raises(InputError, match=r"^the mask's static read-out layers.8.k.kv_heads.1.readout is missing"):
        load_mask(folder)
