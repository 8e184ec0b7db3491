"""The CUDA kernels built for the CPU (csrc/host_shim) with sanitizers on, and Python with it loaded.

`python -m tests.csrc.host_library -k project` builds it and runs the chosen cases of `cuda_on_host`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++")
FLAGS = [
    "-std=c++17",
    # -O1 compiles twice as long, for cases that run a sixth faster.
    "-Og",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def build() -> Path:
    """The shared library; an object is compiled again only when its source or a header has changed.

    Of two processes that want the same, one compiles it.
    """
    assert COMPILER
    sources = sorted(CSRC.glob("cuda/*.cu")) + sorted(CSRC.glob("host_shim/*.cpp"))
    headers = [p.read_bytes() for p in sorted(CSRC.rglob("*")) if p.suffix in (".cuh", ".h")]
    common = b"".join([*headers, " ".join(FLAGS).encode()])
    folder = ROOT / "build" / "cuda_on_host"
    folder.mkdir(parents=True, exist_ok=True)

    def make(target: Path, *arguments: str) -> Path:
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                subprocess.run([COMPILER, *FLAGS, *arguments, "-o", f"{target}.part"], check=True)
                os.replace(f"{target}.part", target)
        return target

    def compiled(source: Path) -> Path:
        key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        return make(target, f"-I{CSRC / 'host_shim'}", "-x", "c++", "-c", str(source))

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    key = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    return make(folder / f"libdgs_cuda_on_host-{key}.so", "-shared", *objects)


def run(library: Path, *command: str) -> subprocess.CompletedProcess:
    """Python with the sanitizer's runtime loaded before everything else, as it has to be."""
    assert COMPILER
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "DGS_CUDA_ON_HOST": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        # Python keeps memory until it ends, which is no leak.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_cases(library: Path, *selection: str) -> subprocess.CompletedProcess:
    cases = sorted(map(str, (ROOT / "tests" / "csrc" / "cuda_on_host").glob("[!_]*.py")))
    return run(library, "-m", "pytest", "-x", "-p", "no:cacheprovider", *cases, *selection)


if __name__ == "__main__":
    done = run_cases(build(), *sys.argv[1:])
    print(done.stdout)
    sys.exit(done.returncode)
