"""Which tests reach a line: noted by coverage in a run of the tests, kept per file of tests, and asked for.

As a plugin of pytest, in that run, it tells coverage whose lines come: a test's, or those of a fixture that
several tests share. Processes that a test starts are told by an environment variable.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path

import pytest

CONTEXT, NOTES = "MUTANTS_CONTEXT", "MUTANTS_NOTES"
# After so many files of tests, what they reach is kept.
AT_A_TIME = 50

# Tests that run no Python of ours, that compile for minutes what others have run, or that take times.
LEFT_OUT = (
    "tests/csrc",
    "tests/mutants",
    "tests/dgs_kernels/test_speed.py",
    "tests/dgs_kernels/ops/test_triton_compiles.py",
    "tests/dgs_kernels/ops/test_triton_machine_code.py",
)


class Watch:
    """In one process of the run: switches coverage's context, notes tests' seconds, outcomes and fixtures."""

    def __init__(self, coverage) -> None:
        self.coverage = coverage
        self.context, self.file = "", ""
        self.tests: dict[str, dict] = {}
        self.fixtures: dict[str, float] = {}

    def switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        os.environ[CONTEXT] = context
        return before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.file = item.nodeid.partition("::")[0]
        wide = [
            self.shared(definition)
            for definitions in item._fixtureinfo.name2fixturedefs.values()
            for definition in definitions
            if definition.scope != "function"
        ]
        self.tests[item.nodeid] = {"seconds": 0.0, "passed": True, "fixtures": wide}
        forget_what_is_cached()
        end_readers()
        self.switch(item.nodeid)
        try:
            return (yield)
        finally:
            end_readers()
            self.switch("")

    def shared(self, definition: pytest.FixtureDef) -> str:
        return f"{self.file}::<{definition.baseid}:{definition.argname}>"

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest):
        if fixturedef.scope == "function":
            return (yield)
        begin, before = time.monotonic(), self.switch(self.shared(fixturedef))
        try:
            return (yield)
        finally:
            seconds = time.monotonic() - begin
            self.fixtures[self.context] = self.fixtures.get(self.context, 0.0) + seconds
            if before in self.tests:
                # pytest counts the set-up as part of this test's time.
                self.tests[before]["seconds"] -= seconds
            self.switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.tests:
            self.tests[report.nodeid]["seconds"] += report.duration
            self.tests[report.nodeid]["passed"] &= not report.failed

    def pytest_sessionfinish(self) -> None:
        notes = {"tests": self.tests, "fixtures": self.fixtures}
        Path(os.environ[NOTES], f"{os.getpid()}.json").write_text(json.dumps(notes), encoding="utf-8")


class Context:
    """Goes with a process that is forked from another than its parent, and so has another's environment."""

    def __getstate__(self) -> str:
        return os.environ.get(CONTEXT, "")

    def __setstate__(self, context: str) -> None:
        os.environ[CONTEXT] = context


