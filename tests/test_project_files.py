"""What carriers-on read: paths in CONTRIBUTING exist, workflows and hooks are sound, versions agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WORKFLOWS = ROOT / ".github" / "workflows"


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    quoted = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    made = ("build/", ".venv/")
    paths = {word for word in quoted if re.fullmatch(r"[\w.-]+(/[\w.-]+)+|[\w.-]+\.(md|yaml|toml|py)", word)}
    paths = {path for path in paths if not path.startswith(made)}
    assert len(paths) > 25
    assert not {path for path in paths if not (ROOT / path).exists()}


def actionlint(workflow: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "actionlint", "-shellcheck=", workflow], capture_output=True, text=True)


@pytest.mark.parametrize(
    "old, new",
    [
        ("actions/checkout@", "actions/checkout:"),
        ("runs-on", "run-on"),
        ("${{ github.ref }}", "${{ github.reff }}"),
    ],
)
def test_actionlint_fails_on_a_broken_workflow(old, new, tmp_path):
    folder = tmp_path / ".github" / "workflows"
    shutil.copytree(ROOT / ".github" / "workflows", folder)
    workflow = folder / "tests.yml"
    assert actionlint(workflow).returncode == 0
    text = workflow.read_text()
    assert old in text
    workflow.write_text(text.replace(old, new))
    assert actionlint(workflow).returncode == 1


def test_what_others_wrote_is_run_as_it_was_when_it_was_looked_at():
    """Actions by commit, since tags can be moved; packages of a single author by their hashes."""
    used = re.findall(r"uses: *(\S+)", "".join(file.read_text() for file in WORKFLOWS.glob("*.yml")))
    assert len(used) > 5 and not [
        action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)
    ]
    pins = re.sub(r"(?m)^#.*\n", "", (ROOT / "tests/pinned.txt").read_text()).replace("\\\n", "").splitlines()
    pinned = [re.match(r"([\w-]+)==[\d.]+ .*--hash=sha256:[0-9a-f]{64}", line) for line in pins]
    assert len(pinned) == 2 and all(pinned)
    packages = (ROOT / "pyproject.toml").read_text()
    assert not [found[1] for found in pinned if found[1] in packages]
    assert (ROOT / "Makefile").read_text().count("--require-hashes --requirement tests/pinned.txt") == 1


@pytest.mark.parametrize("link", ["gone.md", "../GONE.md", "method.md#nowhere"])
def test_make_docs_fails_on_a_dead_link(link, tmp_path):
    command = re.search(r"\$\(BIN\)/(mkdocs build[^#\n]*)", (ROOT / "Makefile").read_text())[1].split()
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "outside.py", tmp_path / "docs")
    (tmp_path / "docs" / "method.md").write_text("# The method")
    # The site keeps its rules, without the API reference.
    config = (ROOT / "mkdocs.yml").read_text().split("\nplugins:")[0]
    (tmp_path / "mkdocs.yml").write_text(config + "\nplugins: []\n")

    def build(text: str) -> int:
        (tmp_path / "docs" / "index.md").write_text(text)
        return subprocess.run([BIN / command[0], *command[1:]], cwd=tmp_path, capture_output=True).returncode

    assert build("[the method](method.md)") == 0
    assert build(f"[dead]({link})") == 1


def test_pre_commit_calls_the_tools_of_the_lint():
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^lint:.*?\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)[1]
    tools = set(re.findall(r"\$\(BIN\)/(\S+)", lint))
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {f".venv/bin/{tool}" for tool in tools}
    assert {repository["repo"] for repository in config["repos"]} == {"local"}


def test_one_version():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## \[(.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert releases[0] == (version, citation["date-released"].isoformat())
    assert citation["version"] == version
    assert any("2511.13108" in reference["url"] for reference in citation["references"])
