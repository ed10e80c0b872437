"""What may import what, and how long things may be. Nothing here is run: sources are read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE, NODES = ROOT / "amed_core", ROOT / "nodes"
SAMPLING = [file for file in sorted(CORE.glob("*.py")) if file.name not in ("__init__.py", "__main__.py")]
FIT, TOOLS = sorted((CORE / "fit").glob("*.py")), sorted((CORE / "tools").glob("*.py"))
EVERY = [*sorted(CORE.rglob("*.py")), *sorted(NODES.glob("*.py"))]
NODES_THAT_SAMPLE = [NODES / name for name in ("sampling.py", "sampler.py", "values.py")]
LEARNERS_NEED = {"teacher", "closed_form", "grid_search"}  # of `fit`, all that nodes that sample may import
KINDS = {"AMEDPredictor", "MidpointTable", "MultistepTable", "PerInterval", "EndToEnd", "SeveralScales", "FitSet"}
MAY_ASK = {"files.py", "predictor.py"}
LONGEST_CLASS, LONGEST_FUNCTION = 300, 80  # lines


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=name)


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The parts of every module or name that a file imports, from the repository's root on."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *module, alias.name) for alias in node.names)


def of_core(file: Path, package: str) -> set[str]:
    """The modules of a package of the core that a file imports from."""
    found = (parts[:3] for parts in imported(file))
    return {parts[2] if len(parts) > 2 else "" for parts in found if parts[:2] == ("amed_core", package)}


@each(SAMPLING)
def test_what_samples_imports_neither_fits_nor_tools(file: Path) -> None:
    assert not of_core(file, "fit")
    assert not of_core(file, "tools")


@each(FIT)
def test_fits_import_no_tools(file: Path) -> None:
    assert not of_core(file, "tools")


@each(NODES_THAT_SAMPLE)
def test_nodes_that_sample_import_no_fit(file: Path) -> None:
    assert of_core(file, "fit") <= LEARNERS_NEED
    assert not of_core(file, "tools")


def test_the_rules_see_imports_of_all_forms(tmp_path: Path) -> None:
    assert "teacher" in of_core(CORE / "tools" / "bench.py", "fit")
    assert "make" in of_core(CORE / "__init__.py", "fit")
    assert of_core(CORE / "__main__.py", "tools")


def asked(file: Path) -> list[str]:
    """The kinds of fits and predictors that a file asks an object for, with their lines."""
    found = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            named = {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(node.args[1])}
            found += [f"{name(file)}:{node.lineno} {kind}" for kind in sorted(named & KINDS)]
    return found


@each([file for file in EVERY if file.name not in MAY_ASK])
def test_nobody_asks_what_kind_of_fit_or_predictor_it_has(file: Path) -> None:
    assert asked(file) == []


@each(EVERY)
def test_classes_and_functions_can_be_read_in_one_go(file: Path) -> None:
    for node in ast.walk(tree(file)):
        lines = (getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert lines <= LONGEST_CLASS, f"{node.name} has {lines} lines"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            schema = node.name == "define_schema" or file.name == "training_inputs.py"
            assert schema or lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_every_module_of_the_core_is_looked_at() -> None:
    assert len(SAMPLING) > 10
    assert len(FIT) > 10
    assert len(TOOLS) > 4
