"""What the benchmarks' figures rest on: no call finds what it reads in the cache."""

import itertools
import json
import subprocess
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import harness


@pytest.mark.parametrize("cache", [2**22, 60 * 10**6])
@pytest.mark.parametrize("input_bytes", [3 * 2**10, 331_000, 37_700_000, 150_000_000])
@pytest.mark.parametrize("variants", range(1, 9))
def test_three_times_the_cache_is_read_between_two_uses_of_a_set(cache, input_bytes, variants, monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: cache)
    monkeypatch.setattr(harness, "free_bytes", lambda device: 10**12)
    sets = harness.rotation(input_bytes, "cuda")
    order = itertools.chain.from_iterable(
        harness.turns(i, variants, sets) for i in range(-(-3 * sets // variants))
    )
    last: dict[int, int] = {}
    for place, used in enumerate(order):
        if used in last:
            assert (place - last[used] - 1) * input_bytes >= 3 * cache
        last[used] = place
    # All sets are in use.
    assert len(last) == sets


def test_little_memory_limits_the_sets(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 10**9)
    monkeypatch.setattr(harness, "free_bytes", lambda device: 10**9)
    assert [harness.rotation(size, "cuda") for size in (10**7, 10**9)] == [20, 2]


def test_plots_of_kernels_need_no_detector():
    """As on a machine that has torch, triton and matplotlib alone."""
    missing = "dgsnet", "pillow_heif", "open_clip", "peft", "accelerate"
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import benchmarks.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lost_device_loses_no_later_case(monkeypatch, tmp_path):
    """The process starts anew for them; here it is this one, which does not lose its device again."""
    out = tmp_path / "results.json"
    words = ["project_align", "--rows", "8", "24", "--dim", "48", "--device", "cpu", "--seconds", "0"]
    started = []

    def lose(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def again(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        assert program == sys.executable and arguments[:3] == [program, "-m", "benchmarks"]
        monkeypatch.undo()
        run(arguments[3:])

    def run(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        monkeypatch.setattr(harness, "rotation", lambda *_: 2)
        benchmarks.main()

    monkeypatch.setattr(harness, "answers", lambda device: False)
    monkeypatch.setattr(harness, "timed", lose)
    monkeypatch.setattr("os.execv", again)
    with pytest.raises(SystemExit, match=r"wrong or failed: project_align: dgs_kernels"):
        run([*words, "--without", "torch.", "--out", str(out)])
    assert len(started) == 1 and started[0][-2:] == ["--skip", "1"]
    first, second = json.loads(out.read_text())["results"]
    assert (first["rows"], second["rows"]) == (8, 24) and not first["variants"] and not second["faults"]
    (fault,) = first["faults"].values()
    assert "the device with it" in fault and "illegal memory access" in fault
    assert {"dgs_kernels (cpu)", "eager", "clone"} <= set(second["variants"])
    assert not any("torch." in name for name in second["variants"])
