"""lm-eval itself runs the model class, on tasks without a network. Run by .ci/lm-eval."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import grace_opt.runtime
from grace_opt import InputError, save_mask
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.harness.model import GraceOptLM
from grace_opt.evaluate.trial import Trial
from tests.support.exports import tiny
from tests.support.generation import random_mask

TASKS = Path(__file__).parent / "tasks"
SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}
SCORED = ["tiny_choices", "tiny_continuation", "tiny_generation"]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = tiny("Llama")
    tokenizer.model_max_length = 256
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    for part in loaded:
        part.save_pretrained(path)
    return path


def ours(loaded: tuple[Any, Any], share: float = 0.5, **more: Any) -> GraceOptLM:
    return GraceOptLM(pretrained=loaded[0], tokenizer=loaded[1], budget_share=share, **SMALL, **more)


def theirs(loaded: tuple[Any, Any], **more: Any) -> HFLM:
    return HFLM(pretrained=loaded[0], tokenizer=loaded[1], **more)


def evaluated(lm: Any, tasks: list[str] = SCORED) -> Any:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)


def answers(results: Any) -> dict[str, list[Any]]:
    """What the model said to each request, and the scores."""
    said = {
        task: [(each["doc_id"], each["arguments"], each["resps"]) for each in samples]
        for task, samples in results["samples"].items()
    }
    return said | {f"{task} scores": [dict(scores)] for task, scores in results["results"].items()}


def requests(pairs: list[tuple[str, Any]], kind: Any = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, i, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]


def words(count: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(4, 99), k=count))


def plan_of(loaded: tuple[Any, Any], ids: list[int], name: str, share: float) -> Any:
    trial = Trial(name, method(name, SMALL), Budget(share=share))
    return trial.plan(capture(loaded[0], ids, len(ids) - 1, trial.queries))


def by_hand(loaded: tuple[Any, Any], context: str, continuation: str, name: str, share: float) -> tuple[float, bool]:
    """Capture, apply, and the runtime's cache of that plan, one token after the other."""
    model, tokenizer = loaded
    ids, following = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    total, greedy = 0.0, True
    with torch.inference_mode(), grace_opt.runtime.cache(plan_of(loaded, ids, name, share), model) as past:
        model(torch.tensor([ids[:-1]]), past_key_values=past)
        for fed, said in zip([ids[-1], *following], following, strict=False):
            logs = model(torch.tensor([[fed]]), past_key_values=past).logits[0, -1].log_softmax(-1)
            total += float(logs[said])
            greedy &= int(logs.argmax()) == said
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_the_whole_share_all_numbers_are_those_of_hf(loaded: tuple[Any, Any], batch_size: int) -> None:
    tasks = [*SCORED, "tiny_rolling"]
    found = evaluated(ours(loaded, 1, batch_size=batch_size), tasks)
    plain = evaluated(theirs(loaded, batch_size=batch_size), tasks)
    assert answers(found) == answers(plain)
    record = found["config"]["grace_opt"]
    assert (record["contexts"], record["held_share"], record["tasks"]) == (0, None, {})


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_the_runtime(loaded: tuple[Any, Any], batch_size: int) -> None:
    """In the order of the requests, whatever the order of the work; short contexts as in hf."""
    long, short = [words(count, count) for count in (60, 90, 75)], [words(count, count) for count in (4, 12)]
    pairs = [(context, " " + words(count, 7)) for context in (*long, *short) for count in (1, 3, 9)]
    random.Random(0).shuffle(pairs)
    lm = ours(loaded, batch_size=batch_size)
    found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    plain = theirs(loaded, batch_size=batch_size).loglikelihood(requests(pairs), disable_tqdm=True)
    for pair, answer, dense in zip(pairs, found, plain, strict=True):
        if pair[0] in short:
            assert answer == pytest.approx(dense, abs=1e-4)
            continue
        expected = by_hand(loaded, *pair, "grace-opt", 0.5)
        assert answer[0] == pytest.approx(expected[0], abs=1e-4)
        assert answer[1] == expected[1]
        assert answer[0] != pytest.approx(dense[0], abs=1e-4)
    counted = lm.get_model_info()["grace_opt"]["tasks"]["task"]
    assert (counted["contexts"], counted["compressed"]) == (5, 3)
    assert 0.4 < counted["held_share_of_compressed"] <= 0.5


def test_every_answer_is_given_to_the_cache_of_answers(loaded: tuple[Any, Any]) -> None:
    class Hook:
        dbdict = None

        def __init__(self) -> None:
            self.heard: list[Any] = []

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            self.heard.append((kind, request, answer))

    lm, hook = ours(loaded), Hook()
    lm.set_cache_hook(hook)
    pairs = [(words(count, count), " " + words(2, 3)) for count in (60, 4)]
    found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    assert hook.heard == [("loglikelihood", pair, answer) for pair, answer in zip(pairs, found, strict=True)]
    settings = {"until": ["w7"], "max_gen_toks": 4}
    texts = lm.generate_until(requests([(pairs[0][0], settings)], "generate_until"), disable_tqdm=True)
    assert hook.heard[-1] == ("generate_until", (pairs[0][0], settings), texts[0])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["grace-opt", "streaming", "int8"])
