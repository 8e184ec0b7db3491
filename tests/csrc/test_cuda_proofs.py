"""Proves that the CUDA kernels are free of races and that their barriers match, in every schedule, from their
PTX in the library as it was built and the launches that their launchers make. Needs a build with CUDA, nvcc,
g++ and the verifier `sentryward`, but no GPU.

The table in docs/evidence.md lists every path that a launcher can choose, with a fingerprint of what was
proved: the PTX and the launch. The test makes both anew and compares, and repeats some of the proofs.

`python -m tests.csrc.test_cuda_proofs` proves what has changed, removes barriers in turn, and writes the
table anew; kernels that are named after it are proved in any case.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc import proofs
from tests.csrc.host_library import COMPILER, build
from tests.csrc.launches import NM, record
from tests.csrc.test_cuda_machine_code import dump, name_and_type, nvcc_version

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
HEADING = "| kernel | path | blocks and threads | barriers | proof |"
MADE_WITH = r"nvcc \d+\.\d+ and sentryward \d+\.\d+\.\d+"
# Of larger grids the first two blocks are looked at, or the first cluster.
MOST_THREADS = 1700

# Proofs that are repeated in every run of the tests: some of each kind.
QUICK = {
    ("rows_in_registers", "a thread per row, wide"),
    ("rows_in_registers", "a warp per row"),
    ("rows_in_registers", "2 warps per row, wide"),
    ("head_sum_chunks", "212 chunks"),
}

# Where each barrier is removed in turn, to see that the proof misses it.
REMOVALS = {
    ("rows_in_registers", "2 warps per row, wide"),
    ("rows_in_registers", "a cluster of 2 per row, wide"),
    ("sum_row_parts", "in parts, wide"),
    ("project_row_parts", "in parts, wide"),
    ("head_rows", "4 rows at a time, a warp each, staged"),
    ("head_rows", "a row of 2 warps, staged"),
    ("head_sum_chunks", "212 chunks"),
    ("head_read_twice", "longer rows"),
    ("head_backward", "a row of 2 warps"),
    ("patch_entropy", "floats, wide"),
    ("chunk_sums", "sums first, wide"),
    ("add_chunk_sums", "sums first, wide"),
    ("project_chunks", "a cluster of 2 per layer, wide"),
    ("project_chunks", "in turns, wide"),
    ("adamw_chunks", "a cluster of 2 per layer, wide"),
    ("chunk_products", "2 objectives, wide"),
    ("add_chunk_products", "2 objectives, wide"),
}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH"),
    pytest.mark.skipif(COMPILER is None or NM is None, reason="no g++ to record the launches with"),
    pytest.mark.skipif(importlib.util.find_spec("sentryward") is None, reason="no sentryward, the verifier"),
]


def made_with():
    return f"nvcc {nvcc_version()} and sentryward {importlib.metadata.version('sentryward')}"


def problems():
    """{(kernel, path): problem}: what there is to prove."""
    entries = {}
    # Each part of the dump belongs to one source file.
    for text in dump("--dump-ptx", "sm_90").split(".version ")[1:]:
        entries |= proofs.kernels(".version " + text.partition("\nFatbin ")[0])
    found = {}
    for launch in record(build()):
        if launch["grid"] * launch["threads"] > MOST_THREADS:
            launch["first"] = max(launch["cluster"], 2)
        kernel = entries[launch["kernel"]]
        name, _, _ = name_and_type(kernel.name)
        assert (name, launch["path"]) not in found
        found[name, launch["path"]] = proofs.problem(kernel, launch)
    return found


@pytest.fixture(scope="module")
def given():
    return problems()


def written_rows():
    """{(kernel, path): the other cells} of the table."""
    text = DOCUMENT.read_text()
    table = re.search(re.escape(HEADING) + r"\n(\|.*\n)+", text)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines()[2:]]
    return {(row[0].split("`")[1], row[1]): row for row in rows}


def row_of(key, problem, barriers, proved):
    name, path = key
    _, dtype, _ = name_and_type(problem.kernel)
    proof = f"`{problem.fingerprint()}`" if proved is True else proved
    return [f"`{name}`" + (f" {dtype}" if dtype else ""), path, problem.launch, barriers, proof]


def test_every_kernel_has_a_proof(given):
    """The table is of today's kernels and launches. Another compiler writes other PTX."""
    if made_with() not in DOCUMENT.read_text():
        pytest.skip("the table in docs/evidence.md was made with other releases of nvcc or sentryward")
    written = written_rows()
    for key, problem in given.items():
        row = written.get(key)
        again = "python -m tests.csrc.test_cuda_proofs proves it anew"
        assert row, f"{key} is not in the table; {again}"
        assert row == row_of(key, problem, row[3], True if row[4].startswith("`") else row[4]), again
    assert given.keys() == written.keys()
    unproved = {key for key, row in written.items() if not re.fullmatch("`[0-9a-f]{12}`", row[4])}
    assert all(re.fullmatch(r"not proved: [\w ;]+", written[key][4]) for key in unproved)
    kernels = {kernel for kernel, _ in given.keys() - unproved}
    sources = "".join(p.read_text() for p in DOCUMENT.parents[1].glob("csrc/cuda/*.cu"))
    assert kernels == set(
        re.findall(r"__global__ (?:__launch_bounds__\([^)]*\)\)? )?void (?:\w+ )?(\w+)\(", sources)
    )


