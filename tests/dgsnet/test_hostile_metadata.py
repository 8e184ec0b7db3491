"""Whatever metadata a folder holds, commands end well or in one line; tests/fuzz has many more such files."""

import json
import random
import shutil

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.data.images import file_hash
from dgsnet.detection.decisions import calibrate, save_calibration

from tests.fuzz.changes import changed_any, changed_bytes, changed_header, changed_numbers
from tests.support.cost import cost
from tests.support.tiny import CROP, save_noise, save_tiny

COMMANDS = [
    "predict a.png --model best --workers 0",
    "evaluate --data l.csv --model best --workers 0 --out out",
    "export --format hf --model best --out out",
    "predict a.png --model best --workers 0",
]
TRAIN = (
    "train --model.name dgsnet-tiny --model.pretrained= --preprocess.mode crop --preprocess.image_size 32 "
    "--data.train . --data.val . --data.workers 0 --data.captions none --data.pairs true "
    "--optim.batch_size 2 --optim.max_steps 1 --out out"
)
FILES = {
    "best/config.json": (changed_any, COMMANDS),
    "best/detector.json": (changed_any, COMMANDS),
    "best/calibration.json": (changed_any, COMMANDS),
    "best/training_images.npy": (changed_numbers, COMMANDS),
    "best/adapters.safetensors": (changed_header, COMMANDS),
    "twins.csv": (changed_bytes, [TRAIN] * 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder with all that commands read from one, its detector.json, and pairs of images."""
    root = tmp_path_factory.mktemp("whole")
    save_tiny(root, CROP)
    rng = np.random.default_rng(0)
    sources = {"a": rng.normal(-1, 1, 300), "b": rng.normal(-2, 1, 200)}
    save_calibration(root, calibrate(sources, rng.normal(1, 1, 300), fpr=0.05))
    for name in ("0_real", "1_fake"):
        (root / name).mkdir()
        save_noise(root / name, 2)
    shutil.copy(root / "0_real" / "00.png", root / "a.png")
    hashes = [file_hash((root / "a.png").read_bytes()), 5, 2**40]
    np.save(root / "best" / "training_images.npy", np.sort(hashes))
    (root / "l.csv").write_text("path,label\na.png,0\n")
    (root / "twins.csv").write_text("path,twin\n0_real/00.png,1_fake/00.png\n0_real/01.png,1_fake/01.png\n")
    config = json.loads((root / "best" / "config.json").read_bytes())
    (root / "detector.json").write_text(json.dumps({name: config[name] for name in ("model", "preprocess")}))
    # What is imported once is no cost of a file.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("first"))
        shutil.copytree(root, ".", dirs_exist_ok=True)
        for words in (*COMMANDS[:2], COMMANDS[2].replace(" out", " hf"), TRAIN.replace(" out", " run")):
            main(words.split())
    return root


@pytest.mark.parametrize("name", FILES)
def test_commands_end_in_one_line(name, whole, tmp_path, monkeypatch, capsys):
    """Where they do not end well: within a second of this processor and 200 MB."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path, (change, commands) = tmp_path / name, FILES[name]
    seed = whole / "detector.json" if path.name == "detector.json" else path
    data, rng = seed.read_bytes(), random.Random(3)
    for words in commands:
        shutil.rmtree("out", ignore_errors=True)
        path.write_bytes(change(data, rng))
        capsys.readouterr()
        with cost() as taken:
            try:
                main(words.split())
            except SystemExit as stop:
                assert stop.code == 2
                assert capsys.readouterr().err.splitlines()[-1].startswith("dgsnet: ")
        assert taken.seconds < 1 and taken.memory < 200_000_000