def test_generation_is_the_runtimes(loaded: tuple[Any, Any], name: str, batch_size: int) -> None:
    model, tokenizer = loaded
    contexts = [words(count, count) for count in (60, 75, 90)]
    lm = ours(loaded, 0.7, method=name, batch_size=batch_size)
    whole: list[list[str]] = []
    for context in contexts:
        ids = tokenizer(context)["input_ids"]
        made: list[int] = []
        with torch.inference_mode(), grace_opt.runtime.cache(plan_of(loaded, ids, name, 0.7), model) as past:
            model(torch.tensor([ids[:-1]]), past_key_values=past)
            fed = ids[-1]
            while len(made) < 12 and tokenizer.eos_token_id not in made:
                fed = int(model(torch.tensor([[fed]]), past_key_values=past).logits[0, -1].argmax())
                made.append(fed)
        whole.append(tokenizer.decode(made, skip_special_tokens=True).split())
    longest = max(whole, key=len)
    assert len(longest) > 4
    stop = longest[4]
    asked = requests([(context, {"until": [stop], "max_gen_toks": 12}) for context in contexts], "generate_until")
    found = lm.generate_until(asked, disable_tqdm=True)
    for text, expected in zip(found, whole, strict=True):
        assert text.split() == (expected[: expected.index(stop)] if stop in expected else expected)
    plain = theirs(loaded).generate_until(asked, disable_tqdm=True)
    assert name == "int8" or found != plain
    assert lm.get_model_info()["grace_opt"]["compressed"] == 3


