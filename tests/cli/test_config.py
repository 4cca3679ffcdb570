"""The tables of a config file are the commands' options; options that commands share are the same everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from grace_opt import Limits
from grace_opt.cli.app import COMMANDS, app, grouped
from grace_opt.cli.config import ONLY, TABLES, named_options, own_options, tables_of
from grace_opt.cli.options import LimitOptions
from grace_opt.errors import InputError


def commands() -> dict[str, Any]:
    """Name -> command, of those that read a config file."""
    group: Any = typer.main.get_command(app)
    every: dict[str, Any] = group.commands
    return {name: command for name, command in every.items() if "config" in parameters(command)}


def parameters(command: Any) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in getattr(command, "params", [])}


def test_every_key_of_a_table_is_an_option_of_a_command_that_reads_it() -> None:
    for table, keys in TABLES.items():
        readers = [command for name, command in commands().items() if table in tables_of(name)]
        assert len(set(keys)) == len(keys)
        for key in keys:
            assert any(key in parameters(command) for command in readers), f"{table}.{key}"
    assert set(ONLY) <= set(TABLES)
    assert {command for readers in ONLY.values() for command in readers} <= set(commands())


@pytest.mark.parametrize("name", list(commands()))
def test_what_the_environment_can_set_a_config_file_can_set_too(name: str) -> None:
    for key, parameter in parameters(commands()[name]).items():
        if parameter.param_type_name == "option" and key != "config":
            holding = [keys for keys in tables_of(name).values() if key in keys]
            assert bool(parameter.envvar) == bool(holding), key
            if parameter.envvar:
                assert any(
                    parameter.envvar == f"GRACE_OPT_{flag[2:].replace('-', '_').upper()}" for flag in parameter.opts
                )


def test_limits_are_the_same_options_in_every_command_that_solves() -> None:
    found = commands()
    for name in LimitOptions.__annotations__:
        first, *others = (parameters(found[command])[name] for command in ("solve", "compare", "submit"))
        for other in others:
            assert (other.opts, other.help, other.default, other.envvar) == (
                first.opts,
                first.help,
                first.default,
                first.envvar,
            )
    assert LimitOptions().limits() == Limits()
    assert LimitOptions(time_limit=2.0, seed=7).limits() == Limits(time_limit=2.0, seed=7)


def test_every_command_has_a_sentence_of_help() -> None:
    for command in COMMANDS:
        made = grouped(command)
        assert made.__name__ == command.__name__
        assert (made.__doc__ or "").endswith(".")


def test_pairs_of_options() -> None:
    assert own_options("--solver-option", ["a=1", "p.b=x=y"], "p") == {"a": "1", "b": "x=y"}
    assert named_options("--solver-option", ["p", "q"], ["p.a=1"]) == {"p": {"a": "1"}, "q": {}}
    for wrong in ("a", "=1"):
        with pytest.raises(InputError, match="--solver-option takes NAME=VALUE"):
            own_options("--solver-option", [wrong], "p")
    with pytest.raises(InputError, match="which is not in this run; did you mean 'greedy'"):
        named_options("--solver-option", ["greedy"], ["greddy.a=1"])
