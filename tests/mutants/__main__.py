"""`make mutants`: plants a sample of mutants and counts those that the tests notice.

Each is planted in a copy of the project, and the tests that reach its line run there until one fails. A line
for each goes to build/mutants/outcome.txt, the diffs of survivors to build/mutants/survivors.diff. A run that
was interrupted goes on where it was, as long as no file of the project changes.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants import reach
from tests.mutants.population import Equivalents, Mutant, draw

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "mutants"
# A build and a check may take so many seconds.
TO_BUILD, TO_CHECK = 600, 300
CMAKE = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DDGS_PYTHON=ON")
# Nothing that imports the project.
PACKAGES = """
accelerate docstring_parser fastapi httpx hypothesis joblib jsonargparse lightning matplotlib.pyplot numpy
onnx onnxruntime open_clip peft PIL.Image pyarrow.parquet pytest safetensors.torch scipy.stats skimage
sklearn.linear_model sklearn.metrics timm torch torch._dynamo torch.distributed.fsdp torch.testing
torch.utils.tensorboard torchvision transformers triton triton.runtime.interpreter webdataset yaml
"""


@dataclass
class Known:
    """What all workers have found out of the tests where nothing is planted."""

    map: reach.Reach
    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def copy(to: Path) -> None:
    """What git knows or would, and what was built in place; other users, whom tests become, may read it."""
    to.mkdir(mode=0o755)
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "dgs_kernels").glob("*.so")]
    for name in [*listed.splitlines(), *built]:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    # Bytecode that is told by its source's content, not by its size and the second in which it was written.
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([*command, "dgs_kernels", "python/dgsnet"], cwd=to, check=True)


class NoMutant(Exception):
    """The change of native code does not build, or builds the same library."""


class Worker:
    """A copy of the project, and a process that forks to run tests there."""

    def __init__(self, root: Path, known: Known, preload: str) -> None:
        self.root, self.known = root, known
        self.log = root.with_suffix(".log")
        self.library = next((root / "dgs_kernels").glob("*.so"), None)
        self.reference: bytes | None = None
        self.sound_natives: set[str] = set()
        self.environment = os.environ | {
            "DGS_KERNELS_BUILD": "cpu",
            "MUTANTS_LOG": str(self.log),
            "MUTANTS_TEMPORARY": str(root.with_suffix(".tmp")),
            "OMP_WAIT_POLICY": "passive",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (root, root / "python", root / "build/cmake"))),
            "TRITON_INTERPRET": "1",
        }
        self.server = subprocess.Popen(
            [sys.executable, root / "tests/mutants/forks.py", *preload.split()],
            cwd=root,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self.server.communicate()

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """("killed" or "survived", by what); raises NoMutant."""
        if not mutant.file.startswith("csrc/"):
            return self.of_tests(mutant, self.known.map.reaching(mutant.file, mutant.line))
        found = self.of_tests(mutant, self.known.map.on_library())
        return found if found[0] == "killed" else self.of_native_tests(mutant)

    def of_tests(self, mutant: Mutant, tests: list[str]) -> tuple[str, str]:
        """What tests say; one that fails without the mutant, or only behind other files', says nothing."""
        count = len(tests := [name for name in tests if name not in self.known.bad])
        while tests:
            stages = self.known.map.stages(mutant.file, tests)
            in_order = [name for stage in stages for name in stage]
            with self.planted(mutant):
                outcome, test = self.run(stages)
                if outcome == "passed":
                    return "survived", f"{count} tests"
                # A file that cannot be collected stands for its first test.
                place = next(i for i, name in enumerate(in_order) if name.startswith(test))
                first = test.partition("::")[0] == in_order[0].partition("::")[0]
                alone = first or self.run([[in_order[place]]])[0] != "passed"
            if not alone:
                say(f"fails behind other tests only: {test}")
            elif self.sound(in_order[place]):
                return "killed", f"by {test}{' (timeout)' * (outcome == 'timeout')}"
            tests = in_order[place + 1 :]
        return "survived", f"{count} tests" if count else "no test reaches it"

    def run(self, stages: list[list[str]]) -> tuple[str, str]:
        """("passed", "failed" or "timeout", the test at which it ended)."""
        limits = {name: self.known.map.limit(name) for stage in stages for name in stage}
        print(json.dumps({"stages": stages, "limits": limits}), file=self.server.stdin, flush=True)
        answer = json.loads(self.server.stdout.readline())
        return answer["outcome"], answer["test"]

    def sound(self, test: str) -> bool:
        """Whether a test passes without a mutant."""
        if test not in self.known.good:
            if self.run([[test]])[0] != "passed":
                self.known.bad.add(test)
                say(f"left out, fails without a mutant: {test}\n{self.tail()}")
                return False
            self.known.good.add(test)
        return True

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:] if self.log.exists() else ""

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        text = path.read_text(encoding="utf-8")
        native = mutant.file.startswith("csrc/")
        if native and self.reference is None:
            self.intact = self.library.read_bytes()
            self.reference = self.built()
            if not self.reference:
                raise RuntimeError(f"the library cannot be built\n{self.tail()}")
        path.write_text(mutant.text, encoding="utf-8")
        try:
            if native and self.built() in (None, self.reference):
                raise NoMutant
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            if native:
                self.library.write_bytes(self.intact)

    def built(self) -> bytes | None:
        built = self.call(TO_BUILD, sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        return self.library.read_bytes() if built else None

    def of_native_tests(self, mutant: Mutant) -> tuple[str, str]:
        """What the kernels' own tests in C++ say, and those of their NumPy module."""
        operation = Path(mutant.file).stem
        if operation not in self.sound_natives and (failed := self.failing(operation)):
            raise RuntimeError(f"{failed} fails without a mutant\n{self.tail()}")
        self.sound_natives.add(operation)
        with self.planted(mutant):
            failed = self.failing(operation)
        return ("killed", f"by {failed}") if failed else ("survived", "all tests of kernels on CPUs")

    def failing(self, operation: str) -> str | None:
        folder = self.root / "build/cmake"
        cmake = ("cmake", "-S", ".", "-B", folder, *CMAKE, f"-DPython_EXECUTABLE={sys.executable}")
        if not self.call(TO_BUILD, *cmake) or not self.call(TO_BUILD, "cmake", "--build", folder):
            raise NoMutant
        alone = (self.root / f"csrc/tests/{operation}.cpp").exists()
        ctest = ("ctest", "--test-dir", folder, "-R", f"^{operation}_dgs" if alone else "_dgs_cpu")
        if not self.call(TO_CHECK, *ctest):
            return "csrc/tests"
        pytest = ("-m", "pytest", "--noconftest", "-o", "addopts=", "-x", "-p", "no:cacheprovider")
        if not self.call(TO_CHECK, sys.executable, *pytest, "tests/csrc/numpy_module.py"):
            return "tests/csrc/numpy_module.py"
        return None

    def call(self, limit: float, *command: str | Path) -> bool:
        """Whether a command ends well, and in time."""
        with self.log.open("w") as log:
            options = {"cwd": self.root, "env": self.environment, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, start_new_session=True, **options)
            try:
                return process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return False


class Outcomes:
    """What came of mutants of one state of the project, also in former runs."""

    def __init__(self, root: Path) -> None:
        files = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        state = reach.digest(root, (file for file in files if not file.endswith((".so", ".pyc"))))
        path = OUT / f"outcomes-{state}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known = {tuple(key): found for key, found in map(json.loads, lines)}
        self.lines = path.open("a", encoding="utf-8")
        self.lock = threading.Lock()

    def find(self, mutant: Mutant, worker: Worker) -> tuple[str, str, float]:
        """("killed", "survived" or "none", by what, seconds)."""
        key = mutant.file, mutant.line, mutant.operator, mutant.before, mutant.after
        if key not in self.known:
            since = time.monotonic()
            try:
                outcome, by = worker.outcome(mutant)
            except NoMutant:
                outcome, by = "none", ""
            with self.lock:
                self.known[key] = outcome, by, time.monotonic() - since
                print(json.dumps((key, self.known[key])), file=self.lines, flush=True)
        return self.known[key]


class Tally:
    """Outcomes as they come: in files, on standard error, and counted by room."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines = (OUT / "outcome.txt").open("w", encoding="utf-8")
        self.diffs = (OUT / "survivors.diff").open("w", encoding="utf-8")
        self.counts: dict[str, Counter[str]] = {}
        self.lock = threading.Lock()

    def add(self, mutant: Mutant, outcome: str, by: str, seconds: float) -> None:
        with self.lock:
            self.counts.setdefault(mutant.room, Counter())[outcome] += 1
            place = f"{mutant.file}:{mutant.line}"
            line = f"{mutant.room}  {place}  {mutant.operator}  {outcome} {by}  {seconds:.0f} s"
            say(f"{sum(sum(c.values()) for c in self.counts.values())}: {line}")
            print(line, file=self.lines, flush=True)
            if outcome == "survived":
                old = (self.root / mutant.file).read_text(encoding="utf-8").splitlines()
                new = mutant.text.splitlines()
                diff = difflib.unified_diff(old, new, place, mutant.operator, n=3, lineterm="")
                print(f"{line}", *diff, "", sep="\n", file=self.diffs, flush=True)

    def total(self, outcome: str) -> int:
        return sum(counts[outcome] for counts in self.counts.values())

    def table(self) -> str:
        rows = ["| room | killed | of | equivalent |", "|---|---|---|---|"]
        for room, counts in sorted(self.counts.items()):
            tried = counts["killed"] + counts["survived"]
            rows.append(f"| `{room}` | {counts['killed']} | {tried} | {counts['equivalent']} |")
        return "\n".join(rows)


class Sample:
    """Mutants to try, for several workers; one of native code that is none is followed by the next."""

    def __init__(self, root: Path, count: int, seed: int, files: str) -> None:
        self.python, self.native, share = draw(root, files, seed)
        self.of_native = round(count * share)
        self.of_python = count - self.of_native
        self.lock = threading.Lock()

    def next(self) -> Mutant | None:
        with self.lock:
            for kind in ("of_native", "of_python"):
                if getattr(self, kind) and (mutant := next(getattr(self, kind.removeprefix("of_")), None)):
                    setattr(self, kind, getattr(self, kind) - 1)
                    return mutant
            return None

    def one_more(self) -> None:
        with self.lock:
            self.of_native += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=80, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--files", default="", help="only files whose path has one of these words in it")
    parser.add_argument("--workers", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--preload", default=PACKAGES, help="what tests need not import for each mutant anew")
    options = parser.parse_args()
    begin = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        # One stays as it is: the project may change meanwhile.
        intact, *roots = (Path(folder, f"tree{i}") for i in range(options.workers + 1))
        copy(intact)
        for root in roots:
            shutil.copytree(intact, root)
        # Of the project as it is, to which tests may add files.
        outcomes = Outcomes(intact)
        equivalents = Equivalents(intact / "tests/mutants/equivalent.yaml")
        for entry in equivalents.unmatched(intact):
            say(f"equivalent.yaml: no mutant of today's code: {entry}")
        known = Known(reach.make(intact, OUT / "reach"))
        say(f"the map of {len(known.map.tests)} tests after {time.monotonic() - begin:.0f} s")
        for name in known.map.failed:
            say(f"left out, fails without a mutant: {name}")
        sample, tally = Sample(intact, options.sample, options.seed, options.files), Tally(intact)
        workers = [Worker(root, known, options.preload) for root in roots]

        def work(worker: Worker) -> None:
            while mutant := sample.next():
                found = ("equivalent", "", 0.0) if mutant in equivalents else outcomes.find(mutant, worker)
                if found[0] == "none":
                    sample.one_more()
                else:
                    tally.add(mutant, *found)

        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(work, workers))
        for worker in workers:
            worker.close()
    say(f"{time.monotonic() - begin:.0f} s; one line for each in {OUT / 'outcome.txt'}")
    print(tally.table())
    killed, survived = tally.total("killed"), tally.total("survived")
    print(f"killed {killed} of {killed + survived} ({tally.total('equivalent')} equivalent)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        sys.exit(130)
