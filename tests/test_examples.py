"""Every example runs as it stands, is short enough to read at once, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# What the output has to say; numbers captured are compared below.
SAYS = {
    "own_loop": r"energy removed 0: [\d.]+%, 2: [\d.]+%",
    "continual_learning": r"mean accuracy (?P<less>[\d.]+)% -> (?P<more>[\d.]+)%",
    "continual_learning_gem": r"mean accuracy (?P<less>[\d.]+)% -> (?P<more>[\d.]+)%",
    "two_tasks_pcgrad": r"pcgrad +left [\d.]+%  right [\d.]+%  conflict in [\d.]+% of the steps",
    "from_torchjd": r"(before ([\d.]+)  after \2\n){3}",
    "with_accelerate": r"step 16  loss [\d.]+  conflict rate [\d.]+",
    "with_lightning": r"conflict rate [\d.]+",
    "with_hf_trainer": r"21 layers, [\d.]+% of the energy removed",
    "with_open_clip": r"conflict rate [\d.]+ over 31 layers",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch, capsys):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    output = capsys.readouterr().out
    found = re.search(SAYS[example.stem], output)
    assert found, output[-2000:]
    if "more" in found.groupdict():
        assert float(found["more"]) > float(found["less"]) + 5
    if example.stem in ("with_accelerate", "with_lightning", "with_hf_trainer"):
        assert list(tmp_path.rglob("events.out.tfevents*")), "nothing was written for TensorBoard"
    if example.stem == "two_tasks_pcgrad":
        assert (tmp_path / "objectives.png").stat().st_size > 10_000
