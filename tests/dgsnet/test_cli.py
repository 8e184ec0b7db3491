"""Every command explains itself, and every mistake ends in one line."""

import inspect

import pytest
from dgsnet.cli import COMMANDS, main


def ends(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_every_parameter_and_says_what_it_does(name, capsys):
    code, said = ends(capsys, name, "--help")
    assert code == 0
    function = COMMANDS[name].load()
    for parameter in inspect.signature(function).parameters:
        assert parameter in said.out and f"    {parameter}: " in inspect.getdoc(function)


def test_help_lists_every_command(capsys):
    code, said = ends(capsys, "--help")
    assert code == 0 and all(name in said.out for name in COMMANDS)


@pytest.mark.parametrize(
    "words, told",
    [
        (["fly"], "fly"),
        (["predict", "--model", "m"], "paths"),
        (["predict", "a.jpg"], "model"),
        (["predict", "a.jpg", "--model", "m", "--views", "many"], "views"),
        (["predict", "a.jpg", "--model", "m", "--no-such", "1"], "no-such"),
        (["predict", "a.jpg", "--model", "m", "--out", "scores.xls"], ".parquet"),
        (["predict", "a.jpg", "--model", "m", "--engine", "ray", "--heatmaps", "h"], "--engine local"),
        (["train", "--optim.lr", "fast", "--out", "o"], "optim.lr"),
    ],
)
def test_mistakes_end_in_one_line(words, told, capsys):
    code, said = ends(capsys, *words)
    assert code == 2
    assert told in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "demo")])
def test_a_switch_takes_no_word(name, capsys):
    parameters = inspect.signature(COMMANDS[name].load(), eval_str=True).parameters.values()
    switches = [parameter.name for parameter in parameters if parameter.annotation is bool]
    _, said = ends(capsys, name, "--help")
    for switch in switches:
        assert f"[--{switch}]" in said.out
