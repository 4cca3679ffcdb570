from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grace_opt import InputError, KVMask, load_bundle, load_mask, mask_from_solutions, save_mask, solve_many
from grace_opt.models.config import config_sha256
from tests.support.families import tiny_model


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
    return KVMask(**{**fields, **changes})


RAGGED = (np.array([3], np.int32), np.array([], np.int32))
MASKS = {
    "uniform": some_mask(),
    "ragged": some_mask(key_keep={1: RAGGED}, recent_window=0, sinks=0),
    "values": some_mask(value_keep={3: RAGGED, 0: (np.arange(8, dtype=np.int32),) * 2}),
    "read-out": some_mask(readout_scope="static", extra={"layers.0.k.readout": np.ones((2, 3, 5))}),
    "bare": some_mask(num_hidden_layers=None, config_sha256=None, softmax_scale=None),
}


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    mask = MASKS[name]
    save_mask(mask, tmp_path / "mask")
    read = load_mask(tmp_path / "mask")
    for field in mask.__dataclass_fields__:
        mine, theirs = getattr(mask, field), getattr(read, field)
        if field in ("key_keep", "value_keep"):
            assert mine.keys() == theirs.keys()
            for layer in mine:
                for a, b in zip(mine[layer], theirs[layer], strict=True):
                    np.testing.assert_array_equal(a, b)
        elif field == "extra":
            assert mine.keys() == theirs.keys()
            assert all((mine[key] == theirs[key]).all() for key in mine)
        else:
            assert mine == theirs, field
    assert sorted(path.name for path in (tmp_path / "mask").iterdir()) == ["kv_mask.json", "kv_mask.safetensors"]


def test_the_files_say_what_implementers_need(tmp_path: Path) -> None:
    save_mask(some_mask(), tmp_path)
    said = json.loads((tmp_path / "kv_mask.json").read_text())
    assert (said["format"], said["version"]) == ("kv-channel-mask", 1)
    assert said["layers"] == [
        {"index": 0, "k_dim": 3},
        {"index": 1, "skip": True},
        {"index": 2, "k_dim": 3},
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
    assert (mask.recent_window, mask.sinks) == (32, 1)
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
        (lambda f: described(f, lambda s: s.update(version=2)), "version 2"),
        (lambda f: described(f, lambda s: s.pop("policy")), "lacks a field.*policy"),
        (lambda f: described(f, lambda s: s["layers"][0].update(k_dim=4)), "should keep 4 channels"),
        (lambda f: described(f, lambda s: s["policy"].update(sink_tokens=-1)), "sinks must not be negative"),
        (lambda f: described(f, lambda s: s["geometry"].update(head_dim="x")), "wrong type"),
        (lambda f: described(f, lambda s: s["key"].update(stage="pre_rope")), "only 'post_rope'"),
        (lambda f: described(f, lambda s: s.update(layers=[])), "does not match its tensors"),
        (lambda f: described(f, lambda s: s.update(layers={})), "does not match its tensors"),
        (
            lambda f: described(f, lambda s: s["layers"].append({"index": 1, "skip": True})),
            "does not match its tensors",
        ),
        (lambda f: tampered(f, lambda t: t.update({"layers.0.k.keep": np.full((2, 3), 2**32)})), "out of range"),
        (lambda f: (f / "kv_mask.safetensors").unlink(), "no such file"),
        (lambda f: (f / "kv_mask.safetensors").write_bytes(b"short"), "truncated"),
        (lambda f: save_file({"a": np.ones(3)}, f / "kv_mask.safetensors"), "sha256 differs"),
        (lambda f: tampered(f, lambda t: t["layers.0.k.keep"].__setitem__((0, 2), 8)), "sorted, distinct and in 0..7"),
        (lambda f: tampered(f, lambda t: t["layers.0.k.keep"].__setitem__((0, 1), 0)), "sorted, distinct"),
        (lambda f: tampered(f, lambda t: t.pop("layers.2.k.keep")), "does not match its tensors.*layers.2.k.keep"),
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

    monkeypatch.setattr("grace_opt.compression.mask.hashlib.sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_mask(some_mask(key_keep={0: RAGGED}), tmp_path)
    monkeypatch.undo()
    assert load_mask(tmp_path).key_keep.keys() == {0, 2}
    assert len(list(tmp_path.iterdir())) == 2
