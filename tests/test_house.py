"""The house's rules, read from the imports themselves: rooms on floors, no circles, few files at the top."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dgs_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = {"dgs_kernels": ROOT / "dgs_kernels", "dgsnet": ROOT / "python" / "dgsnet"}
MOST_LINES = 500
MOST_LINES_OF_TESTS = 400
MOST_FILES_AT_THE_TOP = 8


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Module name to file, of a package; a package's own name stands for its `__init__.py`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: Set[str]) -> set[str]:
    """The modules among `known` that a file imports anywhere, inside functions and for type checkers too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # What is no file of the folder is a name that its `__init__.py` or the file has.
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return (found & known) - {module}


def arrows(package: str, folder: Path) -> dict[str, set[str]]:
    """Every module with what it imports of its own package."""
    files = modules(package, folder)
    return {module: imports(module, path, files.keys()) for module, path in files.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, first and last alike; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room(module: str) -> str:
    """The folder of the package in which a file lies; a file at the top is a room of its own."""
    return ".".join(module.split(".")[:2])


def between_rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same arrows from room to room. The package's own `__init__.py`, its face, is above all rooms."""
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        rooms.setdefault(room(module), set()).update({room(name) for name in imported} - {room(module)})
    return rooms


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_files(package):
    assert circle(arrows(package, PACKAGES[package])) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_rooms(package):
    assert circle(between_rooms(arrows(package, PACKAGES[package]))) == []


def test_kernels_know_nothing_of_the_detector():
    for path in modules("dgs_kernels", PACKAGES["dgs_kernels"]).values():
        assert not any(
            (name or "").split(".")[0] == "dgsnet"
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        ), path


def imported(path: Path, package: str) -> set[str]:
    """What a file imports of a package, as `package.module.name`, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == package}


def test_the_detector_uses_public_names_of_the_kernels_alone():
    public = {"dgs_kernels"} | {f"dgs_kernels.{name}" for name in dgs_kernels.__all__}
    for path in modules("dgsnet", PACKAGES["dgsnet"]).values():
        assert imported(path, "dgs_kernels") <= public, path


@pytest.mark.parametrize(
    "text", ["import house.lower.rules\n", "def f():\n    from house.lower import rules\n"]
)
def test_planted_import_of_what_is_not_public(tmp_path, text):
    (tmp_path / "file.py").write_text(text)
    assert not imported(tmp_path / "file.py", "house") <= {"house", "house.public"}


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    long = {
        path.name: lines
        for path in modules(package, PACKAGES[package]).values()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_files_of_tests_are_shorter():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES_OF_TESTS}


def csv_writers(path: Path) -> list[str]:
    """What a file names of the ways to write CSV."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("writer", "DictWriter", "to_csv", "write_csv"):
            found += (
                [ast.unparse(node)] if node.attr.endswith("csv") or ast.unparse(node.value) == "csv" else []
            )
        elif isinstance(node, ast.ImportFrom) and node.module == "csv":
            found += [alias.name for alias in node.names if alias.name.lower().endswith("writer")]
    return found


def test_one_file_writes_csv():
    """The one that knows which cells a spreadsheet would compute."""
    cells = PACKAGES["dgsnet"] / "data" / "cells.py"
    assert csv_writers(cells) == ["csv.writer"]
    for path in modules("dgsnet", PACKAGES["dgsnet"]).values():
        assert path == cells or not csv_writers(path), path


@pytest.mark.parametrize(
    "text", ["import csv\ncsv.DictWriter(f, [])\n", "from csv import writer\n", "frame.to_csv(path)\n"]
)
def test_planted_writer_of_csv(tmp_path, text):
    (tmp_path / "file.py").write_text(text)
    assert csv_writers(tmp_path / "file.py")


def comments_behind_code(path: Path) -> list[str]:
    """Lines that end in a comment for people; one for a tool has to stand there."""
    with path.open("rb") as file:
        found = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return [
        token.line.strip()
        for token in found
        if token.line[: token.start[1]].strip()
        and not re.match("# (type: ignore|noqa|fmt: skip)", token.string)
    ]


@pytest.mark.parametrize("place", [*PACKAGES, "benchmarks", "examples", "setup.py", "tests"])
def test_comments_stand_above_the_line_that_they_explain(place):
    path = PACKAGES.get(place, ROOT / place)
    files = [*path.rglob("*.py")] if path.is_dir() else [path]
    assert files
    assert {file: lines for file in files if (lines := comments_behind_code(file))} == {}


def test_comments_in_cpp_stand_above_their_line():
    sources = [path for kind in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    behind = re.compile(r"^[ \t]*[^/\s].*[ \t]// (?!namespace\b).*", re.MULTILINE)
    assert len(sources) > 40
    assert {path: lines for path in sources if (lines := behind.findall(path.read_text()))} == {}


def test_planted_comment_behind_code(tmp_path):
    (tmp_path / "file.py").write_text(
        "# above\nx = 1  # noqa: E741\ny = '# no'\nz = (\n    2,  # of all\n)  # fmt: skip\n"
    )
    assert comments_behind_code(tmp_path / "file.py") == ["2,  # of all"]


def test_few_files_at_the_top():
    assert len(list(PACKAGES["dgsnet"].glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_rooms_say_what_they_are_for():
    for package, folder in PACKAGES.items():
        for module, path in modules(package, folder).items():
            if path.name == "__init__.py":
                assert ast.get_docstring(ast.parse(path.read_text())), module


def test_tests_mirror_the_rooms():
    for package, folder in PACKAGES.items():
        for path in (ROOT / "tests" / package).iterdir():
            if path.is_dir() and not path.name.startswith("__"):
                assert (folder / path.name / "__init__.py").is_file(), path


@pytest.fixture
def planted(tmp_path):
    """A package to plant faults in: two rooms, the upper of which imports the lower."""
    for name, text in {
        "__init__.py": "from house.upper.command import run\n",
        "errors.py": "",
        "lower/__init__.py": "",
        "lower/rules.py": "from house import errors\n",
        "upper/__init__.py": "",
        "upper/command.py": "from ..lower.rules import RULE\n",
    }.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "house"


def test_sound_house(planted):
    graph = arrows("house", planted)
    assert graph["house.upper.command"] == {"house.lower.rules"}
    assert graph["house.lower.rules"] == {"house.errors"}
    assert not circle(graph) and not circle(between_rooms(graph))


@pytest.mark.parametrize(
    "hidden",
    [
        "from house.upper.command import run\n",
        "def f():\n    from house.upper import command\n",
        "def f():\n    import house.upper.command\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..upper.command import run\n",
    ],
)
def test_planted_circle_between_files(planted, hidden):
    (planted / "lower" / "rules.py").write_text(hidden)
    assert set(circle(arrows("house", planted))) == {"house.upper.command", "house.lower.rules"}


def test_planted_circle_between_rooms(planted):
    """No file imports back what imports it, and yet neither room stands above the other."""
    (planted / "lower" / "other.py").write_text("def f():\n    from house.upper.command import run\n")
    graph = arrows("house", planted)
    assert not circle(graph)
    assert set(circle(between_rooms(graph))) == {"house.upper", "house.lower"}