def test_a_whole_evaluation_and_what_it_records(loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lm_eval")
    results = evaluated(ours(loaded))
    record = results["config"]["grace_opt"]
    assert (record["method"], record["budget_share"]) == ("grace-opt", 0.5)
    assert record["options"]["recent_window"] == 8
    for task in SCORED:  # contexts of 60, 4, 90, 60, 20 and 75 tokens
        counts = record["tasks"][task]
        assert (counts["contexts"], counts["compressed"]) == (6, 4)
        assert counts["held_share_of_compressed"] <= 0.5 < counts["held_share"] < 1
        assert caplog.text.count(f"{task}: 4 of 6 contexts were compressed, to 0.4") == 1
    assert caplog.text.count("20 tokens is held whole: grace-opt: the method holds at least") == 1
    assert "`pretrained`" not in caplog.text
    json.dumps(record)


def test_a_masks_folder(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    mask = random_mask(model, 8, recent_window=8, sinks=2, readout="static", values=8)
    save_mask(mask, tmp_path / "mask")
    lm = GraceOptLM(pretrained=model, tokenizer=tokenizer, mask=str(tmp_path / "mask"))
    context, continuation = words(60, 1), " " + words(3, 2)
    ((found, _),) = lm.loglikelihood(requests([(context, continuation)]), disable_tqdm=True)
    ids, following = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    with torch.inference_mode(), grace_opt.runtime.cache(tmp_path / "mask", model) as past:
        model(torch.tensor([ids[:-1]]), past_key_values=past)
        expected = 0.0
        for fed, said in zip([ids[-1], *following], following, strict=False):
            logs = model(torch.tensor([[fed]]), past_key_values=past).logits[0, -1].log_softmax(-1)
            expected += float(logs[said])
    assert found == pytest.approx(expected, abs=1e-4)


def test_too_long_contexts_lose_their_first_tokens_as_in_hf(loaded: tuple[Any, Any]) -> None:
    context, continuation = words(80, 1), " " + words(4, 2)
    cut = " ".join(context.split()[-57:])  # 60 tokens go through the model, and the last is not fed
    (short,) = ours(loaded).loglikelihood(requests([(cut, continuation)]), disable_tqdm=True)
    (found,) = ours(loaded, max_length=60).loglikelihood(requests([(context, continuation)]), disable_tqdm=True)
    assert found == pytest.approx(short, abs=1e-6)


def test_what_a_compressed_cache_has_no_answer_to(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="tiny_rolling: this task scores texts from their first token on"):
        evaluated(ours(loaded), ["tiny_rolling"])
    asked = requests([(words(60, 1), {"until": [], "num_beams": 2, "max_gen_toks": 4})], "generate_until")
    with pytest.raises(InputError, match="leave num_beams out"):
        ours(loaded).generate_until(asked, disable_tqdm=True)


def test_answers_of_another_budget_are_not_taken(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """lm-eval's database of answers knows only the texts."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)

    def run(lm: Any) -> Any:
        more: Any = {"use_cache": str(tmp_path / "answers"), "bootstrap_iters": 0}
        return simple_evaluate(model=lm, tasks=["tiny_choices"], task_manager=manager, **more)

    first, again = run(ours(loaded)), run(ours(loaded))
    assert answers(first) == answers(again)
    assert again["config"]["grace_opt"]["contexts"] == 0  # all were known
    with pytest.raises(InputError, match="of another model, method or budget"):
        run(ours(loaded, 0.6))


def test_it_is_found_by_its_name(loaded: tuple[Any, Any]) -> None:
    (entry,) = entry_points(group="lm_eval.models", name="grace_opt")
    later: Registry[Any] = Registry("model", base_cls=LM)  # as releases after 0.4.13 fill it
    later.register("grace_opt", target=entry)
    assert later.get("grace_opt") is GraceOptLM
    given = {"pretrained": loaded[0], "tokenizer": loaded[1], "budget_share": 1}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        model="grace_opt", model_args=given, tasks=["tiny_choices"], task_manager=manager, bootstrap_iters=0
    )
    assert results["config"]["model"] == "grace_opt"


def command(*arguments: str, module: str = "grace_opt.evaluate.harness") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def saved(folder: Path) -> Any:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    """With the whole share, what ``--model hf`` writes; with less, how much was held."""
    common = ["--include_path", str(TASKS), "--tasks", "tiny_choices,tiny_generation", "--device", "cpu"]
    runs = {
        "hf": ("lm_eval", "hf", f"pretrained={folder}"),
        "whole": ("grace_opt.evaluate.harness", "grace_opt", f"pretrained={folder},method=grace-opt,budget_share=1"),
        "half": ("grace_opt.evaluate.harness", "grace_opt", f"pretrained={folder},budget_share=0.5,recent_window=8"),
    }
    found = {}
    for name, (module, model, given) in runs.items():
        out = str(tmp_path / name)
        done = command("--model", model, "--model_args", given, *common, "--output_path", out, module=module)
        assert done.returncode == 0, done.stderr
        found[name] = saved(tmp_path / name)
    assert found["whole"]["results"] == found["hf"]["results"]
    assert found["half"]["config"]["grace_opt"]["compressed"] > 0


def test_the_command_line_says_in_a_sentence_what_is_wrong(folder: Path) -> None:
    given = f"pretrained={folder},method=grace-op,budget_share=0.5"
    done = command(
        "--model", "grace_opt", "--model_args", given, "--include_path", str(TASKS), "--tasks", "tiny_choices"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown method 'grace-op'; did you mean 'grace-opt'?")
    assert "Traceback" not in done.stderr


def test_models_that_cannot_be(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for given, sentence in (
        ({"pretrained": "no/such/folder/here"}, "no such model folder: 'no/such/folder/here'"),
        ({"pretrained": 123, "device": "nonsense"}, "unknown device 'nonsense'"),
        ({"pretrained": loaded[0]}, "a model that is loaded goes with its tokenizer"),
        ({"pretrained": "m", "tokenizer": "n"}, "the tokenizer is the model's own"),
    ):
        with pytest.raises(InputError, match=sentence):
            GraceOptLM(**given, budget_share=0.5)
    with pytest.raises(InputError, match="a continuation has no tokens"):
        ours(loaded).loglikelihood(requests([(words(60, 1), "")]), disable_tqdm=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        ours(loaded)


@pytest.mark.model
def test_the_real_model(smollm2: tuple[Any, Any]) -> None:
    from pydoc_data.topics import topics

    model, tokenizer = smollm2
    text = " ".join(topics[each] for each in sorted(topics)[:20])
    context = text[:1500]
    pairs = [(context, text[1500:1540]), (context, " something else entirely"), ("Too short to compress:", " yes")]
    given: Any = {"pretrained": model, "tokenizer": tokenizer}
    whole = GraceOptLM(**given, budget_share=1).loglikelihood(requests(pairs), disable_tqdm=True)
    assert whole == HFLM(**given).loglikelihood(requests(pairs), disable_tqdm=True)
    lm = GraceOptLM(**given, method="grace-opt", budget_share=0.5)
    found = lm.loglikelihood(requests(pairs), disable_tqdm=True)
    assert found[2] == whole[2]
    trial = Trial("grace-opt", method("grace-opt"), Budget(share=0.5))
    for (said, continuation), answer in zip(pairs[:2], found[:2], strict=True):
        ids = tokenizer(said)["input_ids"]
        following = tokenizer(said + continuation)["input_ids"][len(ids) :]
        plan = trial.plan(capture(model, ids, len(ids) - 1, trial.queries))
        with torch.inference_mode(), grace_opt.runtime.cache(plan, model) as past:
            model(torch.tensor([ids[:-1]]), past_key_values=past)
            logits = [
                model(torch.tensor([[fed]]), past_key_values=past).logits[0, -1] for fed in [ids[-1], *following[:-1]]
            ]
        logs = torch.stack(logits).log_softmax(-1)
        expected = float(logs.gather(1, torch.tensor(following)[:, None]).sum())
        assert answer[0] == pytest.approx(expected, abs=1e-3)
    assert lm.get_model_info()["grace_opt"]["held_share_of_compressed"] <= 0.5
