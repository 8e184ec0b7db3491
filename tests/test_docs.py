"""The documentation: links lead somewhere, examples run."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from dgsnet.demo.compare import MEASURES

import dgs_kernels
from benchmarks import pictures

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    missing = [
        link
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        if not link.startswith(("http://", "https://")) and not (page.parent / link).exists()
    ]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_diff_of_the_readme():
    """The loop runs before and after, and only what is added keeps what was learned before."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert not re.search("^-", diff, flags=re.MULTILINE)
    lost = []
    for lines in (re.sub(r"^\+.*\n", "", diff, flags=re.MULTILINE), diff):
        torch.manual_seed(0)
        model, loss = torch.nn.Linear(8, 1), torch.nn.functional.mse_loss
        x, y, old_x = torch.randn(4, 8), torch.ones(4, 1), torch.randn(2, 8)
        old_y = model(old_x).detach() + 0.1
        names = {
            "batches": [(x, y)] * 80,
            "old_batches": [(old_x, old_y)] * 80,
            "loss": loss,
            "model": model,
        }
        exec(re.sub("^.", "", lines, flags=re.MULTILINE), {"torch": torch, **names})
        lost.append(loss(model(old_x), old_y).item())
    assert lost[1] < lost[0] / 2


def test_figures_of_the_demo_agree():
    """The picture is drawn from those that the document has."""
    text = (ROOT / "docs" / "builtin.md").read_text()
    for task, measures in json.loads((ROOT / "benchmarks/results/cpu_demo.json").read_text()).items():
        table = text.partition(f"training images: {task} ")[2]
        for method in next(iter(measures.values())):
            row = re.search(f"^{method} − LoRA +(.*)$", table, flags=re.MULTILINE)[1].replace("−", "-")
            found = [[float(mean), float(error)] for mean, error in re.findall(r"(\S+) ± (\S+) \(", row)]
            assert found == [methods[method] for methods in measures.values()]


def test_pictures_are_drawn_from_a_demo(tmp_path, monkeypatch):
    runs = [
        {"task": task, "method": method, "seed": seed}
        | {key: rank * 0.25 + seed * (rank + 1) * 0.01 for rank, key in enumerate(MEASURES, 1)}
        for task in ("balanced", "jpeg")
        for seed in (0, 1)
        for method in ("LoRA", "DGS-Net")
    ]
    for run in runs:
        run["auc"] += 0.04 * (run["method"] == "DGS-Net") * (1 + run["seed"])
    (tmp_path / "docs").mkdir()
    (tmp_path / "results.json").write_text(json.dumps(runs))
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "DEMO", tmp_path / "demo.json")
    pictures.main([str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["jpeg"]["AUC"] == {"DGS-Net": [6.0, 2.0]} and found["jpeg"]["CKA"] == {"DGS-Net": [0.0, 0.0]}
    for name in ("surgery", "demo"):
        drawn, kept = (folder / "docs" / f"{name}.svg" for folder in (tmp_path, ROOT))
        assert drawn.stat().st_size > 10_000 and kept.stat().st_size < 200_000


@pytest.mark.parametrize(
    "name",
    [
        module.name
        for module in pkgutil.walk_packages(dgs_kernels.__path__, "dgs_kernels.")
        if not module.name.startswith(("dgs_kernels.triton", "dgs_kernels._native"))
    ],
)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
