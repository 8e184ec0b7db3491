"""Build script: the Python packages, and the native library dgs_kernels/_native.abi3.so where compilers are.

The library speaks libtorch's stable ABI and Python's limited one: one binary serves torch 2.10 and newer and
Python 3.10 and newer. No kernel includes headers of theirs, only csrc/torch/ does, so torch's own build tools
(which insist on a matching compiler and CUDA version) are not needed: a few compiler calls do it all.

Environment: DGS_KERNELS_BUILD=auto|cpu|cuda|none (default auto: what the compilers found can build), CXX,
CXXFLAGS, CUDACXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST (as in torch, e.g. "8.0;9.0+PTX").
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
# No -march: csrc/cpu/simd.h compiles each kernel for several instruction sets. No -ffast-math: NaN stays NaN.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
# The sources do not need C++20, whose headers are longer.
NVCC_FLAGS = ["-std=c++17", "-O3"]
# The library needs PyTorch 2.10.
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX;10.0"
PYTHON_HEADERS = Path(sysconfig.get_paths()["include"])


def say(line: str) -> None:
    print(f"dgs-kernels: {line}", file=sys.stderr)


def find_torch() -> Path | None:
    """torch's folder, if it has the stable ABI; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/c/shim.h").exists() else None


def find_cxx() -> list[str] | None:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([cxx] for cxx in ("c++", "g++", "clang++") if shutil.which(cxx)), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for nvcc in candidates if nvcc and (found := shutil.which(nvcc))), None)


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [
            f"{command[0]} failed"
        ]
        say(f"{shlex.join(command)}\n{done.stderr}")
        raise CompileError(errors[0])
    return done.stdout + done.stderr


def cuda_library_flags(nvcc: str) -> list[str]:
    """Where nvcc links the CUDA runtime from: it may be a link or a script; its own location says nothing."""
    plan = output([nvcc, "--dryrun", "-x", "cu", os.devnull])
    return shlex.split(re.search(r"LIBRARIES=(.*)", plan).group(1))


def architecture_flags(nvcc: str) -> list[str]:
    """`-gencode` flags for TORCH_CUDA_ARCH_LIST, or for those of our own list that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = output([nvcc, "--list-gpu-code"]).split()
    flags = []
    for entry in re.split(r"[;\s]+", (asked or CUDA_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not match:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got {entry!r}"
            )
        number = match[1] + match[2]
        if not asked and f"sm_{number}" not in known:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan() -> tuple[str | None, str | None]:
    """(compiler of C++, compiler of CUDA) to use, each None if not; says why in one line."""
    mode = os.environ.get("DGS_KERNELS_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"dgs-kernels: DGS_KERNELS_BUILD={mode}: expected auto, cpu, cuda or none")
    torch, cxx, nvcc = find_torch(), find_cxx(), find_nvcc()
    obstacle = None
    if mode == "none":
        obstacle = "DGS_KERNELS_BUILD=none"
    elif not sys.platform.startswith("linux"):
        obstacle = f"the native library is built on Linux only, not on {sys.platform}"
    elif torch is None:
        obstacle = "no torch 2.10 or newer where this build runs (pip --no-build-isolation builds with yours)"
    elif cxx is None:
        obstacle = "no C++ compiler on the PATH (install g++, or set CXX)"
    elif not (PYTHON_HEADERS / "Python.h").exists():
        obstacle = f"no Python.h in {PYTHON_HEADERS} (install python3-dev)"
    elif nvcc is None and mode == "cuda":
        obstacle = "no CUDA compiler (put nvcc on the PATH, or set CUDA_HOME)"
    if obstacle and mode in ("cpu", "cuda"):
        sys.exit(f"dgs-kernels: DGS_KERNELS_BUILD={mode}: {obstacle}")
    if obstacle:
        say(f"pure Python: {obstacle}")
        return None, None
    if nvcc is None:
        say("native CPU kernels; no CUDA kernels: no CUDA compiler found")
    elif mode == "cpu":
        nvcc = None
        say("native CPU kernels (DGS_KERNELS_BUILD=cpu)")
    else:
        say(f"native CPU and CUDA kernels; CUDA compiler {nvcc}")
    return cxx, nvcc


class BuildNative(build_ext):
    """Compiles csrc and links it to torch."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        target, temporary = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(parents=True, exist_ok=True)
        include = ["-isystem", f"{torch}/include"]
        flags = [*CXX_FLAGS, "-fPIC", *shlex.split(os.environ.get("CXXFLAGS", ""))]

        cuda = sorted(CSRC.glob("cuda/*.cu")) if NVCC else []
        commands = {}
        with_cuda = ["-DDGS_CUDA"] if cuda else []
        bindings = [*CXX, *flags, f"-I{CSRC}", *include, *with_cuda]
        commands[CSRC / "torch/runtime.cpp"] = [*bindings, *TORCH_FLAGS]
        commands[CSRC / "torch/module.cpp"] = [*bindings, "-isystem", str(PYTHON_HEADERS)]
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            commands[source] = [*CXX, *flags]
        for source in cuda:
            commands[source] = [
                NVCC,
                *NVCC_FLAGS,
                *architecture_flags(NVCC),
                "-Xcompiler=-fPIC,-fvisibility=hidden",
            ]
        headers = b"".join(
            path.read_bytes() for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh")
        )

        def compiled(source: Path) -> str:
            """The object file: an earlier build's where nothing has changed that it was made from."""
            made_from = [shlex.join(commands[source]).encode(), headers, source.read_bytes()]
            name = f"{source.parent.name}_{source.name}"
            made = temporary / f"{name}-{hashlib.sha256(b''.join(made_from)).hexdigest()[:16]}.o"
            if self.force or not made.exists():
                for earlier in temporary.glob(f"{name}-*"):
                    earlier.unlink()
                output([*commands[source], "-c", str(source), "-o", f"{made}.part"])
                os.replace(f"{made}.part", made)
            return str(made)

        # What takes longest is begun first: no processor is left waiting for it in the end.
        by_time = sorted(commands, key=lambda source: (source.suffix != ".cu", -source.stat().st_size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, by_time))

        # libtorch.so needs libtorch_cuda.so where there is one, and not otherwise: through it alone, a binary
        # finds the CUDA symbols of a CUDA torch and loads in a CPU-only torch all the same.
        libraries = [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch"]
        if cuda:
            libraries += [*cuda_library_flags(NVCC), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        output([*CXX, "-shared", *objects, *libraries, "-o", str(target)])


CXX, NVCC = plan()
setup(
    packages=[*find_packages(include=["dgs_kernels*"]), *find_packages("python")],
    package_dir={"dgs_kernels": "dgs_kernels", "dgsnet": "python/dgsnet"},
    package_data={
        "dgs_kernels": ["py.typed"],
        "dgsnet": ["py.typed", "*/*.html", "*/*.md", "*/*.yaml", "builtin/*.json", "builtin/*.safetensors"],
    },
    cmdclass={"build_ext": BuildNative},
    # In auto mode a compiler that fails leaves a pure Python install, with its error printed.
    ext_modules=[
        Extension(
            "dgs_kernels._native",
            sources=[],
            depends=[str(path) for path in CSRC.rglob("*.*")],
            py_limited_api=True,
            optional=os.environ.get("DGS_KERNELS_BUILD", "auto") == "auto",
        )
    ]
    if CXX
    else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if CXX else {},
)
