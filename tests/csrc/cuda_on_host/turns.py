"""project_align_ on lists that take turns: no other bits, and what is touched before a second reading."""

import ctypes
from itertools import pairwise

import pytest
import torch

from tests.csrc.cuda_on_host.host import (
    AFTER_BLOCK,
    CACHE_BYTES,
    DTYPES,
    LIBRARY,
    NEW_STREAM,
    ON_LAUNCH,
    call,
    launches,
    order_of_threads,
    struct,
)
from tests.csrc.cuda_on_host.lists import MAKE_TABLES, List, make_list, tensor_list

# This fixture runs around every case.
__all__ = ["order_of_threads"]

# What the kernels are given (csrc/cuda/chunks.cuh).
ChunkedList = struct("""
    ptr: chunks group_begin partials
    i64: num_chunks max_group_chunks
    bool: aligned
    ptr: sums scale
    f64: alignment eps
    i32: order rule cluster
    i64: first_group end_group first_edited end_edited first_summed end_summed
    bool: added
""")
SURGERY = dict(alignment=0.2, order="align_first", rule="positive")
# A chunk holds this many numbers.
CHUNK = {dtype: 4096 if dtype == torch.float64 else 8192 for dtype in DTYPES}
# Chunks of each tensor; the last layer has no numbers.
CHUNKS, LAYERS = [1, 1, 0.5, 1, 1, 1, 0.25, 1, 0.5, 1, 0], [0, 0, 0, 1, 1, 1, 2, 3, 3, 4, 5]


def layers_of(dtype, odd=False):
    sizes = [int(chunks * CHUNK[dtype]) for chunks in CHUNKS]
    return [n - 1 if n and odd else n for n in sizes]


def run(columns, groups, cache_bytes, largest_cluster=1):
    """The sums and how many launches it took, after those that make the tables."""
    LIBRARY.shim_set_largest_cluster(largest_cluster)
    LIBRARY.shim_set_cache_bytes(cache_bytes)
    arguments, sums, _keep = tensor_list(columns, groups, **SURGERY)
    before = launches()
    call("project_align_", arguments, stream=NEW_STREAM())
    return sums, launches() - before - MAKE_TABLES


