"""Joint ranks of calibrated bundles, beside the tokens that were calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grace_opt.runtime
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_joint import joint_mask
from grace_opt.compression.mask_file import load_mask, save_mask
from grace_opt.compression.method import method
from grace_opt.compression.pays import held_bytes
from grace_opt.errors import InputError
from grace_opt.graphs.bundle import GraphBundle, load_bundle, save_bundle
from grace_opt.graphs.calibrate import Calibration, calibrate
from tests.support.command import inside
from tests.support.families import ByteTokenizer, tiny_model
from tests.support.generation import compare

WINDOW, SINKS, RECENT = 64, 2, 6
PREFIX = "layers.0.k.kv_heads.0.basis"


def text_of(windows: int) -> str:
    return "".join(map(chr, np.random.default_rng(0).integers(33, 123, windows * WINDOW)))


def bundle_of(model: Any, windows: int = 6, **more: Any) -> GraphBundle:
    text = text_of(windows)
    options = Calibration(
        tokens=windows * WINDOW, window=WINDOW, sinks=SINKS, recent_window=RECENT, lowrank=True, **more
    )
    return calibrate(model, ByteTokenizer(), [text], options)


def test_matrices_are_those_of_the_tokens_and_add_up(tmp_path: Path) -> None:
    from grace_opt.models.attention import attending_with, observing
    from grace_opt.models.rotary import Turn, rotary_of
    from grace_opt.models.texts import token_windows

    model = tiny_model("Qwen3")
    bundle = bundle_of(model)
    save_bundle(bundle, tmp_path / "b.safetensors")
    again = load_bundle(tmp_path / "b.safetensors")
    seen: dict[Any, np.ndarray] = {}

    def see(module: Any, query: Any, key: Any, value: Any, scaling: float, arguments: Any) -> None:
        turned_back = Turn(rotary_of(model), module.layer_idx).back(key[0])
        for kind, states in (("key", turned_back), ("value", value[0])):
            old = states[:, SINKS:-RECENT].movedim(0, 1).flatten(1).double().numpy()
            seen[module.layer_idx, kind] = seen.get((module.layer_idx, kind), 0) + old.T @ old

    for ids in token_windows([text_of(6)], ByteTokenizer(), 6 * WINDOW, WINDOW):
        with torch.no_grad(), attending_with(model, observing(see)):
            model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    assert bundle.joint.keys() == again.joint.keys() == seen.keys()
    for at, gram in seen.items():
        np.testing.assert_allclose(again.joint[at]["cskv"], gram, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(again.joint[at]["attention"], bundle.joint[at]["attention"])
        # Keys of this family are normalised after their projection, so ASVD has no factors of them.
        assert ("asvd" in again.joint[at]) == (at[1] == "value")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["cskv", "cskv-attention", "asvd", "cskv+int4"])
@pytest.mark.parametrize("sharing", ["uniform", "shared"])
def test_a_mask_runs_as_its_factors_say(name: str, sharing: str, tmp_path: Path) -> None:
    model = tiny_model("Qwen2")
    made = joint_mask(bundle_of(model), method(name, {"budget": sharing, "recent_window": 5}), Budget(0.5, 0.25))
    save_mask(made, tmp_path)
    mask = load_mask(tmp_path)
    widths = {kind: [each[0] for each in mask.plan.widths(kind).values()] for kind in ("key", "value")}  # type: ignore[arg-type]
    assert sum(widths["key"]) == 0.5 * 2 * 32
    assert sum(widths["value"]) == 0.75 * 2 * 32
    if sharing == "uniform":
        assert set(widths["key"]) == {16}
    mask.check_model(model.config, "tiny")
    if "int4" in name:
        assert mask.plan.layers[0].codecs["key"][0].block == 32
    else:
        compare(model, mask)


def test_a_share_counts_what_is_held() -> None:
    model = tiny_model("Llama")
    budget = Budget(share=0.5, tokens=2000)
    mask = joint_mask(bundle_of(model), method("cskv"), budget)
    shapes = {"key": (2, 16), "value": (2, 16)}
    held = sum(held_bytes(layer, shapes, 2000, 2) for layer in mask.plan)  # type: ignore[arg-type]
    assert 0.25 < held / (2 * 2000 * 64 * 2) <= 0.5  # in 16 bits a step is 8 of 32 numbers
    past = grace_opt.runtime.cache(mask, model)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 63)[None], past_key_values=past)
    assert past.layers[0].key_side.codec.heads == 2


def test_what_a_bundle_cannot_give_is_said() -> None:
    model = tiny_model("Qwen3")
    plain = calibrate(model, ByteTokenizer(), ["x" * 200], Calibration(tokens=64, window=64))
    with pytest.raises(InputError, match="calibrate with --lowrank"):
        joint_mask(plain, method("cskv"), Budget(0.5))
    with pytest.raises(InputError, match="not a plain linear layer of its input; use cskv"):
        joint_mask(bundle_of(model), method("asvd"), Budget(0.5))
    short = calibrate(
        model,
        ByteTokenizer(),
        ["abcdefghijklmnopqrstuvwxyz"],
        Calibration(tokens=16, window=16, sinks=1, recent_window=2, observation_window=4, lowrank=True),
    )
    with pytest.raises(InputError, match="13 is the largest safe rank"):
        joint_mask(short, method("cskv"), Budget(0.25))
    joint_mask(short, method("cskv"), Budget(0.75))


def test_the_command_line_makes_the_mask(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    save_bundle(bundle_of(model), tmp_path / "b.safetensors")
    asked = ["solve", tmp_path / "b.safetensors", "-o", tmp_path / "mask", "--method", "cskv"]
    made = inside(*asked, "--ratio", 0.5, "--value-ratio", 0.75, "-f", "json")
    assert made.returncode == 0, made.stderr
    assert [(row["key rank"], row["value rank"]) for row in json.loads(made.stdout)["records"]] == [(16, 8)] * 2
    assert load_mask(tmp_path / "mask").plan.layers[1].codecs["value"][0].heads == 2
    refused = inside(*asked, "--ratio", 0.5, "--solver", "greedy")
    assert refused.returncode == 2
    assert "nothing to solve" in refused.stderr
    refused = inside(*asked, "--ratio", 0.5, "--target", "gguf")
    assert refused.returncode == 2
    assert "gguf" in refused.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said, held: said.update(kv_heads=3), "for 3 KV heads, and the model has 2"),
        (lambda said, held: said.update(kv_heads="2"), "must be a whole number"),
        (lambda said, held: held.update({PREFIX: held[PREFIX][:0]}), "must be from 1 to the 32 channels"),
        (lambda said, held: held.update({PREFIX: held[PREFIX][None]}), "no matrices of real numbers"),
        (lambda said, held: held.update({PREFIX: held[PREFIX].astype(np.int32)}), "no matrices of real numbers"),
        (lambda said, held: held.update({PREFIX: held[PREFIX][0]}), "one of the wrong type"),
        (lambda said, held: held.update({PREFIX: held[PREFIX] * np.float32(np.nan)}), "not finite"),
        (lambda said, held: held.update({PREFIX: held[PREFIX][:, :24]}), "for 12 channels"),
        (lambda said, held: held.pop(PREFIX), "lacks a field"),
    ],
)
def test_a_spoilt_file_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from grace_opt.files import file_sha256

    save_mask(joint_mask(bundle_of(tiny_model("Llama")), method("cskv"), Budget(0.5, 0.5)), tmp_path)
    said = json.loads((tmp_path / "kv_mask.json").read_text())
    path = tmp_path / said["tensors"]["file"]
    held = load_file(path)
    change(said["layers"][0]["key"], held)
    save_file({name: np.ascontiguousarray(each) for name, each in held.items()}, path)
    said["tensors"]["sha256"] = file_sha256(path)
    (tmp_path / "kv_mask.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=words):
        load_mask(tmp_path)
