"""What training says of its data before it begins."""

import re
import time
import typing

import numpy as np
import pytest
import torch
from dgsnet import cli
from dgsnet.config import Config, DataConfig, PreprocessConfig
from dgsnet.data.items import find_samples
from dgsnet.errors import UserError
from dgsnet.training import checks
from dgsnet.training.checks import check_folder, warn_of_shortcuts
from PIL import Image


@pytest.fixture
def data(tmp_path):
    """24 images of each class: all real ones are JPEG, all generated ones PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for folder, kind in (("0_real", "jpg"), ("1_fake", "png")):
        (tmp_path / "d" / folder).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(pixels).save(tmp_path / "d" / folder / f"{i}.{kind}")
    return tmp_path / "d"


def test_a_shortcut_is_told_in_one_line_with_figures(data, capsys):
    warn_of_shortcuts(Config(), find_samples(data))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dgsnet: warning: the files give the label away: AUC 100.0 (")
    assert "of 48 images" in line and "--surgery.text expert --data.nuisances files" in line


def test_no_word_where_an_expert_takes_it(data, capsys):
    warn_of_shortcuts(Config(data=DataConfig(nuisances="files")), find_samples(data))
    assert capsys.readouterr().err == ""


def test_no_word_of_balanced_or_too_few_files(data, capsys):
    # This changes the files' contents, not their names.
    for path in (data / "1_fake").glob("*.png"):
        path.write_bytes((data / "0_real" / "0.jpg").read_bytes())
    samples = find_samples(data)
    warn_of_shortcuts(Config(), samples)
    warn_of_shortcuts(Config(), samples[:10])
    assert capsys.readouterr().err == ""


def test_only_so_many_and_only_for_so_long(data, capsys, monkeypatch):
    samples = find_samples(data)
    monkeypatch.setattr(checks, "SHORTCUT_IMAGES", 30)
    warn_of_shortcuts(Config(), samples)
    assert "of 30 images" in capsys.readouterr().err
    monkeypatch.setattr(checks, "SHORTCUT_SECONDS", 0)
    begin = time.monotonic()
    warn_of_shortcuts(Config(), samples * 1000)
    assert capsys.readouterr().err == "" and time.monotonic() - begin < 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="is to be refused for want of a GPU")
def test_training_begins_with_it(data, tmp_path, capsys):
    words = ["--data.train", str(data), "--data.captions", "none", "--model.name", "dgsnet-tiny"]
    with pytest.raises(SystemExit):
        cli.main(["train", *words, "--optim.precision", "fp16", "--out", str(tmp_path / "o")])
    warning, error = capsys.readouterr().err.splitlines()
    assert "the files give the label away" in warning and "fp16 needs a GPU" in error
    assert not (tmp_path / "o").exists()


def another(value, kind):
    """A value of a setting that is not this one."""
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if isinstance(value, list):
        return [x / 2 for x in value] if value and isinstance(value[0], float) else [*value, "more"]
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, float):
        return value / 2 + 0.01
    return not value if isinstance(value, bool) else (value or 0) + 1


def test_a_resumed_run_may_change_what_does_not_decide_its_weights_and_nothing_else(tmp_path):
    config = Config(data=DataConfig(train=["a"]), preprocess=PreprocessConfig(mode="crop"))
    (tmp_path / "config.json").write_text(config.to_json())
    check_folder(config, tmp_path, resume=True)
    free = set()
    hints = typing.get_type_hints(Config)
    for name, value in config.flat().items():
        section, _, key = name.rpartition(".")
        kind = typing.get_type_hints(hints[section])[key] if section else hints[key]
        values = config.to_dict()
        (values[section] if section else values)[key] = another(value, kind)
        if name in ("preprocess.resize", "preprocess.side"):
            # Neither goes without the other.
            values["preprocess"] |= {"resize": "shorter", "side": 7}
        try:
            check_folder(Config.from_dict(values), tmp_path, resume=True)
            free.add(name)
        except UserError as error:
            named = "preprocess.resize" if name == "preprocess.side" else name
            assert re.search(rf"cannot resume .* with {named}=", str(error))
    assert free == {
        *("data.workers", "data.prefetch", "data.cache", "optim.parallel"),
        *("checkpoint_every", "log_every"),
    }
