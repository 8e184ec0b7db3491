"""`dgsnet train`: its short spellings, and wrong input that ends in one line and leaves nothing."""

import os

import pytest
from dgsnet import cli
from dgsnet.config import Config
from dgsnet.errors import UserError
from dgsnet.files import locked
from dgsnet.training.train import train

from tests.support.runs import changed, fails, settings, write_config


def test_layer_wise_surgery_has_a_short_spelling(dataset, tmp_path):
    config = settings(dataset, data_val=[], optim_max_steps=1)
    path = write_config(tmp_path / "run.yaml", config)
    for words in (["--surgery", "layer"], ["--surgery=layer"]):
        run = tmp_path / str(len(words))
        cli.main(["train", "--config", path, "--out", str(run), *words])
        assert Config.load(run / "config.json") == changed(config, surgery_mode="layer")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_in_use_is_refused_by_the_name_of_its_process(dataset, tmp_path, capsys, resume):
    path, run = write_config(tmp_path / "run.yaml", settings(dataset)), tmp_path / "run"
    with locked(run):
        line = fails(["train", "--config", path, "--out", str(run), *resume], capsys)
        assert os.listdir(run) == [".lock"]
    assert f"run is in use by process {os.getpid()} on " in line


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "not empty"),
        (["--out", "{broken}"], "is a file"),
        (["--out", "{new}", "--data.train", "/nowhere"], "/nowhere: no such file or folder"),
        (["--out", "{new}", "--data.train", "[]"], "no training images"),
        (["--out", "{new}", "--data.train", "{data}/train/0_real"], "no labelled images"),
        (["--out", "{new}", "--data.captions", "/no.json"], "/no.json"),
        (["--out", "{new}", "--model.name", "ViT-X"], "unknown model 'ViT-X'"),
        (["--out", "{new}", "--model.pretrained", "/no.pt"], "/no.pt"),
        (["--out", "{new}", "--model.lora_rank", "-1"], "lora_rank=-1"),
        (["--out", "{new}", "--preprocess.image_size", "65"], "give a multiple of 4, such as 64"),
        (["--out", "{new}", "--preprocess.mode", "patches"], "num_patches"),
        (["--out", "{new}", "--optim.batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--out", "{new}", "--augment.preset", "social"], 'setting "augment.preset"'),
        (
            ["--out", "{new}", "--augment.steps", "[jpeg:30..200]"],
            "'30..200' in 'jpeg:30..200' must",
        ),
        (["--out", "{new}", "--optim.lr", "fast"], 'setting "optim.lr"'),
        (["--out", "{new}", "--optim.lr", "1e9"], "training diverged"),
        (["--out", "{new}", "--surgery.mode", "magic"], 'setting "surgery.mode"'),
        (["--out", "{new}", "--surgery", "magic"], 'setting "surgery.mode"'),
        (["--out", "{new}", "--surgery", "layer", "--surgery.order", "project_first"], "feature only"),
        (["--out", "{new}", "--config", "/no.yaml"], "/no.yaml"),
        (["--out", "{new}", "--config", "{broken}"], "broken.yaml"),
        (["--out", "{new}", "--config", "{unknown}"], "optim.speed"),
        (["--out", "{new}", "--unknown", "3"], "--unknown"),
        (["--resume", "--optim.lr", "5e-5"], "cannot resume"),
    ],
)
def test_wrong_input_ends_in_one_line(extra, message, finished, dataset, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("optim: [")
    (tmp_path / "unknown.yaml").write_text("optim: {speed: 3}")
    names = {
        "new": tmp_path / "new",
        "data": dataset,
        "broken": tmp_path / "broken.yaml",
        "unknown": tmp_path / "unknown.yaml",
    }
    path = write_config(tmp_path / "run.yaml", settings(dataset))
    arguments = ["train", "--config", path, "--out", str(finished)]
    line = fails([*arguments, *(word.format(**names) for word in extra)], capsys)
    assert message in line
    if message != "training diverged":
        # Nothing keeps the corrected command from running.
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--out"]])
def test_an_incomplete_command_line_ends_in_one_line(arguments, capsys):
    assert "--help" in fails(arguments, capsys)


def test_training_on_one_class_is_refused(dataset, tmp_path):
    rows = [f"{path},real" for path in (dataset / "train" / "0_real").iterdir()]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UserError, match="all training images are real"):
        train(settings(dataset, data_train=[str(tmp_path / "list.csv")]), tmp_path / "run")
