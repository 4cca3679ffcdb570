"""An option that is given has an effect, or is refused in a sentence: nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import inside, records, sentence
from tests.support import DATA

HEADS = DATA / "heads-smollm2-135m.safetensors"
ABSENT = "a-model-that-is-not-read"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--floor", 3, "--budget", "uniform"), "floor has no effect in a uniform budget"),
        (("--method-option", "rounding=ceil"), "rounding has no effect in a shared budget"),
        (("--method-option", "ridge=0.1", "--method", "grace"), "ridge has no effect with readout_fit=none"),
        (("--method-option", "mixing=0.1", "--method", "think"), "mixing has no effect with readout_fit=none"),
        (
            ("--method-option", "spans=3", "--method", "grace"),
            "spans has no effect unless the objective or the read-out",
        ),
        (("--method", "snapkv+grace-opt"), "tokens are chosen from a prompt, and a bundle has none, so 'snapkv'"),
        (("--scheduler", "tcp://10.0.0.1:8786"), "--scheduler goes with --engine dask"),
        (("--engine", "dask", "--isolate"), "--isolate is for this machine"),
        (("--engine", "dask", "--scheduler", "tcp://10.0.0.1:8786", "--workers", 3), "a --scheduler has its own"),
        (("--budget-bytes", 100, "--value-ratio", 0.5), "give either --ratio or --budget-bytes"),
    ],
)
def test_solve(arguments: tuple[object, ...], said: str, tmp_path: Path) -> None:
    assert said in sentence(inside("solve", HEADS, "-o", tmp_path / "m", "--ratio", 0.5, *arguments))
    assert not (tmp_path / "m" / "kv_mask.json").exists()


def test_align_counts_in_a_uniform_budget_too(tmp_path: Path) -> None:
    line = ("solve", HEADS, "-o", tmp_path / "m", "--ratio", 0.4, "--solver", "independent", "--budget", "uniform")
    assert "24 of 64" in inside(*line, "--align", 8).stdout  # 25 without
    assert "cannot keep multiples of 3" in sentence(inside(*line, "--align", 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratio", 0.5), "there is nothing to evaluate"),
        (("--mask", "mask", "--ratio", 0.5), "a mask has its own budget"),
        (("--method", "think", "--budget-bytes", 100, "--value-ratio", 0.5), "--value-ratio goes with --ratio"),
        (("--method", "think", "--ratio", 0.5, "--chat"), "kl asks no questions"),
        (("--method", "think", "--ratio", 0.5, "--task", "needle", "--dataset", "ruler:4096"), "is the text of kl"),
        (("--method", "int4", "--ratio", 0.5), "give a share of the bytes"),
        (("--method", "think", "--ratio", 0.5, "--method-option", "think.floor=3"), "floor has no effect in a uniform"),
        (
            ("--method", "grace-opt", "--ratio", 0.5, "--method-option", "grace-opt.offline_solver=auto"),
            "offline_solver is for bundles",
        ),
        (("--method", "streaming", "--ratio", 0.5, "--method-option", "streaming.solver=greedy"), "codec=whole"),
        (
            ("--method", "grace-opt", "--ratio", 0.5, "--method-option", "grace-opt.token_share=0.5"),
            "token_share has no effect without a token policy",
        ),
        (
            ("--method", "snapkv+grace-opt", "--ratio", 0.5),
            "only a share of the bytes can be split between the token policy 'snapkv' and the codec 'channels'",
        ),
        (
            ("--method", "snapkv+think", "--budget-share", 0.5),
            "a share is split between the token policy 'snapkv' and the codec 'channels' by the error",
        ),
        (
            ("--method", "snapkv", "--budget-share", 0.5, "--method-option", "snapkv.token_weight=2"),
            "token_weight has no effect unless a share is split",
        ),
        (
            ("--method", "think", "--ratio", 0.5, "--method-option", "think.spans=3"),
            "spans has no effect unless the objective or the read-out is attention",
        ),
    ],
)
def test_evaluate(arguments: tuple[object, ...], said: str) -> None:
    assert said in sentence(inside("evaluate", ABSENT, *arguments))


@pytest.mark.parametrize("command", ["compare", "submit"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget-bytes", 100, "--value-ratio", 0.5), "--value-ratio goes with --ratio"),
        (("--ratio", 0.5, "--floor", 3, "--budget", "uniform"), "floor has no effect in a uniform budget"),
        (("--ratio", 0.5, "--solver-option", "sdp.rounds=3"), "'sdp', which is not in this run"),
        (("--ratio", 0.5, "--method-option", "ridge=1", "--method", "grace"), "ridge has no effect"),
    ],
)
def test_compare_and_submit(command: str, arguments: tuple[object, ...], said: str, tmp_path: Path) -> None:
    more = ("-o", tmp_path / "c") if command == "compare" else ("--url", "http://127.0.0.1:9")
    assert said in sentence(inside(command, HEADS, *more, "--solver", "greedy", *arguments))


@pytest.mark.parametrize("ratio", ["0.5,,0.6", "50%", "nan", "inf", "0,5", "1", "-0.1", "half", "1e-400%", ""])
@pytest.mark.parametrize("command", ["solve", "compare"])
def test_what_is_no_ratio_is_a_sentence(command: str, ratio: str, tmp_path: Path) -> None:
    more = ("--solver", "greedy", "-o", tmp_path / "m")
    assert "ratio" in sentence(inside(command, HEADS, *more, f"--ratio={ratio}"))
    assert "budget" in sentence(inside(command, HEADS, *more, f"--budget-bytes={ratio.replace('1', '0')}"))


@pytest.mark.parametrize("ratio", [".5", " 0.5", "5e-1", "0.50", "+.5 "])
def test_other_ways_to_write_a_number(ratio: str, tmp_path: Path) -> None:
    line = ("solve", HEADS, "-o", tmp_path / "m", "--solver", "independent", "--budget", "uniform")
    assert "32 of 64" in inside(*line, "--ratio", ratio).stdout
    assert "32 of 64" in inside(*line, GRACE_OPT_RATIO=ratio).stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[method]\nratio = true", "ratio = True; it takes a number"),
        ('[method]\nratio = "0.5"', "ratio = '0.5'; it takes a number"),
        ("[method]\nratio = [0.5, 0.6]", "ratio = [0.5, 0.6]; it takes a number, one"),
        ("[method]\nprotect = 1", "protect = 1; it takes true or false"),
        ("[solver]\nseed = 2.7", "seed = 2.7; it takes a whole number"),
        ("[solver]\nthreads = true", "threads = True; it takes a whole number"),
        ("[solver]\nsolver = 3", "solver = 3; it takes a text"),
        ("[solver]\nsolver_option = [3]", "solver_option = 3; it takes a text in quotes, one or a list"),
        ("[engine]\nworkers = 2.0", "workers = 2.0; it takes a whole number"),
    ],
)
def test_values_of_another_type_in_a_config_file(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(line)
    told = sentence(inside("solve", HEADS, "-o", tmp_path / "m", "--config", tmp_path / "c.toml"))
    assert said in told


def test_a_list_where_an_option_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[solver]\nsolver = ["greedy", "independent"]\n[method]\nratio = [0.5, 0.6]')
    compared = inside("compare", HEADS, "-o", tmp_path / "c", "--config", tmp_path / "c.toml", "-f", "json")
    assert {(record["solver"], record["ratio"]) for record in records(compared)} == {
        (solver, ratio) for solver in ("greedy", "independent") for ratio in (0.5, 0.6)
    }
