"""Every target that needs no other runtime passes the kit; refusals are sentences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_opt import InputError, KVMask
from grace_opt.compression.plan import CachePlan
from grace_opt.evaluate.documents import Document
from grace_opt.export.run import export
from grace_opt.testing.exports import check_refusal, check_target
from tests.support.exports import SHORT, TEXTS, WORDS, tiny, tiny_mask

LONG = [Document("words", f"{WORDS} {WORDS}", cut=True)]


def packed(mask: KVMask) -> KVMask:
    return replace(mask, plan=mask.plan.changed(bits={"key": 4, "value": 4}))


@pytest.mark.parametrize(
    "variant",
    [{}, {"ragged": True}, {"readout": "prefill"}, {"generated": "keep"}, {"values": None}, {"recent_window": 0}],
    ids=str,
)
def test_hf_generate_conforms(variant: dict[str, Any]) -> None:
    model, tokenizer = tiny()
    check_target("hf-generate", tiny_mask(model, **variant), model, tokenizer, TEXTS, length=60)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_hf_generate_conforms_in_other_families(family: str) -> None:
    model, tokenizer = tiny(family)
    check_target("hf-generate", packed(tiny_mask(model)), model, tokenizer, TEXTS, length=90)


@pytest.mark.parametrize("target", ["hf-generate", "hf-code", "kv-store"])
def test_heads_of_128_channels_with_biases_and_with_normed_keys(target: str) -> None:
    for family in ("Qwen2", "Qwen3"):
        model, tokenizer = tiny(family, head_dim=128)
        check_target(target, packed(tiny_mask(model, kept=48, values=40)), model, tokenizer, TEXTS, length=90)


def test_a_mask_that_prunes_the_prompt_is_refused() -> None:
    model, _ = tiny()
    sentence = check_refusal("hf-generate", replace(tiny_mask(model), prefill="pruned"), model.config)
    assert sentence == (
        "the target hf-generate runs prompts whole, and this mask asks for pruned prefill; solve for full prefill"
    )


def test_generate_goes_on_with_what_it_returned_and_with_nothing_else(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    export(tiny_mask(model), model, tokenizer, "hf-generate", tmp_path / "one", **SHORT)
    export(tiny_mask(model, seed=5), model, tokenizer, "hf-generate", tmp_path / "two" / "one", **SHORT)
    ids = torch.randint(4, 99, (2, 40), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"trust_remote_code": True, "do_sample": False, "return_dict_in_generate": True}

    def decode(ids: torch.Tensor, folder: Path, **more: Any) -> Any:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=str(folder), eos_token_id=None, **options, **more
        )

    whole = decode(ids, tmp_path / "one", max_new_tokens=12)
    first = decode(ids, tmp_path / "one", max_new_tokens=6)
    rest = decode(first.sequences, tmp_path / "one", max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(rest.sequences, whole.sequences)
    other = decode(ids, tmp_path / "two" / "one", max_new_tokens=12)  # a folder of one name, with another mask
    held = [each.past_key_values.plan.widths("key") for each in (whole, other)]
    assert held[0] == held[1]
    kept = [[c.keep.tolist() for c in each.past_key_values.plan.layers[0].codecs["key"]] for each in (whole, other)]
    assert kept[0] != kept[1]
    with pytest.raises(ValueError, match="is no compressed cache; leave it out"):
        decode(ids, tmp_path / "one", max_new_tokens=6, past_key_values=model(ids).past_key_values)
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "| KL to the uncompressed model, nats a token | " in card
    assert "custom_generate" in card


def test_the_kit_finds_what_is_wrong() -> None:
    model, tokenizer = tiny()
    with pytest.raises(AssertionError, match="is not registered"):
        check_target("nothing", tiny_mask(model), model, tokenizer, TEXTS)
    with pytest.raises(AssertionError, match="takes this mask"):
        check_refusal("hf-generate", tiny_mask(model), model.config)
    with pytest.raises(AssertionError, match="the kit needs a mask that the target runs"):
        check_target("hf-generate", replace(tiny_mask(model), prefill="pruned"), model, tokenizer, TEXTS)
    with pytest.raises(InputError, match="unknown target"):
        export(KVMask("m", 2, 16, CachePlan({})), model, tokenizer, "hf_generate", "nowhere")


@pytest.mark.parametrize(
    "variant",
    [{}, {"ragged": True}, {"readout": "prefill"}, {"readout": "prefill", "ragged": True}, {"values": None}],
    ids=str,
)
def test_kv_store_conforms(variant: dict[str, Any]) -> None:
    model, tokenizer = tiny()
    for mask in (tiny_mask(model, **variant), packed(tiny_mask(model, **variant))):
        check_target("kv-store", mask, model, tokenizer, TEXTS, length=100)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_kv_store_conforms_in_other_families(family: str) -> None:
    model, tokenizer = tiny(family)
    check_target("kv-store", packed(tiny_mask(model)), model, tokenizer, TEXTS, length=90)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_hf_code_conforms(family: str) -> None:
    model, tokenizer = tiny(family)
    check_target("hf-code", packed(tiny_mask(model, ragged=True)), model, tokenizer, TEXTS, length=90)


def test_a_checkpoint_of_ours_is_a_plain_one_without_its_code(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import grace_opt.runtime

    model, tokenizer = tiny()
    export(tiny_mask(model), model, tokenizer, "hf-code", tmp_path / "out", **SHORT, name="tiny")
    ids = torch.randint(4, 99, (1, 40), generator=torch.Generator().manual_seed(3))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain) is type(model)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w6").input_ids == tokenizer("w5 w6").input_ids
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    run = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert isinstance(run.past_key_values, grace_opt.runtime.PrunedCache)
    for more in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": plain(ids[:, :1]).past_key_values},
    ):
        other = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        assert not isinstance(other.past_key_values, grace_opt.runtime.PrunedCache)
    own = type("Own", (type(model),), {})(model.config)
    with pytest.raises(InputError, match=r"\(Own\) is none of transformers' own, .* use the target hf-generate"):
        export(tiny_mask(model), own, tokenizer, "hf-code", tmp_path / "own", **SHORT)
    assert not (tmp_path / "own").exists()


STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("readout", ["none", "static"])
def test_hf_conforms(family: str, readout: str) -> None:
    model, tokenizer = tiny(family, **({"sliding_window": None} if family == "Mistral" else {}))
    check_target("hf", tiny_mask(model, **STOCK, readout=readout), model, tokenizer, TEXTS, length=60)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kept": 8}, "cannot prune keys, only values"),
        ({"recent_window": 4}, "keeps no token whole, and this mask has a window or sinks"),
        ({"sinks": 4}, "keeps no token whole, and this mask has a window or sinks"),
        ({"ragged": True}, "has one width for all heads, and this mask has several"),
        ({"readout": "prefill"}, "cannot fit read-outs to each prompt; solve with --readout none or static"),
        ({"values": None, "kept": 8}, "cannot prune keys, only values"),
    ],
    ids=str,
)
def test_what_a_stock_model_cannot_run_is_refused(change: dict[str, Any], reason: str) -> None:
    model, _ = tiny()
    assert reason in check_refusal("hf", tiny_mask(model, **{**STOCK, **change}), model.config)


def test_other_models_and_integers_are_not_folded() -> None:
    model, _ = tiny("Qwen3")
    sentence = check_refusal("hf", tiny_mask(model, **STOCK), model.config)
    assert "runs models of llama, mistral, qwen2, and this is a qwen3; use the target hf-generate" in sentence
    model, _ = tiny("Mistral", sliding_window=8)
    windows = tiny_mask(tiny("Mistral", sliding_window=None)[0], **STOCK)
    assert "cannot run sliding-window layers" in check_refusal("hf", windows, model.config)
    model, _ = tiny()
    mask = tiny_mask(model, **STOCK)
    bits = replace(mask, plan=mask.plan.changed(bits={"value": 4}))
    assert "cannot hold rows as integers" in check_refusal("hf", bits, model.config)


def test_a_fold_that_loses_too_much_is_not_written(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    with pytest.raises(InputError, match="nats a token as hf runs it .* solve with a larger budget or a wider window"):
        export(tiny_mask(model, **STOCK), model, tokenizer, "hf", tmp_path / "out", **{**SHORT, "kl_limit": 0.001})
    assert not (tmp_path / "out").exists()
