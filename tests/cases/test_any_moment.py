"""Ctrl-C, SIGTERM and readers that go away: a word at most, the exit code that is usual, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DATA

SCRIPT = Path(sys.executable).with_name("grace-opt")
HEADS = DATA / "heads-smollm2-135m.safetensors"
SOLVE = ("solve", HEADS, "-o", "m", "--ratio", "0.5")

KILL = "os.kill(os.getpid(), signal.{})"
#: as a library's C code does with an interrupt that meets it while it imports something
CONVERTED = (
    "\n        try: raise KeyboardInterrupt\n        except BaseException as e: raise {}('cannot import') from e"
)


def grace_opt(
    *arguments: object, at: str = "", do: str = "", cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the console script; ``do`` something when it is about to import the module ``at``."""
    (cwd / "hooks").mkdir(exist_ok=True)
    (cwd / "hooks" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *more):\n"
        f"        if name != {at!r}: return None\n"
        "        sys.meta_path.remove(self)\n"
        f"        {do or 'pass'}\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(cwd / "hooks"), **more},
    )


@pytest.mark.parametrize(
    ("at", "do", "code", "said"),
    [
        ("grace_opt.cli.app", KILL.format("SIGINT"), 130, "interrupted"),  # before any of our commands is there
        ("typer.core", "raise KeyboardInterrupt", 130, "interrupted"),
        ("pydantic", CONVERTED.format("ImportError"), 130, "interrupted"),
        ("grace_solvers.greedy", KILL.format("SIGINT"), 130, "interrupted"),  # in a solver
        ("torch", CONVERTED.format("RuntimeError"), 130, "interrupted"),  # after all heads are solved
        ("typer", KILL.format("SIGTERM"), 143, "terminated"),
        ("numpy", KILL.format("SIGTERM"), 143, "terminated"),
    ],
)
def test_a_signal_while_a_module_is_imported(at: str, do: str, code: int, said: str, tmp_path: Path) -> None:
    ended = grace_opt(*SOLVE, "--solver", "greedy", at=at, do=do, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.splitlines()[-1:] == [said]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "m" / "kv_mask.json").exists()


def test_an_interrupt_where_python_cannot_raise_comes_again_where_it_can(tmp_path: Path) -> None:
    swallowing = (
        "\n        import time, weakref"
        "\n        class Thing: pass"
        "\n        def callback(_): raise KeyboardInterrupt"
        "\n        thing = Thing(); self.kept = weakref.ref(thing, callback); del thing"
        "\n        time.sleep(60)"  # until the interrupt comes
    )
    ended = grace_opt(*SOLVE, "--solver", "greedy", at="numpy", do=swallowing, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_processes_of_solvers_do_not_hear_ctrl_c_while_they_start(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'spawn_main' in ' '.join(sys.orig_argv): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    code = (
        "if __name__ == '__main__':\n"
        "    import numpy as np\n"
        "    from grace_opt import SubsetProblem, solve_many\n"
        "    print(solve_many([SubsetProblem(np.eye(3), 1)], 'independent', isolate=True)[0].status)\n"
    )
    more = {**os.environ, "PYTHONPATH": str(hooks)}
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=more)
    assert (ended.stdout, ended.stderr) == ("feasible\n", "")


@pytest.mark.parametrize("arguments", [("solvers", "-f", "json"), ("solvers",), ("--help",)])
def test_a_reader_that_has_gone_is_met_with_silence(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([str(SCRIPT), *arguments], check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("format", ["json", "table"])
def test_output_that_cannot_be_written_is_a_sentence(format: str) -> None:
    with open("/dev/full", "w") as full:
        line = [str(SCRIPT), "solvers", "-f", format]
        ended = subprocess.run(line, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith("\n")
    assert ended.stderr.count("\n") == 1
    assert "No space left on device" in ended.stderr


def test_closed_streams_are_no_error() -> None:
    line = f"exec {SCRIPT} solvers >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", line], check=False).returncode == 0


def test_a_second_ctrl_c_at_the_end_shows_nothing(tmp_path: Path) -> None:
    # A thread that is never done holds the process after its command; the second Ctrl-C meets it there.
    hook = (
        "\n        import threading, time"
        "\n        def late():"
        "\n            threading.main_thread().join()"
        "\n            os.kill(os.getpid(), signal.SIGINT)"
        "\n            time.sleep(60)"
        "\n        threading.Thread(target=late).start()"
        "\n        raise KeyboardInterrupt"
    )
    ended = grace_opt(*SOLVE, at="typer", do=hook, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "interrupted\n")
