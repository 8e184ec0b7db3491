"""The documentation: links lead somewhere, examples run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import dgs_kernels

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


def test_readme_examples():
    # Those that need a trained model are covered where the detector is tested.
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    runnable = [block for block in blocks if "runs/" not in block]
    assert len(runnable) == 2
    for block in runnable:
        exec(compile(block, "README.md", "exec"), {})


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
