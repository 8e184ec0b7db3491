"""Notes every way in which the suite launches a Triton kernel: what the compiler would be given on a GPU.

In Triton's interpreter no kernel is compiled, so it hides whatever the compiler refuses. `noted()` is a
context in which each launch leaves a file that says kernel, types, constants and what Triton assumes of the
arguments; `python -m tests.support.triton_launches FILE...` compiles what the files say, for GPUs that are
not here, and prints one JSON line for each.

A launch that has been compiled need not be again, of the same kernels by the same Triton: those are recorded.
`python -m tests.support.triton_launches` compiles all that are noted and writes the record.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

import dgs_kernels.reference
import dgs_kernels.triton

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(dgs_kernels.triton.__file__).parent
CAPABILITIES = (80, 90)
RECORD = ROOT / "tests" / "dgs_kernels" / "ops" / "compiled_launches.json"
PROCESSES = 2
UNSPECIALIZED = ("do_not_specialize", "do_not_specialize_on_alignment")


@functools.cache
def kernels_hash() -> str:
    """Of the kernels and the constants that they take, not of what launches them: launches say that."""
    files = [*sorted(KERNELS.glob("*.py")), Path(dgs_kernels.reference.__file__)]
    return hash_of({file.stem: file.read_text() for file in files})


def hash_of(sources: dict[str, str]) -> str:
    kept = [
        (name, ast.dump(node))
        for name, source in sources.items()
        for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        or (isinstance(node, ast.FunctionDef) and "jit" in "".join(map(ast.unparse, node.decorator_list)))
    ]
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]


def noted_files() -> list[str]:
    return sorted(map(str, folder().glob("*.json")))


def folder() -> Path:
    """Where the launches of the kernels as they stand are noted."""
    return ROOT / "build" / f"triton_launches-{kernels_hash()}"


def made_with() -> dict:
    """All that decides, for one launch, whether it compiles."""
    python = ".".join(map(str, sys.version_info[:2]))
    versions = {"triton": triton.__version__, "python": python}
    return {"kernels": kernels_hash(), "capabilities": list(CAPABILITIES), **versions}


def recorded() -> set[str]:
    """Names of the launches that are known to compile, as the kernels and Triton are here."""
    record = json.loads(RECORD.read_text())
    return set(record["launches"]) if record["made_with"] == made_with() else set()


@functools.cache
def _compiler_side(fn, **options):
    """The kernel as Triton has it where it compiles, and its function that sorts arguments."""
    kernel = JITFunction(fn, **options)
    backend = make_backend(GPUTarget("cuda", CAPABILITIES[-1], 32))
    return kernel, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _launch(interpreted: InterpretedFunction, args: tuple, kwargs: dict) -> dict:
    fn = interpreted.fn
    kernel, backend, sort = _compiler_side(
        fn, **{name: tuple(interpreted.kwargs.get(name) or ()) for name in UNSPECIALIZED}
    )
    bound, specialization, options = sort(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return {
        "module": fn.__module__,
        "kernel": fn.__name__,
        "signature": signature,
        "constants": [[place, _encoded(value)] for place, value in constants.items()],
        "attributes": list(attributes.items()),
        "options": {"num_warps": kwargs.get("num_warps", 4)},
    }


def _encoded(value: object) -> object:
    value = value.value if isinstance(value, tl.constexpr) else value
    return {"dtype": value.name} if isinstance(value, tl.dtype) else value


def _decoded(value: object) -> object:
    return tl.dtype(value["dtype"]) if isinstance(value, dict) else value


@contextlib.contextmanager
def noted() -> Iterator[None]:
    run, seen, into = InterpretedFunction.run, set(), folder()
    into.mkdir(parents=True, exist_ok=True)

    def noting(self, *args, grid, warmup, **kwargs):
        if self.fn.__module__.startswith("dgs_kernels."):
            text = json.dumps(_launch(self, args, kwargs))
            if text not in seen:
                seen.add(text)
                name = hashlib.sha256(text.encode()).hexdigest()[:16]
                (into / f"{name}.{os.getpid()}").write_text(text)
                (into / f"{name}.{os.getpid()}").replace(into / f"{name}.json")
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noting
    try:
        yield
    finally:
        InterpretedFunction.run = run


def where_triton_compiles(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a module for what it prints, in a process whose Triton does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def in_processes(function: Callable, tasks: Iterable) -> Iterator:
    """The function's results, from processes that take a task whenever they are free.

    They are copies of this one, with all that it has imported. If one dies, this raises.
    """
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, tasks)


def compile_for(launch: dict, capability: int) -> None:
    source = ASTSource(
        fn=getattr(importlib.import_module(launch["module"]), launch["kernel"]),
        signature=launch["signature"],
        constexprs={tuple(place): _decoded(value) for place, value in launch["constants"]},
        # Without those that say nothing: Triton's cache then knows what machine_code.py compiles alike.
        attrs={tuple(place): attributes for place, attributes in launch["attributes"] if attributes},
    )
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch["options"])


def outcome(file: str) -> dict:
    """A launch, what went wrong in compiling it, if anything did, and the seconds it took."""
    launch, error, before = json.loads(Path(file).read_text()), None, os.times()
    try:
        for capability in CAPABILITIES:
            compile_for(launch, capability)
    except Exception as problem:
        error = f"sm_{capability}: {problem!r}"
    # The times include ptxas, which is a process of its own.
    seconds = sum(os.times()[:4]) - sum(before[:4])
    return {"launch": launch, "error": error, "seconds": seconds}


if __name__ == "__main__":
    files, compiled = sys.argv[1:] or noted_files(), []
    for file, found in zip(files, in_processes(outcome, files)):
        print(json.dumps(found), flush=True)
        compiled += [] if found["error"] else [Path(file).stem]
    if not sys.argv[1:]:
        RECORD.write_text(json.dumps({"made_with": made_with(), "launches": compiled}, indent=1) + "\n")