def columns_of(sizes, dtype):
    return dict(zip(("grad", "harmful", "beneficial"), make_list(sizes, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_turns_change_no_bit(dtype, odd):
    """Half of the cache has room for two and a half chunks' arrays: the second layer is larger."""
    sizes = layers_of(dtype, odd)
    cache_bytes = 2 * int(2.5 * 3 * CHUNK[dtype] * dtype.itemsize)
    once, in_turns = columns_of(sizes, dtype), columns_of(sizes, dtype)
    # The layer without numbers has a launch of its own, which adds up sums.
    want, launched = run(once, LAYERS, CACHE_BYTES)
    assert launched == 2 + 1
    # Turns of one, one, two and two layers.
    found, launched = run(in_turns, LAYERS, cache_bytes)
    assert launched == 4 + 1 + 1
    assert torch.equal(found, want)
    assert all(map(torch.equal, in_turns["grad"], once["grad"]))


def test_turns_in_a_captured_graph():
    """The same launches at every call, and nothing that outlives the graph."""
    LIBRARY.shim_set_largest_cluster(1)
    LIBRARY.shim_set_cache_bytes(1)
    tensors, stream = List([20000, 5, 7], [0, 0, 1]), NEW_STREAM()
    held = LIBRARY.c_allocations()
    LIBRARY.shim_set_capturing(True)
    assert [tensors.launches(stream) for _ in range(2)] == [MAKE_TABLES + 3] * 2
    assert LIBRARY.c_allocations() == held
    LIBRARY.shim_set_capturing(False)
    assert [tensors.launches(stream) for _ in range(2)] == [MAKE_TABLES + 3, 3]


class Chunks:
    """Which chunk every block has read, as seen from what it wrote: a sum of the chunk, or its gradient."""

    def __init__(self, columns):
        self.numbers = [t for t in columns["grad"] if t.numel()]
        # Each entry has the chunk's place and whether the block wrote to it, in the order of time.
        self.read = []
        self.partials = None

    def __enter__(self):
        self.callbacks = ON_LAUNCH(self.on_launch), AFTER_BLOCK(self.after_block)
        LIBRARY.shim_on_launch(self.callbacks[0])
        LIBRARY.shim_after_block(self.callbacks[1])
        return self

    def __exit__(self, *_):
        LIBRARY.shim_on_launch(ON_LAUNCH())
        LIBRARY.shim_after_block(AFTER_BLOCK())

    def on_launch(self, launch):
        if launch.contents.params_bytes == ctypes.sizeof(ChunkedList) and self.partials is None:
            given = ctypes.cast(launch.contents.params, ctypes.POINTER(ChunkedList)).contents
            count = given.num_chunks * 6
            self.partials = (ctypes.c_float * count).from_address(given.partials)
            self.before = self.look()
        return True

    def look(self):
        """One of each chunk's sums, and that of its gradient; every tensor here has one chunk at most."""
        sums = torch.frombuffer(self.partials, dtype=torch.float32)[2::6].clone()
        return sums, torch.stack([t.sum() for t in self.numbers])

    def after_block(self):
        if self.partials is None:
            return
        now = self.look()
        for written, (old, new) in enumerate(zip(self.before, now)):
            different = ~((old == new) | (old.isnan() & new.isnan()))
            self.read += [(place, bool(written)) for place in different.nonzero().flatten().tolist()]
        self.before = now


def bytes_between(read, sizes):
    """Of three arrays of fp32, what is touched from the first reading of each chunk to the second."""
    found = {}
    for second, (place, written) in enumerate(read):
        if written:
            first = read.index((place, False))
            found[place] = sum(
                12 * sizes[other] for other in {other for other, _ in read[first + 1 : second]}
            )
    return found


FORWARD = pytest.mark.parametrize("order_of_threads", ["forward"], indirect=True)


@FORWARD
@pytest.mark.parametrize("cached_chunks", [2, 3, 4.5])
def test_what_is_read_again_is_still_in_the_cache(cached_chunks):
    sizes = layers_of(torch.float32)
    columns = columns_of(sizes, torch.float32)
    turn = int(cached_chunks * 12 * CHUNK[torch.float32])
    with Chunks(columns) as chunks:
        run(columns, LAYERS, cache_bytes=2 * turn)
    sizes, layers = zip(*((n, layer) for n, layer in zip(sizes, LAYERS) if n))
    places = range(len(sizes))
    assert sorted(chunks.read) == [(place, written) for place in places for written in (False, True)]
    between = bytes_between(chunks.read, sizes)
    large = {layer for layer in layers if sum(12 * n for n, its in zip(sizes, layers) if its == layer) > turn}
    for place in places:
        assert layers[place] in large or between[place] <= turn, (place, between)
    # The end of a layer that is larger than the cache is there all the same.
    for layer in large:
        last = max(place for place in places if layers[place] == layer)
        assert between[last] == 0
    assert bool(large) == (cached_chunks < 3)


# ViT-L/14's tower: 303,966,208 numbers in 296 tensors, each a layer.
WIDTH = 1024
BLOCK = [3 * WIDTH**2, 3 * WIDTH, WIDTH**2, WIDTH, 4 * WIDTH**2, 4 * WIDTH, 4 * WIDTH**2, *[WIDTH] * 5]
TOWER = [588 * WIDTH, WIDTH, 257 * WIDTH, WIDTH, WIDTH, *BLOCK * 24, WIDTH, WIDTH, 768 * WIDTH]


def planned(dtype):
    """The launches for it, none of which is run: there is no memory behind its tensors."""
    found = []

    @ON_LAUNCH
    def on_launch(launch):
        if launch.contents.params_bytes == ctypes.sizeof(ChunkedList):
            copy = ctypes.string_at(launch.contents.params, launch.contents.params_bytes)
            found.append(ChunkedList.from_buffer_copy(copy))
        return False

    class Nowhere:
        def __init__(self, numbers, address):
            self.numel, self.data_ptr, self.dtype = lambda: numbers, lambda: address, dtype

    columns = {
        name: [Nowhere(n, (k << 40) + (i << 32)) for i, n in enumerate(TOWER)]
        for k, name in enumerate(("grad", "harmful", "beneficial"), 1)
    }
    LIBRARY.shim_on_launch(on_launch)
    try:
        run(columns, list(range(len(TOWER))), CACHE_BYTES)
    finally:
        LIBRARY.shim_on_launch(ON_LAUNCH())
    return found


@FORWARD
@pytest.mark.parametrize(
    ("dtype", "turns", "streams"),
    [(torch.float32, 145, (4.0, 5.2)), (torch.bfloat16, 74, (4.0, 4.0))],
    ids=str,
)
def test_turns_of_a_large_tower(dtype, turns, streams):
    """What docs/evidence.md predicts: launches; and streams, where all of the cache serves, or half of it."""
    assert sum(TOWER) == 303_966_208 and len(TOWER) == 296
    plan = planned(dtype)
    assert len(plan) == turns + 1
    for one, after in pairwise(plan):
        assert (one.first_summed, one.end_summed) == (after.first_edited, after.end_edited)
        assert after.first_edited < after.end_edited and not after.added
    found = []
    for cache in (CACHE_BYTES, CACHE_BYTES // 2):
        hits, layer = 0, 0
        for launch in plan[:-1]:
            numbers = sum(TOWER[launch.first_group : launch.end_group])
            read = 3 * numbers * dtype.itemsize
            assert read <= CACHE_BYTES // 2 or launch.end_group - launch.first_group == 1
            assert launch.first_group == layer
            hits, layer = hits + min(read, cache), launch.end_group
        assert layer == len(TOWER)
        found.append(round(7 - hits / (sum(TOWER) * dtype.itemsize), 1))
    assert tuple(found) == streams
