"""Builds the CUDA kernels for the CPU (csrc/host_shim) with sanitizers on, and runs the cases of
`cuda_on_host.py` through them."""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which("g++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ to build the CUDA kernels for the CPU with")


@pytest.fixture(scope="module")
def library():
    """The shared library, built again only when a source has changed."""
    sources = sorted(CSRC.glob("cuda/*.cu")) + sorted(CSRC.glob("host_shim/*.cpp"))
    text = [p.read_bytes() for p in sorted(CSRC.rglob("*")) if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    key = hashlib.sha256(b"".join([*text, " ".join(FLAGS).encode()])).hexdigest()[:16]
    folder = ROOT / "build" / f"cuda_on_host-{key}"
    folder.mkdir(parents=True, exist_ok=True)

    def build(source):
        target = folder / f"{source.stem}.o"
        if not target.exists():
            command = [COMPILER, *FLAGS, f"-I{CSRC / 'host_shim'}", "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", f"{target}.part"], check=True)
            os.replace(f"{target}.part", target)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    target = folder / "libdgs_cuda_on_host.so"
    subprocess.run([COMPILER, *FLAGS, "-shared", *objects, "-o", str(target)], check=True)
    return target


def run(library, *command):
    """Python with the sanitizer's runtime loaded before everything else, as it has to be."""
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "DGS_CUDA_ON_HOST": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python keeps memory to the end
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


def test_kernels_agree_with_the_reference(library):
    done = run(library, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/csrc/cuda_on_host.py")
    assert done.returncode == 0, done.stdout[-6000:]


def test_sanitizer_sees_a_write_past_the_end(library):
    """The guard itself: a result that is one row too short must stop the run."""
    done = run(
        library,
        "-c",
        "import torch; from tests.csrc.cuda_on_host import project_align;"
        "x = torch.ones(3, 5); short = torch.empty(2, 5);"
        "project_align(x, x, None, alignment=1.0, scale=None, order='align_first', rule='full', out=short)",
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout[-2000:]
