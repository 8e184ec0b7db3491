"""An image beyond the limits of reading is told of and left out, whatever the command; predict has a row."""

import pytest
from dgsnet.apart import Apart
from dgsnet.cli import main
from dgsnet.data import images
from PIL import Image

from tests.support.pictures import chunk, png_with
from tests.support.tiny import CROP, save_noise, save_tiny

TOLD = "1_fake/slow.png: not read within 0.2 seconds of processor time"
MODEL = "--model.name dgsnet-tiny --model.pretrained= --preprocess.mode crop --preprocess.image_size 32"
DATA = "--data.train . --data.val . --data.captions none --data.workers 0"
COMMANDS = {
    "train": f"train {MODEL} {DATA} --optim.max_steps 1 --optim.head_epochs 1 --out run-of-two-steps",
    "calibrate": "calibrate --model run --reals 0_real --generated 1_fake --fpr 0.2 --workers 0",
    "audit": "audit --data . --out audited",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Fourteen images of either class, and one whose chunks take some 0.4 s to read."""
    place = tmp_path_factory.mktemp("beyond")
    for name in ("0_real", "1_fake"):
        (place / name).mkdir()
        save_noise(place / name, 14)
    # This model gives greys a lower score.
    for i, path in enumerate(sorted((place / "0_real").iterdir())):
        Image.new("L", (40, 40), 121 + i).save(path)
    (place / "1_fake" / "slow.png").write_bytes(png_with(chunk(b"prVt", bytes(600)) * 90_000))
    save_tiny(place / "run", CROP)
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_an_image_beyond_the_limits_is_told_and_left_out(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with Apart("dgsnet.data.images:prepare", library="Pillow", seconds=0.2) as impatient:
        monkeypatch.setattr(images, "_apart", impatient)
        main(COMMANDS[command].split())
    said = capsys.readouterr()
    assert TOLD in said.out + said.err
