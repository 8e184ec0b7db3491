"""Launches of every CUDA kernel as the launchers make them, recorded in the host shim.

`record(library)` gives, for each, its kernel, grid, block, cluster and shared memory, the bytes of its
parameters, and which of these point to memory. They are not run: `cuda_on_host`, whose cases these are, does
that.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

from tests.csrc.host_library import run

# These kernels run, since the launches of others depend on what they write.
MAKE_TABLES = (
    "write_piece",
    "cut_tensors",
)
# No table has more bytes than this.
LARGEST_TABLE = 1 << 16
NM = shutil.which("nm")


def record(library: Path) -> list[dict]:
    """The launches of all cases, in order."""
    done = run(library, "-m", "tests.csrc.launches")
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def kernel_name(mangled: str) -> str:
    """A kernel's mangled name without the anonymous namespace, which every compiler calls its own way."""
    outer, rest = mangled[: len("_ZN3dgs4cuda")], mangled[len("_ZN3dgs4cuda") :]
    assert outer == "_ZN3dgs4cuda", mangled
    length = re.match(r"\d+", rest)
    assert length
    return rest[length.end() + int(length[0]) :]


def base_name(kernel: str) -> str:
    """`rows_in_registers` of `17rows_in_registersIfLb1EEEvNS1_4RowsE`."""
    length = re.match(r"\d+", kernel)
    assert length
    return kernel[length.end() :][: int(length[0])]


def cases():
    """Every path that a launcher can choose, in a launch with a tail: its name, kernels, and a call."""
    import torch

    from tests.csrc.cuda_on_host import host
    from tests.csrc.cuda_on_host.adamw import adamw_case
    from tests.csrc.cuda_on_host.entropy import spectral_entropy_case
    from tests.csrc.cuda_on_host.heads import surgery_head_case
    from tests.csrc.cuda_on_host.lists import project_align_list_case
    from tests.csrc.cuda_on_host.objectives import objectives_case
    from tests.csrc.cuda_on_host.rows import project_align_case

    f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
    without = without_clusters(host)
    rows = partial(project_align_case, order="align_first", rule="positive", aligned=True)
    plain = partial(project_align_case, order="project_first", rule="conflict", aligned=False)
    in_registers = "rows_in_registers"
    # A pack per thread where there are few rows, all that fits where there are many.
    yield "8 threads per row, a pack each", in_registers, partial(rows, f32, 130, 20)
    yield "6 warps per row, a pack each", in_registers, partial(rows, f32, 5, 764)
    yield "a thread per row, wide", in_registers, partial(rows, f32, 16931, 20)
    yield "a thread per row", in_registers, partial(rows, f32, 130, 13)
    yield "2 threads per row", in_registers, partial(rows, bf16, 67, 31)
    yield "a warp per row, wide", in_registers, partial(rows, f32, 707, 764)
    yield "a warp per row", in_registers, partial(rows, f64, 5, 131)
    yield "2 warps per row, wide", in_registers, partial(rows, f32, 265, 2044)
    yield "2 warps per row", in_registers, partial(rows, f32, 2, 1023)
    yield "3 warps per row, wide", in_registers, partial(rows, f32, 1, 3000)
    yield "512 threads per row, wide", in_registers, partial(rows, f32, 1, 16380)
    yield "512 threads per row", in_registers, partial(rows, bf16, 1, 8191)
    yield "a cluster of 2 per row, wide", in_registers, partial(rows, bf16, 1, 16392)
    yield "a cluster of 2 per row", in_registers, partial(rows, f64, 1, 4099)
    yield "in parts, wide", "sum_row_parts project_row_parts", partial(without, rows, f32, 1, 20000)
    yield "in parts", "sum_row_parts project_row_parts", partial(without, rows, f32, 1, 10001)
    yield "nothing to align with", in_registers, partial(plain, f32, 5, 36)

    head = surgery_head_case
    more = dict(expert=True, distillation=0.3)
    forward_and_backward = "head_rows head_backward"
    yield "4 rows at a time, a warp each, staged", "head_rows", partial(head, f32, 1057, 260)
    yield "212 chunks", "head_sum_chunks", partial(head, f32, 1057, 4)
    yield "4 rows at a time, a warp each", forward_and_backward, partial(head, f32, 1057, 3)
    yield "a row of 2 warps, staged", forward_and_backward, partial(head, f32, 529, 772)
    yield "a row of 4 warps, staged", "head_rows", partial(head, bf16, 3, 1544)
    yield "a row of 8 warps, wide", forward_and_backward, partial(head, f32, 3, 3076)
    yield "a row of 2 warps", forward_and_backward, partial(head, f32, 529, 259, **more)
    yield "longer rows", "head_read_twice", partial(head, f32, 3, 2049)
    yield "no text", forward_and_backward, partial(head, f32, 5, 4, with_text=False)

    entropy, planar = spectral_entropy_case, torch.contiguous_format
    yield "bytes, wide", "patch_entropy", partial(entropy, torch.uint8, planar, 2, 100, 64, 0)
    yield "bytes", "patch_entropy", partial(entropy, torch.uint8, planar, 1, 64, 97, 1)
    yield "floats, wide", "patch_entropy", partial(entropy, f32, planar, 1, 64, 96, 0)
    yield "floats, interleaved", "patch_entropy", partial(entropy, f32, torch.channels_last, 1, 64, 97, 0)

    lists, adamw = project_align_list_case, adamw_case
    wide, odd = [1000, 32], [103, 32]
    for kernel, operation in (("project_chunks", lists), ("adamw_chunks", adamw)):
        yield "a block per layer, wide", kernel, partial(operation, wide, [0, 1], f32, launched=1)
        yield "a block per layer", kernel, partial(operation, odd, [0, 1], bf16, launched=1)
        yield "a cluster of 2 per layer, wide", kernel, partial(operation, wide, [0, 0], f32, launched=1)
        yield "a cluster of 2 per layer", kernel, partial(operation, odd, [0, 0], f64, launched=1)
        three = (
            kernel if operation is adamw else f"write_piece cut_tensors chunk_sums add_chunk_sums {kernel}"
        )
        # A layer without numbers has no block that could add up its sums.
        empty = ([*wide, 0], [0, 0, 1])
        yield "sums first, wide", three, partial(without, operation, *empty, f32, launched=3)
        sums = "" if operation is adamw else "chunk_sums"
        yield "sums first", f"{sums} {kernel}", partial(without, operation, odd, [0, 0], bf16, launched=2)
    for name, sizes, dtype in (("in turns, wide", [*wide, 64], f32), ("in turns", [*odd, 64], bf16)):
        yield name, "project_chunks", partial(in_turns(host), lists, sizes, [0, 0, 1], dtype, launched=3)
    steps = dict(steps=(2, 3), maximize=True)
    yield "other steps for each", "adamw_chunks", partial(adamw, odd, [0, 1], f32, launched=2, **steps)

    objectives = objectives_case
    both = "chunk_products combine_chunks"
    yield "2 objectives, wide", f"{both} add_chunk_products", partial(objectives, 2, wide, [0, 1], f32)
    yield "2 objectives", both, partial(objectives, 2, odd, [0, 1], bf16, in_place=True)
    for count in (3, 5, 9):
        kernels = both if count == 3 else "chunk_products"
        yield f"{count} objectives, wide", kernels, partial(objectives, count, [32], [0], f32)
        yield f"{count} objectives", "chunk_products", partial(objectives, count, [31], [0], f32)