def forget_what_is_cached() -> None:
    """A line behind a cache is reached by every test that needs its result, not by the first alone."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("dgs_kernels", "dgsnet", "tests"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def end_readers() -> None:
    """Processes that read images serve many tests; each test here has its own, which say what it reached."""
    if apart := sys.modules.get("dgsnet.apart"):
        for process in list(apart._all):
            process.end(patience=10)


def pytest_configure(config: pytest.Config) -> None:
    import coverage

    if "PYTEST_XDIST_WORKER" in os.environ and (running := coverage.Coverage.current()):
        config.pluginmanager.register(Watch(running))
        prepared = spawn.get_preparation_data
        spawn.get_preparation_data = lambda name: prepared(name) | {"context": Context()}
        from dgsnet import apart

        # They start without site-packages' files, of which coverage's is one.
        started = "; import coverage; coverage.process_startup(); from dgsnet"
        apart.PROGRAM = apart.PROGRAM.replace("; from dgsnet", started)


# Making the map


def test_files(root: Path) -> list[str]:
    found = sorted(str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py"))
    return [file for file in found if not file.startswith(LEFT_OUT)]


def digest(root: Path, files: Iterable[str]) -> str:
    made = hashlib.sha256()
    for file in sorted(files):
        made.update(file.encode() + b"\0" + (root / file).read_bytes())
    return made.hexdigest()[:16]


def make(root: Path, cache: Path) -> Reach:
    """The map of a tree, from the cache where neither the code nor a file of tests has changed since.

    What tests the kernels does not know the detector.
    """
    read = [
        str(path.relative_to(root))
        for folder in ("dgs_kernels", "csrc", "python", "tests")
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".md") and not path.name.startswith("test_")
    ]
    read = [file for file in read if not file.startswith(LEFT_OUT)]
    kernels = digest(root, [file for file in read if not file.startswith(("python/", "tests/dgsnet/"))])
    everything = digest(root, read)
    units = {}
    for file in test_files(root):
        code = kernels if file.startswith("tests/dgs_kernels/") else everything
        units[file] = cache / f"{code}-{digest(root, [file])}.json"
    missing = [file for file, unit in units.items() if not unit.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(missing), AT_A_TIME):
        for file, unit in run(root, missing[first : first + AT_A_TIME]).items():
            units[file].with_suffix(".part").write_text(json.dumps(unit), encoding="utf-8")
            units[file].with_suffix(".part").replace(units[file])
    return Reach(root, [json.loads(unit.read_text(encoding="utf-8")) for unit in units.values()])


def run(root: Path, files: list[str]) -> dict[str, dict]:
    """For each file of tests: its tests, its fixtures' seconds, and the lines that each of them reaches."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        settings = Path(folder, "settings")
        settings.write_text(
            f"[run]\nparallel = true\ndata_file = {folder}/lines\ncontext = ${{{CONTEXT}-}}\nsigterm = true\n"
            f"concurrency =\n    multiprocessing\n    thread\npatch =\n    _exit\n"
            f"include =\n    {root}/dgs_kernels/*\n    {root}/python/dgsnet/*\n"
        )
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutants.reach", "-p", "no:cacheprovider"]
        command += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--maxfail", "0", *files]
        environment = os.environ | {"COVERAGE_PROCESS_START": str(settings), NOTES: folder}
        environment |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, cwd=root, env=environment, stdout=sys.stderr)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the tests could not be run: pytest's exit code is {done.returncode}")
        units: dict[str, dict] = {file: {"tests": {}, "fixtures": {}, "lines": {}} for file in files}
        for notes in Path(folder).glob("*.json"):
            for kind, noted in json.loads(notes.read_text(encoding="utf-8")).items():
                for name, value in noted.items():
                    units[name.partition("::")[0]][kind][name] = value
        for context, source, lines in measured(Path(folder), root):
            if (file := context.partition("::")[0]) in units:
                of_source = units[file]["lines"].setdefault(source, {})
                of_source[context] = f"{int(of_source.get(context, '0'), 16) | lines:x}"
    return units


def measured(folder: Path, root: Path) -> Iterator[tuple[str, str, int]]:
    """(context, source file, lines as bits) of every process, from the tables that coverage documents."""
    query = (
        "select context.context, file.path, line_bits.numbits from line_bits "
        "join context on context.id = line_bits.context_id join file on file.id = line_bits.file_id"
    )
    for path in folder.glob("lines.*"):
        connection = sqlite3.connect(path)
        try:
            for context, file, bits in connection.execute(query):
                yield context, str(Path(file).relative_to(root)), int.from_bytes(bits, "little")
        except sqlite3.DatabaseError:
            # A process that was killed leaves a broken file.
            continue
        finally:
            connection.close()


# Asking it


@dataclass(frozen=True)
class Statement:
    """First and last line of what is carried out together, and whether that is when the file is imported."""

    first: int
    last: int
    imported: bool


