"""Whatever a model's folder holds, commands end well or in one line; tests/fuzz has many more such files."""

import random
import shutil
import time

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.data.images import file_hash
from dgsnet.detection.decisions import calibrate, save_calibration

from tests.fuzz.changes import changed_any, changed_header, changed_numbers
from tests.support.tiny import CROP, save_noise, save_tiny

FILES = {
    "config.json": changed_any,
    "calibration.json": changed_any,
    "training_images.npy": changed_numbers,
    "adapters.safetensors": changed_header,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder with all that commands read from one, and an image."""
    root = tmp_path_factory.mktemp("whole")
    save_tiny(root, CROP)
    rng = np.random.default_rng(0)
    sources = {"a": rng.normal(-1, 1, 300), "b": rng.normal(-2, 1, 200)}
    save_calibration(root, calibrate(sources, rng.normal(1, 1, 300), fpr=0.05))
    save_noise(root, 1)
    hashes = [file_hash((root / "00.png").read_bytes()), 5, 2**40]
    np.save(root / "best" / "training_images.npy", np.sort(hashes))
    return root


@pytest.mark.parametrize("name", FILES)
def test_commands_end_in_one_line(name, whole, tmp_path, monkeypatch, capsys):
    """Where they do not end well."""
    monkeypatch.chdir(tmp_path)
    change = FILES[name]
    folder = shutil.copytree(whole / "best", tmp_path / "best")
    shutil.copy(whole / "00.png", "a.png")
    data, rng = (folder / name).read_bytes(), random.Random(3)
    for words in (
        ["predict", "a.png"],
        ["evaluate", "--data", "l.csv", "--out", "o"],
        ["export", "--format", "hf"],
    ) * 2:
        (tmp_path / "l.csv").write_text("path,label\na.png,0\n")
        shutil.rmtree("o", ignore_errors=True)
        (folder / name).write_bytes(change(data, rng))
        begin = time.process_time()
        out = ["--out", "e"] if words[0] == "export" else ["--workers", "0"]
        try:
            main([*words, "--model", "best", *out])
        except SystemExit as stop:
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dgsnet: ")]
            assert stop.code == 2 and len([line for line in said if "warning" not in line]) == 1
        assert time.process_time() - begin < 10
