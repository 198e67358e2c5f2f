"""What keeps the code readable: sizes, and imports that go one way."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "chatbind_cli").rglob("*.py"), *(ROOT / "commands").glob("*.py")])


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "chatbind_cli" else ("chatbind_cli", *parts))


MODULES = {name_of(path).removesuffix(".__init__"): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name):
    """The modules of ours that a module imports, wherever in it, but for the type checker."""
    typed = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.If) and _for_types(n.test)]
    skip = {id(inner) for block in typed for inner in ast.walk(block)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in MODULES or base in MODULES:
                    yield inner if inner in MODULES else base


def _for_types(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def folder_of(name):
    """The folder of the library that a module is in; a file of its top is one by itself."""
    return ".".join(name.split(".")[:2])


def test_files_do_not_import_each_other_in_a_circle():
    circle_free(GRAPH)


def test_folders_do_not_import_each_other_in_a_circle():
    folders = {}
    for name, found in GRAPH.items():
        folders.setdefault(folder_of(name), set()).update(map(folder_of, found))
    circle_free({folder: found - {folder} for folder, found in folders.items()})


def test_the_rest_of_the_house_knows_encoders_by_their_protocol_alone():
    """The toy world trains ImageBinds."""
    names = ("imagebind", "languagebind", "huggingface")
    kinds = tuple(f"chatbind_cli.encoders.{name}." for name in names)
    allowed = ("chatbind_cli.encoders.", "chatbind_cli.toy.")
    found = {n: sorted(m for m in GRAPH[n] if m.startswith(kinds)) for n in GRAPH}
    assert {n: m for n, m in found.items() if m and not n.startswith(allowed)} == {}


def circle_free(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_file_has_at_most_350_lines_and_a_function_60():
    files = {n: MODULES[n].read_text(encoding="utf-8").count("\n") for n in MODULES}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and "commands" not in name  # the options of a command are its arguments
    }
    assert {n: size for n, size in files.items() if size > 350} == {}
    assert {n: size for n, size in functions.items() if size > 60} == {}
