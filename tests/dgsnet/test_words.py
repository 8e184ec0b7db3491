"""Every command line and every option that documents and messages name is one that the commands take."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import dgsnet
import pytest
from dgsnet import cli
from dgsnet.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(Path(dgsnet.__file__).parent.rglob("*.py"))
# Of other programs, as documents name them.
FOREIGN = {
    *("batch", "build", "choices", "cpu", "data_binary", "dist", "dtype", "find_links", "gpus", "ignore"),
    *("include", "parts", "photographs", "repo_type"),
    *(
        "install",
        "local_dir",
        "logdir",
        "multi_gpu",
        "mutations",
        "only",
        "no_build_isolation",
        "nproc_per_node",
        "num_processes",
    ),
    *("prefix", "print_config", "results", "rows", "steps", "strict", "target", "test_dir", "threads"),
}
# Without a value.
FLAGS = (
    "--allow-lost",
    "--consistency",
    "--declared",
    "--frozen",
    "--help",
    "--print_config",
    "--provenance",
    "--replace",
    "--resume",
)
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_.-]*[a-z])")


def command_lines(text: str) -> list[str]:
    """Code that begins with `dgsnet`: lines of blocks, continued ones joined, and words within sentences."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^(?: {4,}|\$ )?(dgsnet [a-z].*)$", text, flags=re.MULTILINE)
    inline = re.findall(r"`(dgsnet [a-z]+ [^`\n]*)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in blocks + inline]


LINES = sorted({line for page in PAGES for line in command_lines(page.read_text())})


@pytest.fixture
def only_parsed(monkeypatch):
    """No command is carried out; returns the names of those that would have been."""
    called = []
    load = cli.Command.load

    def stand_in(command):
        real = load(command)
        return functools.wraps(real)(lambda *_, **__: called.append(command.function))

    monkeypatch.setattr(cli.Command, "load", stand_in)
    monkeypatch.setattr(cli, "train_command", lambda *_, **__: called.append("train_command"))
    return called


def complete(words: list[str]) -> list[str]:
    """Prose leaves out what it does not speak of: what a command requires is added where it is missing."""
    required = {
        "audit": ["--data", "d", "--out", "o"],
        "train": ["--out", "o"],
        "update": ["--model", "m", "--data", "d", "--replay", "r", "--out", "o"],
        "evaluate": ["--data", "d", "--model", "m", "--out", "o"],
        "predict": ["--model", "m"],
        "calibrate": ["--model", "m", "--reals", "r"],
        "export": ["--model", "m", "--format", "onnx", "--out", "o"],
        "convert": ["--out", "o"],
        "caption": ["--data", "d"],
        "twins": ["--data", "d", "--out", "o", "--by", "resize"],
        "serve": ["--model", "m"],
    }.get(words[0], [])
    # A choice stands for its first word.
    words = [re.sub(r"\|.*", "", word) for word in words if word != "..."]
    if words[-1].startswith("--") and words[-1] not in FLAGS:
        words.append("x")
    for option, value in zip(required[::2], required[1::2]):
        if option not in words and not any(word.startswith(f"{option}=") for word in words):
            words += [option, value]
    positional = {"predict": "photo.jpg", "convert": "model.pth"}.get(words[0])
    if positional and (len(words) == 1 or words[1].startswith("--")):
        words.insert(1, positional)
    return words


@pytest.mark.parametrize("line", LINES)
def test_command_lines_of_the_documents(line, only_parsed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    words = complete(shlex.split(line)[1:])
    try:
        cli.main(words)
    except SystemExit as stop:
        # `--help` and `--version` end like this.
        assert stop.code == 0, capsys.readouterr().err
    else:
        assert len(only_parsed) == 1


def test_there_are_such_lines():
    commands = {line.split()[1] for line in LINES}
    assert len(LINES) > 30 and commands >= set(cli.COMMANDS) - {"demo"}


@functools.cache
def known_options() -> set[str]:
    found = {name for name in Config().flat()} | {"config", "help", "recipe", "surgery", "version"}
    for command in cli.COMMANDS.values():
        found |= set(inspect.signature(command.load()).parameters)
    return found


def options_in(text: str) -> set[str]:
    return {name.replace("-", "_") for name in OPTION.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_the_documents(page):
    assert options_in(page.read_text()) <= known_options() | FOREIGN


def test_options_of_the_messages():
    """In error messages, help texts and docstrings alike."""
    unknown = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wrong = options_in(node.value) - known_options() - FOREIGN
                unknown |= {(path.name, name): node.value[:60] for name in wrong}
    # This is a program of its own.
    modules = {"builtin/pretrain.py"}
    assert not {key: text for key, text in unknown.items() if key[0] not in {Path(m).name for m in modules}}


@pytest.mark.parametrize("words", [["--max-megabytes", "0"], ["--max_megabytes", "0"], ["--max-megabytes=0"]])
def test_hyphens_and_underscores_are_alike(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--model", "m", *words])
    assert "--max-megabytes is 0; it must be 1 or more" in capsys.readouterr().err


def test_a_value_keeps_its_hyphens(only_parsed, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "train_command", lambda config, out, resume: seen.update(name=config.model.name))
    cli.main(["train", "--out", "o", "--model.name=ViT-B-32"])
    assert seen["name"] == "ViT-B-32"
