"""Faults planted one at a time in a copy of the project, to see which of them its tests notice.

`python tests/mutants/run.py` applies each fault of mutants.yaml, runs the tests that should notice it and
writes outcome.md. Words given choose faults whose file contains one of them; the others' lines stay.

A fault of Python is tried in a fork of a process that has the large packages imported already. One of native
code is built first: `cmake OPERATION` runs a test of csrc/tests, `host -k WORD` cases of
tests/csrc/cuda_on_host.py.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CMAKE_FLAGS = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")
LIMIT = 300  # seconds: a fault that lets tests hang is noticed, too
PACKAGES = "torch triton numpy pytest hypothesis accelerate open_clip peft safetensors.torch sklearn.metrics"
PACKAGES += " torchvision transformers matplotlib.pyplot jsonargparse"


def copy(to: Path) -> None:
    """What git knows or would, and what was built in place."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    built = [str(p.relative_to(ROOT)) for p in (ROOT / "dgs_kernels").glob("*.so")]
    for name in [*listed.splitlines(), *built]:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def pytest_in_fork(arguments: list[str], root: Path) -> None:
    """Runs in the child, which takes the copy's packages for those that are installed."""
    os.chdir(root)
    paths = [str(root), str(root / "python")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    options = ["-x", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--durations=0"]
    code = pytest.main([*options, *arguments])
    sys.stdout.flush()
    os._exit(code)


def passes(selection: str, root: Path) -> bool:
    """Whether the tests pass; a RuntimeError where they could not be run."""
    kind, *arguments = shlex.split(selection)
    if kind == "pytest":
        process = multiprocessing.get_context("fork").Process(target=pytest_in_fork, args=(arguments, root))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return False
        if process.exitcode not in (0, 1) and process.exitcode >= 0:
            raise RuntimeError((root / "log").read_text()[-3000:])
        return process.exitcode == 0
    if kind == "host":
        built = native(root, sys.executable, "-c", "from tests.csrc.host_library import build; build()")
        steps = [[sys.executable, "-m", "tests.csrc.host_library", *arguments]]
    else:
        target, folder = f"{arguments[0]}_dgs_cpu_baseline", str(root / "build/cmake")
        native(root, "cmake", "-G", "Ninja", "-S", ".", "-B", folder, *CMAKE_FLAGS)
        built = native(root, "cmake", "--build", folder, "--target", target)
        steps = [[f"{folder}/{target}"]]
    if built:
        raise RuntimeError((root / "log").read_text()[-3000:])
    return all(native(root, *step) == 0 for step in steps)


def native(root: Path, *command: str) -> int:
    with open(root / "log", "w") as log:
        try:
            done = subprocess.run(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT)
            return done.returncode
        except subprocess.TimeoutExpired:
            return 1


def outcome(mutant: dict, root: Path) -> str:
    path = root / mutant["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(mutant["old"]) != 1:
        return f"not applied: its text is there {text.count(mutant['old'])} times"
    path.write_text(text.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        return "survived" if passes(mutant["tests"], root) else "killed"
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return "not run: it does not build or load"
    finally:
        path.write_text(text, encoding="utf-8")


def read_table(path: Path) -> dict[str, str]:
    """The lines of an earlier outcome, by their first two columns."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [line for line in lines if line.startswith("| `")]
    return {row.rpartition(" | ")[0].rpartition(" | ")[0]: row for row in rows}


def shown(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'") or "(nothing)"


def write_table(path: Path, mutants: list[dict], rows: dict[str, str]) -> None:
    lines = [rows[m["key"]] for m in mutants if m["key"] in rows]
    killed = sum(" | killed | " in line for line in lines)
    head = f"""# Mutants

`make mutants` planted {len(lines)} of {len(mutants)} faults; {killed} were killed, that is
noticed by the tests named with them in `mutants.yaml`.

| file | text | instead of it | outcome | seconds |
| --- | --- | --- | --- | --- |
"""
    path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> list[dict]:
    """The list's faults, each with the tests of its group and the columns that name it."""
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    mutants = [{"tests": group["tests"], **mutant} for group in groups for mutant in group["mutants"]]
    for m in mutants:
        m["key"] = f"| `{m['file']}` | `{shown(m['old'])}` | `{shown(m['new'])}`"
    return mutants


def main(words: list[str]) -> int:
    listed = Path(words.pop(0)) if words and words[0].endswith(".yaml") else HERE / "mutants.yaml"
    table = listed.with_name("outcome.md")
    mutants = load(listed)
    rows = read_table(table)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # A file's bytecode is told by its size and the second it was written in, as two faults' may be alike.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    for name in PACKAGES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    intact: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # tests that become another user read it, too
        copy(root)
        for m in mutants:
            if words and not any(word in m["file"] for word in words):
                continue
            if m["tests"] not in intact:
                intact[m["tests"]] = passes(m["tests"], root)
                if not intact[m["tests"]]:
                    print((root / "log").read_text()[-3000:])
            begin = time.monotonic()
            found = outcome(m, root) if intact[m["tests"]] else "not run: its tests fail without it"
            rows[m["key"]] = f"{m['key']} | {found} | {time.monotonic() - begin:.0f} |"
            print(rows[m["key"]], flush=True)
            write_table(table, mutants, rows)
    return 0 if all(" | killed | " in rows.get(m["key"], "") for m in mutants) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