@pytest.mark.parametrize("key", sorted(QUICK), ids=": ".join)
def test_proof_holds(given, key):
    found = proofs.verify(given[key])
    assert found["result"] == "race_free", found.get("diagnostics")


def test_missing_barrier_is_found(given):
    problem = given["rows_in_registers", "2 warps per row, wide"]
    (barrier,) = problem.barriers()
    assert proofs.verify(problem.without(barrier))["result"] == "potential_race"


@pytest.mark.parametrize(
    ("weight", "result"), [("w[0, k]", "verified"), ("w[0, 2 - k]", "equivalence_not_proven")]
)
def test_combine_is_its_formula(given, weight, result):
    """The sum of w_k x_k, in real arithmetic; with the weights in another order it is not."""
    problem = given["combine_chunks", "3 objectives, wide"]
    places = sorted((d["offset"], d["object"]) for d in problem.config["declarations"])
    w, out, *objectives = (name for _, name in places)
    inputs = {"w": (w, (1, 3))} | {name: (x, (32,)) for name, x in zip("abc", objectives)}
    formula = f"""
def reference(w, a, b, c):
    return sum({weight} * x for k, x in enumerate((a, b, c)))
"""
    found = proofs.verify(problem, formula, inputs, (out, (32,)))
    assert found["result"] == result, found.get("diagnostics")


def why(found):
    """In words, without the places of files that are gone by then."""
    said = (re.sub(r"\S*/\S*", "", said["message"]) for said in found.get("diagnostics") or ())
    words = (" ".join(re.findall(r"\w+", message)) for message in said)
    return "; ".join(dict.fromkeys(filter(None, words))) or f"the verifier says {found['result']} and no more"


@pytest.mark.parametrize(
    ("result", "message", "words"),
    [
        ("unsupported", "/tmp/a1/kernel.ptx:24: predicate is not known", "predicate is not known"),
        ("unsupported", "/tmp/a1/kernel.ptx", "the verifier says unsupported and no more"),
        ("undecided", None, "the verifier says undecided and no more"),
    ],
)
def test_what_is_not_proved_is_said_in_words(result, message, words):
    assert why({"result": result, "diagnostics": [{"message": message}] if message else None}) == words


def prove(job):
    key, problem = job
    found = proofs.verify(problem)
    if found["result"] != "race_free":
        return row_of(key, problem, "", f"not proved: {why(found)}")
    barriers = problem.barriers()
    text = "" if barriers else "none"
    if key in REMOVALS:
        useless = [b for b in barriers if proofs.verify(problem.without(b))["result"] == "race_free"]
        text = f"{len(barriers) - len(useless)} of {len(barriers)} needed"
    row = row_of(key, problem, text, True)
    print(row, flush=True)
    return row


def main(names):
    """Proves what is new or named."""
    written = written_rows()
    given = problems()
    chosen = {
        key: p
        for key, p in given.items()
        if (key[0] in names if names else f"`{p.fingerprint()}`" not in written.get(key, ()))
    }
    with ThreadPoolExecutor(2) as pool:
        for key, row in zip(chosen, pool.map(prove, chosen.items())):
            written[key] = row
            write([written[key] for key in sorted(written) if key in given])


def write(rows):
    lines = [HEADING, "|---" * 5 + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = DOCUMENT.read_text()
    old = re.search(re.escape(HEADING) + r"\n(\|.*\n)+", text)[0]
    text = text.replace(old, "\n".join(lines) + "\n")
    DOCUMENT.write_text(re.sub(MADE_WITH, made_with(), text))


if __name__ == "__main__":
    main(sys.argv[1:])