def statement(source: str, line: int) -> Statement:
    """The innermost statement that a line belongs to; of a compound one, its head."""
    found = Statement(line, line, True)

    def look(node: ast.AST, imported: bool) -> None:
        nonlocal found
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                above = [*getattr(child, "decorator_list", [])]
                place = child.pattern if isinstance(child, ast.match_case) else child
                first = min(n.lineno for n in (place, *above))
                body = getattr(child, "body", None)
                end = body[-1].end_lineno if isinstance(child, ast.match_case) else child.end_lineno
                if not first <= line <= end:
                    continue
                last = child.end_lineno if not body else _first_line(body[0]) - 1
                if line <= max(first, last):
                    found = Statement(first, max(first, last), imported)
            look(child, imported and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    look(ast.parse(source), True)
    return found


def _first_line(node: ast.stmt) -> int:
    return min(n.lineno for n in (node, *getattr(node, "decorator_list", [])))


class Reach:
    """The map of a tree."""

    def __init__(self, root: Path, units: list[dict]) -> None:
        self.root = root
        self.tests = {name: test for unit in units for name, test in unit["tests"].items()}
        self.fixtures = {name: seconds for unit in units for name, seconds in unit["fixtures"].items()}
        self.users: dict[str, list[str]] = {}
        for name, test in self.tests.items():
            for context in (name, *test["fixtures"]):
                self.users.setdefault(context, []).append(name)
        self._lines: dict[str, dict[str, int]] = {}
        for unit in units:
            for source, lines in unit["lines"].items():
                of_source = self._lines.setdefault(source, {})
                of_source |= {context: int(bits, 16) for context, bits in lines.items()}

    @property
    def failed(self) -> list[str]:
        return [name for name, test in self.tests.items() if not test["passed"]]

    def reaching(self, file: str, line: int) -> list[str]:
        """Tests that passed and reach a line's statement.

        Those that reach any line of the file, where it is carried out on import, and where coverage saw none:
        it does not see processes that are killed.
        """
        found = statement((self.root / file).read_text(encoding="utf-8"), line)
        of_statement = (1 << found.last + 1) - (1 << found.first)
        lines = self._lines.get(file, {})
        for mask in ([] if found.imported else [of_statement]) + [-1]:
            contexts = [context for context, bits in lines.items() if bits & mask]
            names = {name for context in contexts for name in self.users.get(context, [])}
            if reaching := [name for name in names if self.tests[name]["passed"]]:
                return sorted(reaching)
        return []

    def on_library(self) -> list[str]:
        """Tests of the operations on the kernels of csrc/cpu."""
        ops = [name for name in self.tests if name.startswith("tests/dgs_kernels/ops/")]
        return [name for name in ops if "cpu-cpu" in name and self.tests[name]["passed"]]

    def limit(self, name: str) -> float:
        """Seconds after which a test hangs: many times those noted, and its fixtures', on a busy machine."""
        return 60 + 10 * (
            self.tests[name]["seconds"] + sum(self.fixtures.get(f, 0) for f in self.tests[name]["fixtures"])
        )

    def stages(self, file: str, names: Iterable[str]) -> list[list[str]]:
        """Tests in the order in which to try them: those of the file's name, of its folder, then the others.

        Files are not mixed, for their fixtures' sake: quick ones come first, and in each the quick tests.
        """
        source = Path(file)
        folder = str(source.parent).removeprefix("python/").replace("dgs_kernels/triton", "dgs_kernels/ops")
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(name.partition("::")[0], []).append(name)
        by_stage: list[list[list[str]]] = [[], [], []]
        for path, tests in files.items():
            near = f"tests/{folder}" == str(Path(path).parent)
            same = Path(path).stem == f"test_{source.stem}"
            tests.sort(key=lambda name: self.tests[name]["seconds"])
            by_stage[0 if same else 1 if near else 2].append(tests)
        for stage in by_stage:
            stage.sort(key=lambda tests: sum(self.tests[name]["seconds"] for name in tests))
        return [[name for tests in stage for name in tests] for stage in by_stage if stage]
