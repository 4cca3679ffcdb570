"""The command line as a user meets it: a process, its output, its exit code, its files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from grace_opt import KVMask, load_bundle, load_mask, registry
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import problems_of
from grace_opt.compression.method import METHODS, Windows
from tests.support import DATA
from tests.support.command import inside
from tests.support.families import tiny_model
from tests.support.patience import PATIENCE, until


def cli(
    *arguments: Any, cwd: Path | None = None, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grace_opt", *map(str, arguments)],
        check=False,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def records(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["records"]
    return found


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error: exit code 2, nothing on stdout, no traceback."""
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("\r")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def whole_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that a mask can be made of."""
    source = DATA / "heads-smollm2-135m.safetensors"
    return Path(shutil.copy(source, tmp_path_factory.mktemp("bundle") / "graphs.safetensors"))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a word-level tokenizer, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("Llama").save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 99)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


WORDS = " ".join(f"w{4 + i * 7 % 95}" for i in range(400))


UNIFORM = ("--budget", "uniform", "--protect")


def test_solve_writes_a_mask_and_prints_records(whole_heads: Path, tmp_path: Path) -> None:
    found = records(
        cli("solve", whole_heads, "--ratio", 0.6, "--solver", "greedy", *UNIFORM, "-o", "m", "-f", "json", cwd=tmp_path)
    )
    heads = {head.name: head for head in load_bundle(whole_heads).heads}
    assert [record["problem"] for record in found] == list(heads)
    for record in found:
        x = np.zeros(record["n"])
        x[record["pruned"]] = 1
        assert record["prune"] == x.sum() == 38
        assert record["objective"] == pytest.approx(x @ heads[record["problem"]].weights @ x, rel=1e-9)
    mask = load_mask(tmp_path / "m")
    assert mask.solver["name"] == "greedy"
    lines = (tmp_path / "m" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
    provenance = json.loads((tmp_path / "m" / "run.json").read_text())
    assert provenance["command"][:2] == ["grace-opt", "solve"]
    assert provenance["options"]["ratio"] == {"value": 0.6, "source": "flag"}
    assert provenance["seed"] == 0
    base = ("solve", whole_heads, "--ratio", 0.6, *UNIFORM, "-o", tmp_path / "m", "-f", "json")
    again = records(cli(*base, "--solver", "greedy", PYTHONHASHSEED="7"))
    assert [r["pruned"] for r in again] == [r["pruned"] for r in found]
    best = records(inside(*base, "--workers", 2, "--engine", "local"))  # auto, in threads
    assert {(r["solver"], r["status"], r["bound_kind"]) for r in best} == {("auto", "optimal", "proven")}
    # What is called optimal may lie above the optimum by the gap tolerance.
    assert all(b["objective"] <= f["objective"] * (1 + 1e-6) for b, f in zip(best, found, strict=True))
    assert best[0]["raw_status"] == "chose branch-and-bound: 64 nodes to decide"


def test_tables_and_lists(whole_heads: Path, tmp_path: Path) -> None:
    table = inside("solve", whole_heads, "--ratio", 0.5, "--budget", "uniform", "-o", tmp_path / "m")
    assert "layers.28" in table.stdout
    assert "32 of 64" in table.stdout
    assert "mask written to" in table.stderr
    assert inside("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "m", "-q").stderr == ""
    verbose = inside("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "m", "-v")
    assert "layers.28.kv_heads.2.key" in verbose.stdout
    assert "ratio = 0.5 (flag)" in verbose.stderr
    listed = records(inside("solvers", "-f", "json"))
    assert [record["solver"] for record in listed] == [info.name for info in registry.solvers()]
    assert "MIES" in inside("solvers").stdout
    for command in ("calibrate", "solve", "compare", "generate", "solvers", "demo"):
        assert inside(command, "--help").returncode == 0


def test_where_options_come_from(whole_heads: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[method]\nratio = 0.25\nbudget = "uniform"\nprotect = false\n[solver]\nsolver = "independent"\nseed = 3\n'
    )
    base = ("solve", whole_heads, "-o", tmp_path / "m", "-f", "json")
    in_file = records(inside(*base, "--config", config))[0]
    assert (in_file["prune"], in_file["solver"], in_file["seed"]) == (16, "independent", 3)
    in_environment = records(inside(*base, "--config", config, GRACE_OPT_RATIO="0.5"))[0]
    assert (in_environment["prune"], in_environment["solver"]) == (32, "independent")
    by_flag = records(inside(*base, "--config", config, "--ratio", 0.75, "--solver", "greedy", GRACE_OPT_RATIO="0.5"))[
        0
    ]
    assert (by_flag["prune"], by_flag["solver"], by_flag["seed"]) == (48, "greedy", 3)
    said = inside(*base, "-v", GRACE_OPT_CONFIG=str(config), GRACE_OPT_SEED="5").stderr
    for line in ("ratio = 0.25 (config file)", "seed = 5 (environment)", "threads = 1 (default)"):
        assert line in said
    config.write_text("[solver]\nsovler = 'greedy'\n")
    assert "solver.sovler; did you mean 'solver'" in sentence(inside(*base, "--config", config))
    config.write_text("[sol]\nx = 1\n")
    assert "no table [sol]" in sentence(inside(*base, "--config", config))
    config.write_text("[solver\n")
    assert "not TOML" in sentence(inside(*base, "--config", config))


def windows(mask: KVMask) -> Windows:
    """Of a mask's first layer."""
    return next(iter(mask.plan.layers.values())).windows


