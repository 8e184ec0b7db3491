"""Images that a model was trained on are told where it is measured."""

import numpy as np
import pytest
from dgsnet.data.images import file_hash
from dgsnet.data.items import Item
from dgsnet.detection.overlap import in_training, warn_of_training_images
from dgsnet.evaluation.evaluate import evaluate_command

from tests.support.tiny import CROP, save_noise, save_tiny


@pytest.fixture
def trained(tmp_path):
    """A model that says that it was trained on images 2, 3 and 5 of seven, and their items."""
    run, paths = save_tiny(tmp_path, CROP), sorted(save_noise(tmp_path, 7).glob("*.png"))
    known = [file_hash(paths[i].read_bytes()) for i in (2, 3, 5)]
    np.save(run / "best" / "training_images.npy", np.unique(known))
    return run, [Item(str(path)) for path in paths]


def test_a_copy_is_known_under_any_name(trained, tmp_path):
    run, items = trained
    copy = tmp_path / "copy.png"
    copy.write_bytes((tmp_path / "03.png").read_bytes())
    items = [Item(str(tmp_path / "gone.png")), *items[::-1], Item(str(copy))]
    assert [item.path.rpartition("/")[2] for item in in_training(run, items)] == [
        "05.png",
        "03.png",
        "02.png",
        "copy.png",
    ]
    (run / "best" / "training_images.npy").unlink()
    assert in_training(run, items) == []


@pytest.mark.parametrize(("end", "said"), [(2, ""), (3, "1 of 3 image was"), (7, "3 of 7 images were")])
def test_one_line_says_how_many(trained, capsys, end, said):
    run, items = trained
    warn_of_training_images(run, items[:end])
    error = capsys.readouterr().err
    assert error.count("\n") == bool(said)
    if said:
        assert f"warning: {said} in this model's training, such as {items[2].path}: " in error


def test_an_evaluation_on_them_says_so(trained, tmp_path, capsys):
    run, items = trained
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{item.path},{i % 2}\n" for i, item in enumerate(items)))
    evaluate_command([str(listed)], str(run), str(tmp_path / "o"), workers=0)
    assert "warning: 3 of 7 images were in this model's training" in capsys.readouterr().err
