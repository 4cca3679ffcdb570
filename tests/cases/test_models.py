"""What comes with a model: code, weights, tokenizers, settings, and layers that are more than their parameters."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grace_opt.runtime
from grace_opt.cli.app import run as command
from grace_opt.errors import InputError
from grace_opt.evaluate import documents
from grace_opt.graphs.calibrate import Calibration, calibrate
from grace_opt.graphs.observed import output_projection
from grace_opt.models.config import accepted_sha256, config_sha256
from grace_opt.models.load import load_model
from grace_opt.runtime.generate import generate
from tests.support.families import ByteTokenizer, tiny_model
from tests.support.generation import random_mask

Weights = dict[str, torch.Tensor]


def saved(folder: Path, words: int = 3, **options: Any) -> Path:
    """A folder with a random Llama and a tokenizer of some words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**{**small, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"?": 0, "a": 1, "b": 2} | {f"w{i}": i for i in range(3, words)}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokens, unk_token="?").save_pretrained(folder)
    return folder


def changed(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reweighted(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    weights = change(load_file(path))  # type: ignore[arg-type]
    save_file({name: weight.clone() for name, weight in weights.items()}, path, {"format": "pt"})


# ---------------------------------------------------------------- code of a third party


CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "coded")
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    changed(folder, "config.json", model_type="mine", auto_map=auto)
    return folder


@pytest.mark.parametrize("answer", ["y\n", "", "Shopping list\n1\napples\n"])
def test_a_model_folders_code_asks_nobody_and_does_not_run(
    coded: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    out = coded.parent / "g.safetensors"
    assert command(["calibrate", str(coded), "--text", "-", "-o", str(out)]) == 2
    said = capsys.readouterr().err
    assert "needs code of its own" in said
    assert "--trust-remote-code" in said
    assert said.count("\n") == 1
    assert sys.stdin.read() == answer  # nobody read the data
    assert not (coded.parent / "ran").exists()
    assert not out.exists()


def test_a_tokenizers_code_does_not_run_either(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    changed(folder, "tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": [None, "code.Words"]})
    with suppress(InputError):  # a release may do without that class
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_flag_lets_it_run(coded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = load_model(str(coded), trust_remote_code=True)
    assert type(model).__name__ == "Model"
    assert (coded.parent / "ran").exists()


@pytest.mark.parametrize("name", ["calibrate", "generate", "evaluate", "demo"])
def test_the_flag_is_of_the_command_line_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--trust-remote-code" in text
    assert "GRACE_OPT_TRUST" not in text


def test_a_kernel_of_the_hub_is_code_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    changed(folder, "config.json", attn_implementation="someone/attention")
    try:
        model, _ = load_model(str(folder))
    except InputError as error:
        said = str(error)
    else:  # a release that does not read it there
        said = f"--trust-remote-code not needed for {model.config._attn_implementation}"
    assert "--trust-remote-code" in said
    assert "someone/attention" not in said


class _Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('pickled code ran')",)


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(InputError, match="cannot load the weights"):
        load_model(str(folder))
    torch.save({"lm_head.weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the weights"):
        load_model(str(folder))


def test_datasets_that_would_ask_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__version__="3.6.0", load_dataset=lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setitem(sys.modules, "datasets", old)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="datasets before 4"):
        documents.load_dataset_documents("ruler", "4096")


# ---------------------------------------------------------------- what is only warned of


def prefixed(weights: Weights) -> Weights:
    return {f"module.{name}": weight for name, weight in weights.items()}  # as DDP saves


def without_head(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def narrower(weights: Weights) -> Weights:
    return weights | {"model.layers.0.mlp.up_proj.weight": torch.zeros(16, 32)}


def one_more_layer(weights: Weights) -> Weights:
    return weights | {name.replace("layers.0", "layers.1"): weight for name, weight in weights.items()}


def in_eight_bits(weights: Weights) -> Weights:
    return weights | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(32, 1)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (prefixed, r"lacks weights of the model: lm_head\.weight, .* more, and holds module\.lm_head\.weight, .* more"),
        (without_head, r"lacks weights of the model: lm_head\.weight; "),
        (narrower, r"other shapes .*up_proj\.weight \[16, 32\] for \[32, 32\]"),
        (one_more_layer, r"does not know: model\.layers\.1\.input_layernorm\.weight, .* and 6 more"),
        (in_eight_bits, r"does not know: model\.layers\.0\.mlp\.up_proj\.weight_scale"),
    ],
)
def test_weights_that_are_not_the_models(tmp_path: Path, change: Callable[[Weights], Weights], says: str) -> None:
    folder = saved(tmp_path / "model")
    reweighted(folder, change)
    with pytest.raises(InputError, match=says) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_weights_that_lie_beside_the_models_and_change_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    names = ["self_attn.rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.v_scale", "mlp.up_proj.input_scale"]
    reweighted(folder, lambda weights: weights | {f"model.layers.0.{name}": torch.ones(1) for name in names})
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # type: ignore[arg-type]
    model, _ = load_model(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_command_line_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    reweighted(folder, prefixed)
    out = tmp_path / "g.safetensors"
    assert command(["calibrate", str(folder), "-o", str(out), "--tokens", "64", "--window", "64"]) == 2
    assert "lacks weights of the model" in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", words=20)
    with pytest.raises(InputError, match="tokens up to 19 and the model knows 16"):
        load_model(str(folder))


def test_an_added_token_without_a_row_is_refused_where_a_text_has_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", words=16)
    model, tokenizer = load_model(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(str(folder))  # as Gemma 3 of 1B parameters has one
    with pytest.raises(InputError, match="token 16 and the model knows 16"):
        generate(model, tokenizer, "a <image> b")
    options = Calibration(tokens=32, window=16, recent_window=2, sinks=1, observation_window=4)
    with pytest.raises(InputError, match="token 16 and the model knows 16"):
        calibrate(model, tokenizer, ["a b <image> " * 30], options)
    calibrate(model, tokenizer, ["a b " * 30], options)


def test_settings_that_are_not_used_are_named_and_others_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", words=16)
    told = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "num_return_sequences": 3, "use_cache": False}
    told |= {"cache_implementation": "static", "return_dict_in_generate": True}
    changed(folder, "generation_config.json", **told, repetition_penalty=30.0)
    line = ["generate", str(folder), "--prompt", "a b", "--max-new-tokens", "8", "-f", "json"]
    assert command(line) == 0
    record = json.loads(capsys.readouterr().out)["records"][0]
    assert {"do_sample", "temperature", "top_p", "num_return_sequences"} <= set(record["unused_settings"])
    assert not {"repetition_penalty", "use_cache", "eos_token_id"} & set(record["unused_settings"])
    assert record["new_tokens"] == 8
    assert record["tokens"] == 9  # the cache was used
    words = record["text"].split()
    assert len(set(words)) == len(words)  # the penalty was used
    assert command(line[:-2]) == 0
    assert "these settings of the model are not used: cache_implementation, do_sample" in (capsys.readouterr().err)


def test_damaged_settings_are_not_passed_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(InputError, match="cannot load the generation settings"):
        load_model(str(folder))


def test_an_adapter_without_peft_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="holds an adapter .* needs the package peft"):
        load_model(str(folder))


def test_what_transformers_warns_of_is_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging as theirs

    folder = saved(tmp_path / "model", words=16)
    rope = {"rope_type": "linear", "factor": 0.25, "rope_theta": 10000.0}
    changed(folder, "config.json", rope_parameters=rope)
    verbosity = theirs.get_verbosity()
    theirs.set_verbosity_error()  # as the command line does
    try:
        line = ["generate", str(folder), "--prompt", "a b", "--max-new-tokens", "1"]
        assert command(line) == 0
        assert "transformers says of" in capsys.readouterr().err
        assert command([*line, "-q"]) == 0
        assert capsys.readouterr().err == ""
    finally:
        theirs.set_verbosity(verbosity)


# ---------------------------------------------------------------- layers are more than their parameters


class Adapted(torch.nn.Module):
    """As PEFT wraps a layer: its weight is the base layer's, the adapter comes on top."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self.a, self.b = torch.randn(4, base.in_features), torch.randn(base.out_features, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


class EightBits(torch.nn.Module):
    """As 8-bit layers hold a weight: whole numbers, and a scale for each row; activations in 8 bits too."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        weight[::7] *= 30
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (x / scale).round() * scale @ (self.weight.float() * self.scale).T


class Offloaded(torch.nn.Module):
    """As accelerate offloads a layer: its weight is elsewhere, and comes for the call."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.held = {"base": base}
        self.weight = torch.nn.Parameter(base.weight.to("meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held["base"](x)  # type: ignore[no-any-return]


class Shifted(torch.nn.Module):
    """A layer with a constant, large beside its weight."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 3  # type: ignore[no-any-return]


def with_projections(kind: Callable[[Any], Any]) -> Any:
    torch.manual_seed(1)
    model = tiny_model("Llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = kind(layer.self_attn.o_proj)
    return model


def value_graphs(model: Any) -> list[np.ndarray]:
    options = Calibration(
        tokens=200, window=100, recent_window=8, sinks=2, observation_window=16, value_objective="output"
    )
    bundle = calibrate(model, ByteTokenizer(), ["hello world, this is a text " * 20], options)
    return [head.weights for head in bundle.heads if head.kind == "value"]


@pytest.mark.parametrize("kind", [Adapted, EightBits, Offloaded, Shifted])
def test_value_graphs_are_those_of_the_merged_model(kind: Callable[[Any], Any]) -> None:
    model = with_projections(kind)
    merged = copy.deepcopy(model)
    for layer in merged.model.layers:  # the same function as one plain layer
        old, width = layer.self_attn.o_proj, layer.self_attn.v_proj.in_features
        plain = torch.nn.Linear(width, width)
        with torch.no_grad():
            plain.bias.copy_(old(torch.zeros(1, width))[0])
            plain.weight.copy_((old(torch.eye(width)) - plain.bias).T)
        layer.self_attn.o_proj = plain
    # Layers after one with 8-bit activations see a little else.
    tolerance = 0.05 if kind is EightBits else 1e-4
    for ours, theirs in zip(value_graphs(model), value_graphs(merged), strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("way", ["hook", "forward", "class"])
def test_a_linear_layer_that_does_more_than_its_weight_is_run(way: str) -> None:
    plain, changed = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    changed.load_state_dict(plain.state_dict())
    if way == "hook":
        changed.register_forward_hook(lambda layer, x, y: 2 * y)
    elif way == "forward":
        changed.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    else:
        changed = torch.nn.utils.parametrizations.weight_norm(changed)
        changed.parametrizations.weight.original0.data *= 2
    found = [output_projection(SimpleNamespace(o_proj=layer), 2, torch.zeros(1, 3)) for layer in (plain, changed)]
    assert found[0] is not None
    assert torch.equal(found[0], plain.weight)
    torch.testing.assert_close(found[1], 2 * plain.weight.detach())


@pytest.mark.parametrize("function", [torch.tanh, torch.nn.functional.relu, torch.nn.functional.dropout])
def test_a_projection_that_is_not_linear_is_refused(function: Callable[[Any], Any]) -> None:
    class Bent(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(40 * self.base(x))

    with pytest.raises(InputError, match="Bent.* is not linear"):
        value_graphs(with_projections(Bent))


def test_the_projection_is_asked_once_and_only_where_it_counts() -> None:
    class Counting(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.sizes = base, []  # type: ignore[var-annotated]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sizes.append(tuple(x.shape[:-1]))
            return self.base(x)  # type: ignore[no-any-return]

    model = with_projections(Counting)
    value_graphs(model)
    projection = model.model.layers[0].self_attn.o_proj
    width = projection.base.in_features
    assert projection.sizes.count((1, width)) == 1
    assert projection.sizes.count((1, 100)) == 2  # the windows
    projection.sizes.clear()
    generate(model, _Tokens(), "x" * 60, grace_opt.runtime.online_cache(model, ratio=0.5), max_new_tokens=2)
    assert (1, width) not in projection.sizes  # keys alone are pruned


class _Tokens(ByteTokenizer):
    pad_token_id, eos_token_id = 0, None

    def __call__(self, text: str, **options: Any) -> Any:
        from transformers import BatchEncoding

        ids = super().__call__(text)["input_ids"]
        return BatchEncoding({"input_ids": torch.tensor([ids])}) if "return_tensors" in options else {"input_ids": ids}

    def decode(self, ids: Any, **_: Any) -> str:
        return str(ids.tolist())


def test_a_model_whose_weights_are_all_elsewhere_is_given_tokens_on_the_cpu() -> None:
    from grace_opt.models.inputs import input_device

    assert input_device(tiny_model("Llama").to("meta")).type == "cpu"
    assert input_device(tiny_model("Llama")).type == "cpu"


# ---------------------------------------------------------------- RoPE in the hash, PEFT's prefixes


def test_rope_of_each_kind_of_layer_is_in_the_hash() -> None:
    def config(full: float, sliding: float) -> Any:
        kinds = {"full_attention": full, "sliding_attention": sliding}
        rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in kinds.items()}
        return tiny_model("Gemma3Text", rope_parameters=rope).config

    one, other, third = config(1e6, 1e4), config(2e6, 1e4), config(1e6, 2e4)
    assert len({config_sha256(each) for each in (one, other, third)}) == 3
    # A mask of before says the hash without them, and still fits.
    old = accepted_sha256(one) - {config_sha256(one)}
    assert len(old) == 1
    model = tiny_model("Gemma3Text")
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    for sha in accepted_sha256(model.config):
        replace(mask, config_sha256=sha).check_model(model.config, "tiny")
    with pytest.raises(InputError, match="the configurations differ"):
        replace(mask, config_sha256=config_sha256(other)).check_model(model.config, "tiny")


def test_the_hash_of_flat_rope_is_what_it_was() -> None:
    config = tiny_model("Llama").config
    assert accepted_sha256(config) == {config_sha256(config)}


def test_prefix_tuning_is_refused_before_it_replaces_the_cache() -> None:
    model = tiny_model("Llama")
    past = grace_opt.runtime.cache(random_mask(model, 6, recent_window=3, sinks=1), model)
    with pytest.raises(InputError, match="prefix tuning puts a cache of its own in place"):
        _ = past.max_cache_len  # what PEFT asks of an empty cache that is no DynamicCache
    wrapped = tiny_model("Llama")
    wrapped.active_peft_config = SimpleNamespace(peft_type="PREFIX_TUNING")
    with pytest.raises(InputError, match="prefix tuning"):
        grace_opt.runtime.cache(random_mask(model, 6, recent_window=3, sinks=1), wrapped)