def test_methods_and_their_options(whole_heads: Path, tmp_path: Path) -> None:
    listed = {record.pop("method"): record for record in records(inside("methods", "-f", "json"))}
    assert set(listed) == set(METHODS)
    for name, parts in listed.items():
        assert parts == json.loads(json.dumps(asdict(METHODS[name])))
    table = inside("methods").stdout
    assert all(name in table for name in METHODS)

    base = ("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "m", "-f", "json")
    bundle, budget = load_bundle(whole_heads), Budget(0.5, 0.5)
    for name in ("think", "grace", "grace-opt"):
        found = records(inside(*base, "--method", name))
        asked = problems_of(bundle, METHODS[name], budget)
        assert [r["digest"] for r in found] == [p.digest() for p in asked]  # of weights, count, protected channels
        assert {r["solver"] for r in found} == {METHODS[name].selection.offline_solver}
        mask = load_mask(tmp_path / "m")
        assert mask.solver["method"] == json.loads(json.dumps(METHODS[name].options()))
    assert records(inside(*base)) != []
    assert load_mask(tmp_path / "m").solver["method"] == METHODS["grace-opt"].options()

    more = ("--floor", 8, "--align", 4, "--protect", "--solver", "greedy", "--recent-window", 7, "--sinks", 0)
    found = records(inside(*base, *more, "--method-option", "ridge=0.01", "--method-option", "generated=prune"))
    assert all(r["n"] - r["prune"] >= 8 and r["prune"] % 4 == 0 and r["solver"] == "greedy" for r in found)
    mask = load_mask(tmp_path / "m")
    assert (windows(mask).recent_window, windows(mask).sinks, mask.align) == (7, 0, 4)
    assert windows(mask).generated == "prune"
    options = mask.solver["method"]
    assert (options["floor"], options["ridge"], options["generated"]) == (8, 0.01, "prune")
    records(inside(*base, "--solver", "greedy", "--method-option", "recent_window=9"))
    assert windows(load_mask(tmp_path / "m")) == Windows(int(bundle.metadata["sinks"]), 9, "keep")
    both = ("--method-option", "grace-opt.budget=uniform", "--no-protect", "--solver", "greedy")
    assert {r["prune"] for r in records(inside(*base, *both))} == {32}


def test_options_that_cannot_be_meant_are_refused_before_any_work(whole_heads: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"  # it is not even read
    for message, arguments in {
        "unknown method 'grase'; did you mean 'grace'?": ("--method", "grase"),
        "has no option 'flor'; did you mean 'floor'?": ("--method-option", "flor=3"),
        "--method-option takes NAME=VALUE": ("--method-option", "floor"),
        "sinks must be from 0": ("--sinks", -1),
        "recent_window must be from 0": ("--recent-window", 2**31),
        "recent_window must be from 0 ": ("--recent-window", -3),
        "align must be at least 1": ("--align", 0),
        "floor, value_weight and token_weight not negative": ("--floor", -1),
        "floor has no effect in a uniform budget": ("--floor", 3, "--budget", "uniform"),
        "floor has no effect in a uniform budget;": ("--floor", 3, "--method", "grace"),
        "rounding has no effect in a shared budget": ("--method-option", "rounding=ceil"),
        "value_weight has no effect on ratios": ("--method-option", "value_weight=2"),
        "sinks and an option of its own say the same": ("--method-option", "sinks=3", "--sinks", 3),
        "solver is for prompts, and has no effect on a bundle; give --solver": ("--method-option", "solver=greedy"),
        "objective is for prompts": ("--method-option", "objective=logit"),
        "'grace' has no read-out": ("--method", "grace", "--readout", "static"),
        "the budget must be uniform or shared, got 'equal'": ("--method-option", "budget=equal"),
        "give either --ratio or --budget-bytes": ("--budget-bytes", 100),
        "unknown solver 'gredy'": ("--solver", "gredy"),
        "value ratio must be at least 0 and below 1, got 1.5": ("--value-ratio", 1.5),
    }.items():
        found = sentence(inside("solve", absent, "--ratio", 0.5, "-o", tmp_path / "m", *arguments))
        assert message.strip() in found, found
    base = ("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "m")
    assert "selects no channels" in sentence(inside(*base, "--method", "svd"))
    assert "has no graphs of values" in sentence(inside(*base, "--value-ratio", 0.3))
    assert not (tmp_path / "m").exists() or not list((tmp_path / "m").iterdir())


def test_solver_options(whole_heads: Path, tmp_path: Path) -> None:
    base = ("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "m", "--solver", "greedy", "-f", "json")
    assert records(inside(*base, "--solver-option", "greedy.direction=forward"))[0]["options"] == {
        "direction": "forward"
    }
    assert records(inside(*base, "--solver-option", "direction=backward"))[0]["options"] == {"direction": "backward"}
    assert "did you mean 'direction'" in sentence(inside(*base, "--solver-option", "directon=backward"))
    assert "takes NAME=VALUE" in sentence(inside(*base, "--solver-option", "direction"))


def test_bad_input_is_one_sentence_and_exit_code_2(whole_heads: Path, tmp_path: Path) -> None:
    name = "layers.0.kv_heads.0.key"
    metadata = {"format": "grace_opt.graphs", "version": "1"}
    nan = np.eye(4)
    nan[1, 2] = np.nan
    save_file({f"{name}.weights": nan}, tmp_path / "nan.safetensors", metadata=metadata)
    save_file({f"{name}.weights": np.triu(np.ones((4, 4)))}, tmp_path / "skew.safetensors", metadata=metadata)
    save_file(
        {f"{name}.weights": np.eye(4), f"{name}.protected": np.array([1, 1, 1, 0], np.uint8)},
        tmp_path / "kept.safetensors",
        metadata=metadata,
    )
    (tmp_path / "cut.safetensors").write_bytes(whole_heads.read_bytes()[:5000])
    (tmp_path / "file").write_text("in the way")
    cases = {
        "layers.0.kv_heads.0.key: weights hold 1 NaN": (tmp_path / "nan.safetensors", "--ratio", 0.5),
        "weights are not symmetric": (tmp_path / "skew.safetensors", "--ratio", 0.5),
        "cannot prune 2 of 4 channels, 1 are prunable": (tmp_path / "kept.safetensors", "--ratio", 0.5, *UNIFORM),
        "truncated": (tmp_path / "cut.safetensors", "--ratio", 0.5),
        "no such file": (tmp_path / "absent", "--ratio", 0.5),
        "at least 0 and below 1, got 1.0": (whole_heads, "--ratio", 1),
        "at least 0 and below 1, got -0.1": (whole_heads, "--ratio", -0.1),
        "did you mean 'greedy'": (whole_heads, "--ratio", 0.5, "--solver", "greddy"),
        "time_limit must be a finite number": (whole_heads, "--ratio", 0.5, "--time-limit", -1),
        "'half' is not a valid ": (whole_heads, "--ratio", "half"),
        "No such option: --ratoi": (whole_heads, "--ratoi", 0.5),
    }
    for message, arguments in cases.items():
        assert message in sentence(inside("solve", *arguments, "-o", tmp_path / "m"))
    assert not (tmp_path / "m" / "kv_mask.json").exists()
    assert "cannot write" in sentence(inside("solve", whole_heads, "--ratio", 0.5, "-o", tmp_path / "file" / "m"))
    assert "unexpected" not in inside("nonsense").stderr
    assert inside("nonsense").returncode == 2


def test_version_and_help() -> None:
    from grace_opt import __version__

    assert inside("--version").stdout.strip() == __version__
    assert "calibrate" in inside().stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in cli("solve", tmp_path / "absent", "--ratio", 0.5, "-o", tmp_path, "--debug").stderr


def test_the_whole_path_on_a_tiny_folder(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    graphs, mask = tmp_path / "graphs.safetensors", tmp_path / "mask"
    common = ("--tokens", 128, "--window", 64, "-f", "json")
    made = records(inside("calibrate", tiny_folder, "-o", graphs, "--text", tmp_path / "text.txt", *common))[0]
    assert (made["tokens"], made["heads"], made["head_dim"]) == (128, 4, 16)
    piped = tmp_path / "piped.safetensors"
    records(inside("calibrate", tiny_folder, "-o", piped, "--text", "-", *common, stdin=WORDS))
    for mine, theirs in zip(load_bundle(graphs).heads, load_bundle(piped).heads, strict=True):
        np.testing.assert_array_equal(mine.weights, theirs.weights)
    moving = ("--method-option", "generated=prune", *UNIFORM)
    records(inside("solve", graphs, "--ratio", 0.5, *moving, "--readout", "none", "-o", mask, "-f", "json"))
    prompt = ("--prompt", " ".join(WORDS.split()[:100]), "--max-new-tokens", 10, "-f", "json")
    pruned = records(inside("generate", tiny_folder, "--mask", mask, *prompt))[0]
    plain = records(cli("generate", tiny_folder, *prompt))[0]
    assert pruned["new_tokens"] == plain["new_tokens"] == 10
    assert pruned["tokens"] == 109
    assert plain["cache_bytes"] == plain["full_cache_bytes"] == pruned["full_cache_bytes"] == 109 * 2 * 2 * 32 * 4
    assert pruned["cache_bytes"] == pytest.approx((109 * 24 + (36 + 32) * 8) * 2 * 2 * 4, rel=0.02)
    chosen = records(inside("generate", tiny_folder, "--method", "grace-opt", "--ratio", 0.5, *prompt))[0]
    assert chosen["cache_bytes"] > pruned["cache_bytes"] > 0.6 * chosen["cache_bytes"]  # it holds read-outs too
    packed = ("--key-bits", 4, "--value-bits", 4)
    assert records(inside("generate", tiny_folder, "--mask", mask, *packed, *prompt))[0]["cache_bytes"] < (
        0.9 * pruned["cache_bytes"]
    )
    for wrong, said in (
        (("--mask", mask, "--method", "think"), "--mask and --method exclude each other"),
        (packed, "give --mask or --method too"),
        (("--mask", mask, "--key-bits", 5), "packed integers have 2, 3, 4 or 8 bits, got 5"),
        (("--method", "thimk"), "unknown method 'thimk'; did you mean 'think'?"),
    ):
        assert said in sentence(inside("generate", tiny_folder, *wrong, *prompt))
    records(inside("solve", graphs, "--ratio", 0, "-o", mask, "-f", "json"))
    unpruned = records(inside("generate", tiny_folder, "--mask", mask, *prompt))[0]
    assert unpruned["text"] == plain["text"]
    assert inside("generate", tiny_folder, "--max-new-tokens", 3, stdin="w5 w6").returncode == 0

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_model("Llama", intermediate_size=128).save_pretrained(other)
    assert f"made for '{tiny_folder}', not for '{other}'" in sentence(
        inside("generate", other, "--mask", mask, *prompt)
    )
    assert "the prompt is empty" in sentence(inside("generate", tiny_folder, "--prompt", ""))
    assert "do not fit the model's context of 256" in sentence(inside("generate", tiny_folder, "--prompt", WORDS))
    assert "the text has 3 tokens" in sentence(
        inside("calibrate", tiny_folder, "-o", graphs, "--text", "-", stdin="a b c")
    )
    assert "the text is empty" in sentence(inside("calibrate", tiny_folder, "-o", graphs, "--text", "-", stdin=""))
    assert load_bundle(graphs).metadata["tokens"] == "128"  # and the old file is as it was


def test_budgets_readouts_and_values_on_a_tiny_folder(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    graphs, mask = tmp_path / "graphs.safetensors", tmp_path / "mask"
    common = ("--tokens", 192, "--window", 64, "--recent-window", 8, "--text", tmp_path / "text.txt")
    records(inside("calibrate", tiny_folder, "-o", graphs, *common, "--objective", "centered", "-f", "json"))
    assert load_bundle(graphs).metadata["objective"] == "centered"
    solved = ("solve", graphs, "-o", mask, "--solver", "greedy", "-f", "json", "--no-protect")
    prompt = ("--prompt", " ".join(WORDS.split()[:100]), "--max-new-tokens", 10, "-f", "json")
    for readout in ("none", "prefill", "static"):
        found = records(inside(*solved, "--ratio", 0.5, "--budget", "shared", "--floor", 2, "--readout", readout))
        assert sum(record["prune"] for record in found) == 32
        assert load_mask(mask).readout_scope == readout
        records(inside("generate", tiny_folder, "--mask", mask, *prompt))
    found = records(inside(*solved, "--budget-bytes", 2 * 2 * 2 * 24, "--budget", "shared", "--align", 4))
    assert sum(record["prune"] for record in found) == 32
    assert all(record["prune"] % 4 == 0 for record in found)
    records(inside("calibrate", tiny_folder, "-o", graphs, *common, "--value-objective", "output", "-f", "json"))
    assert {head.kind for head in load_bundle(graphs).heads} == {"key", "value"}
    records(inside(*solved, "--ratio", 0.5, "--value-ratio", 0.25))
    measured = ("evaluate", tiny_folder, "--text", tmp_path / "text.txt", "--length", 80, "--scored", 10, "-f", "json")
    record = records(inside(*measured, "--mask", mask))[0]
    assert (record["ratio"], record["value_ratio"]) == (0.5, 0.25)
    rows = "".join(json.dumps({"context": WORDS, "input": "w5 ?", "_id": str(i)}) + "\n" for i in range(2))
    (tmp_path / "narrativeqa.jsonl").write_text(rows)
    local = ("--text", tmp_path, "--dataset", "longbench:narrativeqa", "--length", 80, "--scored", 10, "-f", "json")
    assert records(inside("evaluate", tiny_folder, *local, "--mask", mask))[0]["documents"] == 2
    for message, arguments in {
        "give either --ratio or --budget-bytes": solved,
        "budget must be uniform or shared": (*solved, "--ratio", 0.5, "--budget", "equal"),
        "read-out must be one of none, prefill, static": (*solved, "--ratio", 0.5, "--readout", "all"),
        "below the floors": (*solved, "--budget-bytes", 10, "--budget", "shared"),
        "change align": (*solved, "--ratio", 0.5, "--budget", "shared", "--align", 3),
        "must be positive": (*solved, "--budget-bytes", 0),
        "did you mean 'attention'": ("calibrate", tiny_folder, "-o", graphs, *common, "--objective", "atention"),
        "a method needs a budget": (*measured, "--method", "think"),
        "there is nothing to evaluate": measured,
        "did you mean 'grace'": (*measured, "--method", "garce", "--ratio", 0.5),
        "unknown dataset 'squad'": (*measured, "--dataset", "squad:test", "--mask", mask),
        "context of 256": (*measured, "--method", "think", "--ratio", 0.5, "--length", 300),
        "no prunable key": (*measured, "--method", "think", "--ratio", 0.5, "--length", 20),
        "did you mean 'ruler/vt'": (*measured, "--mask", mask, "--task", "ruler/vtt"),
    }.items():
        assert message in sentence(inside(*arguments))


def test_the_demo_on_a_tiny_folder(tiny_folder: Path, tmp_path: Path) -> None:
    sizes = ("--context", 200, "--max-new-tokens", 5)
    found = records(inside("demo", tiny_folder, "-o", tmp_path / "demo", *sizes, "-f", "json"))
    assert [record["cache"] for record in found] == ["full", "think", "grace", "grace-opt"]
    assert [record["kept_channels"] for record in found] == [16, 8, 8, 8]
    full, *pruned = found
    assert all(record["cache_bytes"] < full["cache_bytes"] for record in pruned)
    assert full["kl"] == 0
    assert full["agree"] == 5
    assert (tmp_path / "demo" / "kept-channels.png").stat().st_size > 1000


def unread(pipe: Any) -> int:
    """Bytes in a pipe that nobody has read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_ctrl_c_leaves_130_and_no_file(tiny_folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "grace_opt", "calibrate", str(tiny_folder), "-o", "g.safetensors", "--text", "-"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("w5 ")
    process.stdin.flush()
    until(lambda: not unread(process.stdin), "it reads the text")  # and waits for more, which does not come
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_it_works_from_a_folder_of_decoys(whole_heads: Path, tmp_path: Path) -> None:
    decoy = tmp_path / "solvers"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise ImportError('the wrong solvers')")
    (tmp_path / "grace_opt.txt").write_text("not a package")
    script = Path(sys.executable).with_name("grace-opt")
    for command in ([sys.executable, "-m", "grace_opt"], [str(script)]):
        arguments = ["solve", str(whole_heads), "--ratio", "0.5", "-o", "m", "-f", "json"]
        result = subprocess.run([*command, *arguments], check=False, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert len(json.loads(result.stdout)["records"]) == 12


@pytest.mark.parametrize("module", ["typer", "grace_opt.cli.app", "rich.console", "numpy", "grace_opt.solve"])
def test_ctrl_c_while_modules_are_imported(module: str, whole_heads: Path, tmp_path: Path) -> None:
    interrupting = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *more):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv[1:] = ['solve', {str(whole_heads)!r}, '--ratio', '0.5', '-o', 'm', '--solver', 'greedy']\n"
        "from grace_opt.cli import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", interrupting]
    result = subprocess.run(line, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr.split()) == (130, ["interrupted"])
