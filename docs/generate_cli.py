"""Write docs/cli.md from the command line itself.

python docs/generate_cli.py           write it
python docs/generate_cli.py --check   exit with 1 if it is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from grace_opt.cli.app import app
from grace_opt.cli.config import tables_of

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """\
# Command line

<!-- Written by docs/generate_cli.py; change the help texts in grace_opt/cli/ instead. -->

`grace-opt COMMAND --help` prints the same. Data goes to standard output, everything else to standard error. Exit codes:
0, 2 for bad input (one sentence on standard error), 1 for anything unexpected, 130 when interrupted and
143 by SIGTERM; but `serve` and `worker`, once they are up, end in order and with 0.

An option's value is the first that is given: flag, environment variable, key of the config file, default. `-v` prints
where each value came from. The variable of a repeatable option (`GRACE_OPT_SOLVER_OPTION`) holds values separated by
spaces. The config file's tables are described in [File formats](formats.md#config-file). One more variable,
`GRACE_OPT_PLUGINS`, chooses third-party solvers: see [Adding a solver](adding-a-solver.md#which-plug-ins-are-loaded).

## grace-opt

```text
grace-opt [--version] [--debug] COMMAND ...
```

| option | |
|---|---|
"""


def render() -> str:
    """The page."""
    group: Any = typer.main.get_command(app)
    lines = [INTRODUCTION.rstrip("\n")]
    lines += [f"| `{option.opts[0]}` | {option.help} |" for option in group.params]
    for name, command in commands(group.commands).items():
        reads_config = any(parameter.name == "config" for parameter in command.params)
        read = tables_of(name) if reads_config else {}
        tables = {key: table for table, keys in read.items() for key in keys}
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        words = (argument.metavar or argument.name.upper() for argument in arguments)
        usage = " ".join(["grace-opt", name, *words, "[OPTIONS]"])
        lines += ["", f"## {name}", "", command.help, "", "```text", usage, "```"]
        if arguments:
            lines += ["", "| argument | | default | config table |", "|---|---|---|---|"]
            for argument in arguments:
                table, shown = _code(tables.get(argument.name), "[{}]"), argument.metavar or argument.name.upper()
                lines.append(f"| `{shown}` | {argument.help} | {_default(argument)} | {table} |")
        lines += ["", "| option | | default | environment | config table |", "|---|---|---|---|---|"]
        for option in options:
            names = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
            table = _code(tables.get(option.name), "[{}]")
            lines.append(f"| {names} | {option.help} | {_default(option)} | {_code(option.envvar)} | {table} |")
    return "\n".join(lines) + "\n"


def commands(found: dict[str, Any], before: str = "") -> dict[str, Any]:
    """All commands, those of groups under both names."""
    every: dict[str, Any] = {}
    for name, command in found.items():
        inner = getattr(command, "commands", None)
        every |= {before + name: command} if inner is None else commands(inner, f"{name} ")
    return every


def _code(word: str | None, pattern: str = "{}") -> str:
    return f"`{pattern.format(word)}`" if word else ""


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value == [] or value is False:
        return ""
    return _code(parameter.opts[0] if value is True else str(value))


def main() -> None:
    """Write the page, or check it."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE} is stale; run: python {Path(__file__).name}")


if __name__ == "__main__":
    main()
