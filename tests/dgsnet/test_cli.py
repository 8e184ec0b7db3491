"""Every command explains itself, and every mistake ends in one line, soon."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from dgsnet.cli import COMMANDS, main
from dgsnet.config import Config, recipe
from PIL import Image


def ends(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code, capsys.readouterr()


def test_help_lists_every_command(capsys):
    code, said = ends(capsys, "--help")
    assert code == 0 and all(name in said.out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_is(command, capsys):
    code, said = ends(capsys, command, "--help")
    assert code == 0
    bare = re.findall(
        r"--(\w[\w.]*\w)(?: [A-Z_.]+| \{[^}]*\})? \((?:type|required|default)", " ".join(said.out.split())
    )
    assert not bare


@pytest.mark.parametrize(
    "words, expected",
    [
        (["fly"], "fly"),
        (["fly"], "; see dgsnet --help"),
        (["predict", "--model", "m"], "PATHS"),
        (["predict", "a.jpg"], "model"),
        (["predict", "a.jpg"], "; see dgsnet predict --help"),
        (["predict", "a.jpg", "--model", "m", "--views", "many"], "views"),
        (["predict", "a.jpg", "--model", "m", "--no-such", "1"], "no_such"),
        (["predict", "a.jpg", "--model", "m", "--out", "scores.xls"], ".parquet"),
        (["predict", "a.jpg", "--model", "m", "--engine", "ray", "--heatmaps", "h"], "--engine local"),
        (["train", "--optim.lr", "fast", "--out", "o"], "optim.lr"),
        (["monitor", "--model", "m"], "no model at m"),
        (["calibrate", "--model", "m"], "give --model and --reals, or --scores and --out"),
        (["calibrate", "--scores", "s.csv"], "--scores goes with --out"),
        (["calibrate", "--scores", "s.csv", "--out", "o"], "s.csv"),
        (["evaluate", "--out", "o"], "--model, --scores or both"),
        (["evaluate", "--scores", "s.csv"], "--out"),
        (["evaluate", "--scores", "s.csv", "--out", "o", "--frozen"], "leave --reencode"),
        (["evaluate", "--scores", "s.csv", "--out", "o"], "s.csv"),
        (["monitor", "--model", "m", "--reviewed", "r.csv"], "m"),
    ],
)
def test_mistakes_end_in_one_line(words, expected, capsys):
    code, said = ends(capsys, *words)
    assert code == 2
    assert expected in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err


def test_a_name_of_many_letters_is_shortened(capsys):
    """What is wrong is said before the name and what to do behind it."""
    code, said = ends(capsys, "predict", "a.jpg" + "m" * 10_000, "--model", "m")
    assert code == 2 and len(said.err) < 1600 and said.err.count("\n") == 1
    assert said.err.startswith("dgsnet: a.jpgmmm") and " [...] mmm" in said.err
    assert said.err.endswith("give image files, folders, lists, shards or quoted patterns\n")
    code, whole = ends(capsys, "predict", "m" * 200, "--model", "m")
    assert "[...]" not in whole.err and "m" * 200 in whole.err


# In a process of its own: a command line's exit code, its words and the processor time until they came; and
# whether torch, which takes seconds, had been imported.
TELL = """
import contextlib, io, json, sys, time
from dgsnet.cli import main
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue(), time.process_time(), "torch" in sys.modules]))
"""


def test_mistakes_are_reported_before_the_heavy_imports(tmp_path):
    for name in ("train/0_real", "train/1_fake", "val/0_real", "one/0_real", "results"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "a.png")
    (tmp_path / "file").touch()
    tiny = "--model.name dgsnet-tiny --data.train data --data.captions none --out new"
    expected = {
        "--version": f"dgsnet {version('dgs-kernels')}\n",
        "train --out new": "no training images",
        "train --data.train nowhere --out new": "nowhere: no such file",
        f"train {tiny} --preprocess.image_size 65": "give a multiple of 4, such as 64",
        f"train {tiny} --model.pretrained openai": "give builtin, a weights file",
        f"train {tiny} --model.lora_rank -1": "lora_rank=-1",
        f"train {tiny} --model.lora_dropout 1": "lora_dropout=1.0",
        f"train {tiny} --optim.betas [0.9,1]": "beta2=1.0",
        f"train {tiny} --data.captions auto": "3 of 3 images have no caption",
        f"train {tiny} --data.train data/one": "all training images are real",
        f"train {tiny} --data.val data/train/0_real": "no labelled images of split val",
        f"train {tiny} --out data": "is not empty",
        f"train {tiny} --out file": "is a file",
        "train --data.train data --model.name ViT-X --out new": "unknown model 'ViT-X'",
        "train --data.train data --model.name RN50 --out new": "is a ResNet",
        "train --data.train data --model.pretrained no/such.pt --out new": "no/such.pt does not exist",
        "train --data.train data --preprocess.image_size 64 --out new": "num_patches=49",
        "average data nowhere --out new": "data is no model",
        f"train {tiny} --recipe best": "invalid choice: 'best'",
        "predict data --model nowhere": "no model at nowhere",
        "predict data --model data": "data is no model",
        "evaluate --data data --model nowhere --out new": "holds the splits train, val",
        "evaluate --data data --split train --model nowhere --out new": "no model at nowhere",
        "calibrate --reals data --model nowhere": "no model at nowhere",
        "export --format hf --out new --model nowhere": "no model at nowhere",
        "serve --model nowhere": "no model at nowhere",
        "caption --data nowhere": "nowhere: no such file",
        "twins --data nowhere --by resize --out new": "nowhere: no such file",
        "twins --data data/one --by gan:x --out new": "--by gan:x is unknown; give vae:NAME_OR_FOLDER",
        "twins --data data/one --by resize --out data": "exists and is not an empty folder",
        "demo --out data": "not a demo's",
    }
    found = subprocess.run(
        [sys.executable, "-c", TELL],
        input=json.dumps([line.split() for line in expected]),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before = 0.0
    answers = map(json.loads, found.stdout.splitlines())
    for (line, words), answer in zip(expected.items(), answers, strict=True):
        code, said, seconds, heavy = answer
        assert words in said and said.count("\n") == 1, line
        assert code == (0 if line == "--version" else 2), line
        assert not heavy and seconds - before < 2, (line, seconds - before, heavy)
        before = seconds
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["published", "twins", "wang", "web", "dda"])
def test_a_recipe_is_what_its_file_says_and_the_command_line_changes_it(name, capsys, tmp_path):
    def settings(*words):
        code, said = ends(capsys, "train", "--recipe", name, *words, "--print_config")
        assert code == 0
        fields = yaml.safe_load(said.out)
        return Config.from_dict({key: fields[key] for key in Config().to_dict()}).flat()

    found, default = settings(), Config().flat()
    assert {key: value for key, value in found.items() if value != default[key]} == recipe(name)
    (tmp_path / "run.yaml").write_text("optim: {lr: 0.5, batch_size: 7}")
    changed = settings("--config", str(tmp_path / "run.yaml"), "--optim.batch_size", "9")
    assert changed == found | {"optim.lr": 0.5, "optim.batch_size": 9}
    # What belongs to another model is that model's.
    tiny = settings("--model.name", "dgsnet-tiny")
    assert tiny["preprocess.image_size"] == 32 and tiny["augment.preset"] == found["augment.preset"]


def test_the_built_in_model_brings_its_settings(tmp_path, capsys):
    def settings(*words):
        code, said = ends(capsys, "train", *words, "--print_config")
        assert code == 0
        return yaml.safe_load(said.out)

    tiny = settings("--model.name", "dgsnet-tiny", "--preprocess.normalization", "imagenet")
    assert tiny["model"]["pretrained"] == "builtin"
    assert tiny["preprocess"]["mode"] == "crop" and tiny["preprocess"]["image_size"] == 32
    # The line asked for this normalization.
    assert tiny["preprocess"]["normalization"] == "imagenet"
    assert settings()["preprocess"]["image_size"] == 224

    (tmp_path / "run.yaml").write_text("{model: {name: dgsnet-tiny, pretrained: mine.pt}}")
    written = settings("--config", tmp_path / "run.yaml")
    assert written["model"]["pretrained"] == "mine.pt" and written["preprocess"]["mode"] == "crop"