def without_clusters(host):
    def run(call, *arguments, **options):
        host.LIBRARY.shim_set_largest_cluster(1)
        call(*arguments, **options)
        host.LIBRARY.shim_set_largest_cluster(16)

    return run


def in_turns(host):
    """With a cache in which no two layers have room together."""

    def run(call, *arguments, **options):
        host.LIBRARY.shim_set_cache_bytes(1)
        without_clusters(host)(call, *arguments, **options)
        host.LIBRARY.shim_set_cache_bytes(host.CACHE_BYTES)

    return run


def main() -> None:
    from tests.csrc.cuda_on_host import host

    # The sanitizer's library is in here too, and it knows every piece of memory.
    runtime = ctypes.CDLL(None)

    def memory_of(word: int) -> tuple[int, int] | None:
        """The piece of memory that an address lies in, as its address and size; None: it is no address.

        What fills up a structure may look like one, and then of memory that is no longer there.
        """
        # No program has memory at such an address.
        if word >> 44 not in range(1, 8):
            return None
        name = ctypes.create_string_buffer(8)
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        locate = runtime.__asan_locate_address
        locate.restype = ctypes.c_char_p
        kind = locate(ctypes.c_void_p(word), name, 8, ctypes.byref(base), ctypes.byref(size))
        there = kind == b"heap" and base.value and not runtime.__asan_address_is_poisoned(base)
        return (base.value, size.value) if there else None

    def words(data: bytes) -> tuple[int, ...]:
        return struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])

    listed = subprocess.run([NM, host.LIBRARY._name], capture_output=True, text=True, check=True).stdout
    symbols = {name: int(address, 16) for address, name in re.findall(r"^(\w+) \w (\S+)$", listed, re.M)}
    loaded_at = ctypes.cast(host.LIBRARY.shim_on_launch, ctypes.c_void_p).value - symbols["shim_on_launch"]
    kernels = {loaded_at + at: name for name, at in symbols.items() if "GLOBAL__N_1" in name}
    found = []

    @host.ON_LAUNCH
    def on_launch(pointer):
        launch = pointer.contents
        kernel = kernel_name(kernels[launch.kernel])
        name = base_name(kernel)
        if name not in wanted:
            return name in MAKE_TABLES
        wanted.remove(name)
        params = ctypes.string_at(launch.params, launch.params_bytes)
        memory = {word: piece for word in words(params) if (piece := memory_of(word))}
        tables = {}
        for base, size in {*memory.values()}:
            held = ctypes.string_at(base, min(size, LARGEST_TABLE))
            inside = {word: piece for word in words(held) if (piece := memory_of(word))}
            # Memory that holds addresses is a table.
            if inside:
                tables[base] = held.hex()
                memory |= inside
        found.append(
            dict(
                path=path,
                kernel=kernel,
                **{name: getattr(launch, name) for name in ("grid", "threads", "cluster", "shared")},
                params=params.hex(),
                tables=list(tables.items()),
                memory=list(memory.items()),
            )
        )
        return name in MAKE_TABLES

    host.LIBRARY.shim_on_launch(on_launch)
    # There are no results to check.
    host.check = host.check_equal = lambda *_, **__: None
    for path, names, call in cases():
        wanted = {*names.split()}
        call()
        assert not wanted, f"{path}: {wanted} not launched"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
