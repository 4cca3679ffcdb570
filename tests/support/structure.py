"""The structure of the package: which module imports which, circles, and the longest files.

python -m tests.support.structure
"""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

from tests.support import ROOT

#: the rooms of the house, from the top down; a room uses only rooms below it (same line: not each other)
FLOORS = (
    ("cli",),
    ("service",),
    ("testing",),
    ("export",),
    ("compare", "evaluate"),
    ("runtime", "reports"),
    ("compression",),
    ("graphs", "solve", "records_file"),
    ("engines", "registry", "models", "records", "greedy"),
    ("solution",),
    ("problem",),
    ("files", "heads", "tensor_file", "versions"),
    ("reading",),
    ("errors",),
)
PACKAGES = {"grace_opt": ROOT / "grace_opt", "grace_solvers": ROOT / "solvers" / "grace_solvers"}


def modules() -> dict[str, Path]:
    """Name -> file of every module."""
    found = {}
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(types_too: bool = False) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, also inside functions; those for type checkers only if asked."""
    known = modules()
    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(_without_types(ast.parse(path.read_text(encoding="utf-8")), types_too)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [each if each in known else node.module for each in whole]
            else:
                continue
            graph[name] |= {each for each in targets if each in known and each != name}
    return graph


def _without_types(tree: ast.AST, types_too: bool) -> ast.AST:
    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            named = ast.unparse(node.test)
            return None if named in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else self.generic_visit(node)

    return tree if types_too else Drop().visit(tree)


def circle() -> list[str]:
    """A circle of imports; empty if there is none. Packages' own ``__init__`` count as modules."""
    try:
        tuple(graphlib.TopologicalSorter(imports()).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def climbing() -> list[str]:
    """Imports of a room above, or beside on the same floor."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for name, targets in imports().items():
        room = _room(name)
        for target in targets:
            other = _room(target)
            if room in floor and other in floor and room != other and floor[other] <= floor[room]:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "grace_opt" and len(parts) > 1 else ""


def long_files(most: int = 400) -> list[tuple[int, str]]:
    """Files of more than so many lines, the longest first, that give no reason in their first lines."""
    sizes = []
    for path in modules().values():
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > most and not any("400 lines" in line for line in lines[:8]):
            sizes.append((len(lines), str(path.relative_to(ROOT))))
    return sorted(sizes, reverse=True)


if __name__ == "__main__":
    print("circle of imports:", " -> ".join(circle()) or "none")
    print("imports of a room above:", "; ".join(climbing()) or "none")
    longest = sorted(((len(p.read_text(encoding="utf-8").splitlines()), n) for n, p in modules().items()), reverse=True)
    print("longest files:", ", ".join(f"{name} {lines}" for lines, name in longest[:8]))
