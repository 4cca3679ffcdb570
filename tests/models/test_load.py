"""Loading models: the conversion's helpers, every ordinary failure, the cache, and the real smollm2-135m."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt.errors import InputError
from grace_opt.models import load as models
from grace_opt.models.packaged_file import PackagedFile


@given(heads=st.integers(1, 5), half=st.integers(1, 8), columns=st.integers(1, 3))
def test_half_split_undoes_what_llama_gguf_does(heads: int, half: int, columns: int) -> None:
    weights = np.arange(heads * 2 * half * columns).reshape(heads * 2 * half, columns)
    interleaved = weights.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(weights.shape)
    np.testing.assert_array_equal(models._half_split(interleaved, heads), weights)


def test_half_split_by_example() -> None:
    rows = np.array([[0], [2], [1], [3], [10], [12], [11], [13]])  # two heads of four channels
    assert models._half_split(rows, 2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("gguf", "transformers"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.17.attn_k.weight", "model.layers.17.self_attn.k_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_tensor_names(gguf: str, transformers: str) -> None:
    assert models._hf_name(gguf) == transformers


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "grace-opt"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert models.cache_folder() == tmp_path / "home" / ".cache" / "grace-opt"


# Loading a folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 10,000 weights and a tokenizer of three words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no types
    fast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("auto", "float32")],
)
def test_local_folder_loads_in_eval_mode(tiny: Path, dtype: str, expected: str) -> None:
    model, tokenizer = models.load_model(str(tiny), dtype=dtype)
    assert not model.training
    assert str(model.dtype) == f"torch.{expected}"
    assert model.device.type == "cpu"
    assert tokenizer("b a")["input_ids"] == [2, 1]


def test_hub_id_goes_to_transformers_as_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    asked = []

    def redirected(loader: Any) -> Callable[..., Any]:
        original = loader.from_pretrained

        def from_pretrained(name: Any, **options: Any) -> Any:
            asked.append(name)
            return original(tiny if name == "someone/some-model" else name, **options)

        return from_pretrained

    for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", redirected(loader))
    models.load_model("someone/some-model")
    assert asked.count("someone/some-model") == 3


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def unreachable(name: str, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(
        InputError, match=r"^cannot load the configuration of .*couldn't connect.*local folder"
    ) as caught:
        models.load_model("someone/some-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "~/absent", "some/deep/folder", "", "a\\b"])
def test_absent_folder(name: str) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        models.load_model(name)


def test_absent_absolute_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        models.load_model(str(tmp_path / "absent"))


def test_a_file_is_no_folder(tiny: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        models.load_model(str(tiny / "model.safetensors"))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.load_model(str(tmp_path))


def test_broken_config(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="configuration"):
        models.load_model(str(folder))


def test_truncated_weights(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(InputError, match=r"cannot load the weights of .*; check the folder"):
        models.load_model(str(folder))


def test_missing_weights(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the weights"):
        models.load_model(str(folder))


def test_missing_tokenizer(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        models.load_model(str(folder))


def test_unknown_dtype(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'int3'; use one of float32, bfloat16"):
        models.load_model(str(tiny), dtype="int3")


def test_unknown_device(tiny: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'warp'"):
        models.load_model(str(tiny), device="warp")


def test_cuda_where_there_is_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="no device cuda: PyTorch sees 0 CUDA devices"):
        models.load_model(str(tiny), device="cuda")


# Fetching


def test_no_package_index_is_one_sentence_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands: list[list[str]] = []
    start = subprocess.Popen.__init__

    def noted(process: Any, command: list[str], **options: Any) -> None:
        commands.append(command)
        start(process, command, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    with pytest.raises(
        InputError, match=r"cannot fetch smollm2-135m: No matching distribution.*local model folder"
    ) as caught:
        models.load_model("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []
    (command,) = commands
    assert {"--retries=1", "--timeout=20"} <= set(command)  # what makes it soon


# The cache, with a conversion that only pretends


class Builds:
    """Counts the pretended conversions, and fails them on demand."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: BaseException | None = None

    def convert(self, gguf: Path, folder: Path, progress: Any) -> None:
        self.count += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builds:
    pretended = Builds()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(PackagedFile, "fetch", lambda file, work, progress: work / "gguf")
    monkeypatch.setattr(models, "_convert", pretended.convert)
    monkeypatch.setattr(models, "_BYTES_NEEDED", 0)
    return pretended


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "grace-opt" / "models").iterdir())


def test_converted_once_and_marked(builds: Builds, tmp_path: Path) -> None:
    folder = models.smollm2_folder()
    assert models.smollm2_folder() == folder
    assert builds.count == 1
    assert left_in(tmp_path) == [folder.name]
    marker = json.loads((folder / models._MARKER).read_text())
    assert marker["gguf_sha256"] == models._GGUF.sha256
    assert marker["files"] == {"config.json": 2, "model.safetensors": 100}


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_marker(folder: Path) -> None:
    (folder / models._MARKER).unlink()


def spoil_marker(folder: Path) -> None:
    (folder / models._MARKER).write_text("[]")


def age_marker(folder: Path) -> None:
    marker = json.loads((folder / models._MARKER).read_text())
    (folder / models._MARKER).write_text(json.dumps(marker | {"converter": 0}))


@pytest.mark.parametrize("damage", [truncate, remove_weights, remove_marker, spoil_marker, age_marker])
def test_damaged_cache_is_made_again(builds: Builds, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = models.smollm2_folder()
    damage(folder)
    assert models.smollm2_folder() == folder
    assert builds.count == 2
    assert (folder / "model.safetensors").stat().st_size == 100
    assert left_in(tmp_path) == [folder.name]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("boom")])
def test_nothing_half_made_stays(builds: Builds, tmp_path: Path, failure: BaseException) -> None:
    builds.failure = failure
    with pytest.raises(type(failure)):
        models.smollm2_folder()
    assert left_in(tmp_path) == []


def test_full_disk_is_one_sentence(builds: Builds, tmp_path: Path) -> None:
    builds.failure = OSError(28, "No space left on device")
    with pytest.raises(InputError, match=r"No space left on device; free some space or set XDG_CACHE_HOME"):
        models.smollm2_folder()
    assert left_in(tmp_path) == []


def test_too_little_space_is_said_before_the_download(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_BYTES_NEEDED", 10**18)
    with pytest.raises(InputError, match="MB are free"):
        models.smollm2_folder()
    assert builds.count == 0


def test_unwritable_cache_is_one_sentence(builds: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write smollm2-135m to"):
        models.smollm2_folder()


def test_the_faster_process_wins(builds: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slower = models._convert

    def overtaken(gguf: Path, folder: Path, progress: Any) -> None:
        monkeypatch.setattr(models, "_convert", slower)
        (models.smollm2_folder() / "theirs").touch()  # another process, from start to end
        slower(gguf, folder, progress)

    monkeypatch.setattr(models, "_convert", overtaken)
    folder = models.smollm2_folder()
    assert builds.count == 2
    assert (folder / "theirs").exists()
    assert left_in(tmp_path) == [folder.name]


# The real model


@pytest.mark.model
def test_smollm2_has_its_geometry_and_knows_paris() -> None:
    import torch

    model: Any
    model, tokenizer = models.load_model("smollm2-135m")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (64, 49152, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.model
def test_smollm2_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_folder())
    text = "def f(x):\n\n    return x ** 12  # naïve, 日本 , isn't it ?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.tokenize("\n\n 12") == ["ĊĊĠ", "1", "2"]  # digits stand alone, as they did in training
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
