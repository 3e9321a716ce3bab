"""Who may import whom: only a lower layer, so that no circle can come back; and how long the core is to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("detr_fabric", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
LAYERS = [  # modules and packages; a tool's __main__ stands above its package
    ["errors", "launcher"],
    ["config", "boxes", "draw", "terminal"],
    ["model", "presets"],
    ["optimizer", "data", "cli"],
    ["loss"],
    ["runtime"],
    ["evaluate", "analysis", "replay"],
    ["tracking"],
    ["build"],
    ["loop", "predict", "check", "benchmark", "study", "report"],
    ["export", "train", "__main__"],
    ["experiments"],
]
CORE = {  # folder: modules, in the order of reading
    "": ["config", "loop", "build", "optimizer", "boxes"],
    "model": ["detr", "transformer", "attention", "mappings", "position", "backbone", "build"],
    "loss": ["criterion", "matcher"],
    "data": ["batch", "dataset", "transforms", "sampler", "loader"],
    "evaluate": ["detect", "coco"],
}


def room(module: str) -> str:
    """The module or package of LAYERS that a module belongs to."""
    package, _, rest = module.partition(".")
    return package if package == "experiments" else "__main__" if rest.endswith("__main__") else rest.split(".")[0]


def imported(module: str) -> Iterator[str]:
    """Modules of this project that a module imports anywhere: at the top, for types only, or inside a function."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: import by the full name"
            names = [name if (name := f"{node.module}.{alias}") in FILES else node.module or "" for alias in names]
        yield from (name for name in names if name in FILES)


def test_a_module_imports_only_its_own_package_and_lower_layers() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    for module in FILES.keys() - {"detr_fabric"}:  # whose load() is there for Python users alone
        for other in set(imported(module)):
            own = room(other) == room(module) or other.startswith(module.removesuffix("__main__"))
            assert own or layer[room(other)] < layer[room(module)], f"{module} must not import {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: set(imported(module)) for module in FILES}).prepare()  # raises CycleError


def test_the_core_stays_short_enough_to_read_in_an_afternoon() -> None:
    files = [ROOT / "detr_fabric" / folder / f"{name}.py" for folder, names in CORE.items() for name in names]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 2750
