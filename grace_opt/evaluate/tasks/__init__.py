"""Tasks by family, one module each: `FAMILIES`, and what a name on the command line means."""

from __future__ import annotations

from grace_opt.compression.plugins import Table
from grace_opt.errors import InputError, did_you_mean
from grace_opt.evaluate.tasks.base import Family

#: the families by name; `FAMILIES.register` adds one, as does the entry-point group ``grace_opt.tasks``
FAMILIES: Table[type[Family]] = Table(
    "task family",
    "grace_opt.tasks",
    {
        "needle": "grace_opt.evaluate.tasks.needle:Needle",
        "ruler": "grace_opt.evaluate.tasks.ruler.family:Ruler",
        "longeval": "grace_opt.evaluate.tasks.longeval:LongEval",
        "longbench": "grace_opt.evaluate.tasks.longbench.family:LongBench",
        "longbench-e": "grace_opt.evaluate.tasks.longbench.family:LongBenchE",
    },
)


def find(name: str, local: str | None = None) -> list[tuple[Family, str]]:
    """The tasks of a name: all of a family (``ruler``), or one (``ruler/vt``), each with its family.

    ``local``: a local copy of the data of families that have some. Raises InputError for an unknown name, with the
    nearest.
    """
    family, slash, _ = name.partition("/")
    if family not in FAMILIES:
        raise InputError(f"unknown task {name!r}{did_you_mean(name, ['kl', *FAMILIES])}")
    made = FAMILIES[family](local)
    names = [each for each in made.tasks if each == name] if slash else list(made.at_hand)
    if not names:
        raise InputError(f"unknown task {name!r}{did_you_mean(name, made.tasks)}")
    return [(made, each) for each in names]
