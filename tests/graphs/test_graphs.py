from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grace_opt import (
    Calibration,
    GraphBundle,
    HeadGraph,
    InputError,
    Protection,
    calibrate,
    load_bundle,
    salient_channels,
    save_bundle,
    solve,
)
from grace_opt.graphs.accumulate import GraphSums
from grace_opt.models.attention import register
from grace_opt.models.texts import read_pieces, token_windows
from tests.support.families import FAMILIES, ByteTokenizer, tiny_model
from tests.support.observed import observed_layers

TEXT = ["Every channel is a node, and interactions are weighted edges. " * 40]
SHORT = Calibration(tokens=192, window=64, observation_window=8, recent_window=5, sinks=3, objective="logit")


def states_by_eye(model: Any, windows: list[list[int]]) -> list[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Queries and keys of each window and full-attention layer, float64, seen by an attention function of our own."""
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def look(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window") is None:
            seen[module.layer_idx] = (query[0].double().numpy(), key[0].double().numpy())
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    register("test_look", look)
    model.set_attn_implementation("test_look")
    result = []
    with torch.no_grad():
        for window in windows:
            seen.clear()
            model(input_ids=torch.tensor([window]))
            result.append(dict(seen))
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_graph_is_the_squared_error_of_the_logits(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    bundle = calibrate(model, ByteTokenizer(), TEXT, SHORT)
    assert model.config._attn_implementation == before
    windows = list(token_windows(TEXT, ByteTokenizer(), 192, 64))
    assert len(windows) == 3
    states = states_by_eye(model, windows)
    assert {head.layer for head in bundle.heads} == set(states[0])
    pruned = np.arange(states[0][max(states[0])][1].shape[-1]) % 3 == 1
    for head in bundle.heads:
        errors = []
        for window in states:
            queries, keys = window[head.layer]
            group = len(queries) // len(keys)
            mine = queries[head.kv_head * group : (head.kv_head + 1) * group, -8:]
            old = keys[head.kv_head, 3:-5]
            errors.append(float(np.square(mine[..., pruned] @ old[:, pruned].T).sum()))
        x = pruned.astype(float)
        assert float(x @ head.weights @ x) == pytest.approx(np.mean(errors), rel=1e-9)
        assert np.linalg.eigvalsh(head.weights).min() >= -1e-9 * np.abs(head.weights).max()


def test_one_window_factors_into_its_statistics() -> None:
    model = tiny_model("Llama")
    bundle = calibrate(model, ByteTokenizer(), TEXT, Calibration(tokens=64, observation_window=8, objective="logit"))
    windows = list(token_windows(TEXT, ByteTokenizer(), 64, 64))
    states = states_by_eye(model, windows)[0]
    for head in bundle.heads:
        assert head.query_gram is not None
        assert head.key_gram is not None
        np.testing.assert_allclose(head.weights, head.query_gram * head.key_gram, rtol=1e-12)
        old = states[head.layer][1][head.kv_head, 4:-32]
        np.testing.assert_allclose(head.key_mean, old.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(head.protected, salient_channels(np.linalg.norm(old, axis=0), Protection()))
    expected = {"tokens": "64", "window": "64", "sinks": "4", "recent_window": "32", "objective": "logit"}
    assert expected.items() <= bundle.metadata.items()
    assert bundle.metadata["num_attention_heads"] == "4"
    assert bundle.metadata["num_key_value_heads"] == "2"
    assert float(bundle.metadata["softmax_scale"]) == 0.25


def test_sliding_models_get_graphs_for_their_full_layers_or_a_sentence() -> None:
    mixed = calibrate(tiny_model("Gemma3Text"), ByteTokenizer(), TEXT, SHORT)
    assert {head.layer for head in mixed.heads} == {1}
    with pytest.raises(InputError, match="every attention layer of MistralForCausalLM uses a sliding window"):
        calibrate(tiny_model("Mistral", sliding_window=16), ByteTokenizer(), TEXT, SHORT)


def test_memory_does_not_grow_with_the_text() -> None:
    graphs = GraphSums("attention", "output")
    sizes = []
    for seed in range(3):
        graphs.add(0, observed_layers(seed, 1)[0])
        sizes.append(sum(t.numel() for sums in graphs._sums.values() for t in sums.values()))
    assert len(set(sizes)) == 1

    class Endless:
        """A text without end: only as much of it may be read as is asked for."""

        read = 0

        def __iter__(self) -> Endless:
            return self

        def __next__(self) -> str:
            self.read += 1
            return "a line of text\n" * 50

    endless = Endless()
    assert len(list(token_windows(endless, ByteTokenizer(), 10_000, 100))) == 100
    assert endless.read < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"sinks": -1}, "sinks must not be negative"),
        ({"tokens": 64, "window": 32}, "no prunable key between 4 sinks and a recent window of 32"),
        ({"window": 300}, "longer than the model's context of 256"),
        ({"tokens": 100, "window": 200}, "100 tokens hold no window of 200"),
        ({"tokens": 64, "recent_window": 1, "observation_window": 65}, "observation window of 65 is longer"),
    ],
)
def test_bad_options_are_sentences(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        calibrate(tiny_model("Llama"), ByteTokenizer(), TEXT, Calibration(**options))
    with pytest.raises(InputError, match="0 <= a <= b <= 1"):
        Protection(at_least=0.5, at_most=0.2)


def test_short_and_empty_texts_are_sentences() -> None:
    for pieces in ([], [""]):
        with pytest.raises(InputError, match="the text is empty"):
            list(token_windows(pieces, ByteTokenizer(), 64, 64))
    with pytest.raises(InputError, match="the text has 5 tokens, fewer than one window of 64"):
        list(token_windows(["hello"], ByteTokenizer(), 64, 64))


def test_texts_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(map(len, read_pieces(None))) > 300_000
    file = tmp_path / "text.txt"
    file.write_text("grün\n" * 50_000, encoding="utf-8")
    pieces = list(read_pieces(str(file)))
    assert "".join(pieces) == "grün\n" * 50_000
    assert 1 < len(pieces) < 10
    file.write_text("x" * 300_000, encoding="utf-8")
    pieces = list(read_pieces(str(file)))
    assert "".join(pieces) == "x" * 300_000
    assert max(map(len, pieces)) <= 1 << 17
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert list(read_pieces("-")) == ["from a pipe"]
    file.write_bytes(b"caf\xe9 " * 10)
    for bad, message in ((str(file), "not UTF-8"), (str(tmp_path), "no such text"), ("nowhere", "no such text")):
        with pytest.raises(InputError, match=message):
            list(read_pieces(bad))


def test_every_window_starts_with_the_tokenizers_bos() -> None:
    class WithBos(ByteTokenizer):
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + super().__call__(text)["input_ids"]}

    windows = list(token_windows(TEXT, WithBos(), 40, 10))
    assert [window[0] for window in windows] == [1] * 4
    assert [len(window) for window in windows] == [10] * 4
    plain = ByteTokenizer()(TEXT[0])["input_ids"]
    assert [token for window in windows for token in window[1:]] == plain[:36]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=64), st.floats(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_protection_counts_and_order(norms: list[float], multiple: float, a: float, b: float) -> None:
    a, b = min(a, b), max(a, b)
    array = np.array(norms)
    protected = salient_channels(array, Protection(multiple, a, b))
    qualify = np.mean(array > array.mean() + multiple * array.std())
    assert protected.sum() == np.floor(min(max(qualify, a), b) * len(array) + 1e-9)
    if protected.any() and not protected.all():
        assert array[protected].min() >= array[~protected].max()


def test_bundles_round_trip_and_are_whole_or_absent(tmp_path: Path) -> None:
    heads = (
        HeadGraph(0, 0, "key", np.eye(4), key_mean=np.arange(4.0), protected=np.array([True, False, False, False])),
        HeadGraph(0, 0, "value", np.eye(4), groups=np.array([0, 1, 0, 1])),
        HeadGraph(10, 1, "key", np.eye(4), query_gram=np.eye(4), key_gram=np.eye(4)),
    )
    path = tmp_path / "deep" / "graphs.safetensors"
    save_bundle(GraphBundle(heads, {"model": "tiny"}), path)
    read = load_bundle(path)
    assert [head.name for head in read.heads] == [head.name for head in heads]
    for mine, theirs in zip(heads, read.heads, strict=True):
        for name in ("weights", "query_gram", "key_gram", "key_mean", "protected", "groups"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    assert read.metadata["model"] == "tiny"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_ratio_counts_channels() -> None:
    bundle = GraphBundle((HeadGraph(0, 0, "key", np.eye(64), protected=np.arange(64) < 10),), {})
    assert [bundle.problems(r)[0].prune for r in (0, 0.5, 0.6, 0.8, 0.015625)] == [0, 32, 38, 51, 1]
    assert bundle.problems(0.6)[0].prunable == 54
    assert bundle.problems(0.9, protect=False)[0].prune == 57
    with pytest.raises(InputError, match="cannot prune 57 of 64 channels, 54 are prunable"):
        bundle.problems(0.9)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="at least 0 and below 1"):
            bundle.problems(ratio)


def test_damaged_bundles_are_named(tmp_path: Path, real_heads: Path) -> None:
    from safetensors.numpy import save_file

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(real_heads.read_bytes()[:-1000])
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"\xff" * 100)
    other = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(3)}, other)
    old = tmp_path / "old.safetensors"
    save_file({"a": np.zeros(3)}, old, metadata={"format": "grace_opt.graphs", "version": "9"})
    empty = tmp_path / "empty.safetensors"
    save_file({"a": np.zeros(3)}, empty, metadata={"format": "grace_opt.graphs", "version": "1"})
    oblong = tmp_path / "oblong.safetensors"
    name = "layers.0.kv_heads.0.key"
    save_file({f"{name}.weights": np.zeros((2, 3))}, oblong, metadata={"format": "grace_opt.graphs", "version": "1"})
    for path, message in (
        (cut, "truncated"),
        (junk, "truncated or not a safetensors"),
        (other, "not a graph bundle"),
        (old, "version '9'"),
        (empty, "holds no graph"),
        (oblong, "square matrix"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_bundle(path)
        assert path.name in str(caught.value)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = GraphBundle((HeadGraph(0, 0, "key", np.eye(4)),), {})
    path = tmp_path / "graphs.safetensors"
    save_bundle(bundle, path)
    before = path.read_bytes()

    def full_disk(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        save_bundle(bundle, path)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(bundle, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        ("Llama", [(i, i + 8) for i in range(8)]),
        ("Gemma3Text", [(i, i + 8) for i in range(8)]),
        ("Cohere", [(2 * i, 2 * i + 1) for i in range(8)]),
        ("GPTNeoX", [(0, 2), (1, 3)]),
        ("StableLm", [(0, 2), (1, 3)]),
        ("Glm4", [(2 * i, 2 * i + 1) for i in range(4)]),
    ],
)
def test_rope_pairs_are_tied_as_the_model_turns_them(family: str, pairs: list[tuple[int, int]]) -> None:
    options = Calibration(tokens=64, window=64, recent_window=5, rope_pairs=True)
    bundle = calibrate(tiny_model(family), ByteTokenizer(), TEXT, options)
    labels = np.arange(16)
    for first, second in pairs:
        labels[second] = first
    for head in bundle.heads:
        np.testing.assert_array_equal(head.groups, labels)
    for problem in bundle.problems(0.45):
        solution = solve(problem, "branch-and-bound")
        assert solution.pruned is not None
        assert all((first in solution.pruned) == (second in solution.pruned) for first, second in pairs)


def test_a_model_without_rope_has_no_pairs() -> None:
    options = Calibration(tokens=64, window=64, recent_window=5, rope_pairs=True)
    with pytest.raises(InputError, match="OPTForCausalLM has no rotary embedding"):
        calibrate(tiny_model("OPT"), ByteTokenizer(), TEXT, options)
