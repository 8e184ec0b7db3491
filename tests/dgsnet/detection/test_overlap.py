"""Images that are there twice are told by content, where a model is trained and where it is measured."""

import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet.cli import main
from dgsnet.data.images import file_hash
from dgsnet.data.items import Item, find_items
from dgsnet.detection.overlap import distinct, in_training, shared, warn_of_training_images
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


def places(tmp_path, container):
    """Items of the same seven files, by name, in a folder, a tar or a Parquet file."""
    if container == "folder":
        return [Item(str(tmp_path / f"{i:02}.png")) for i in range(7)]
    path = tmp_path / f"all.{container}"
    pictures = [(tmp_path / f"{i:02}.png").read_bytes() for i in range(7)]
    if container == "parquet":
        pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), path, row_group_size=3)
    else:
        with tarfile.open(path, "w") as tar:
            for i in range(7):
                tar.add(tmp_path / f"{i:02}.png", f"{i:02}.png")
    return list(find_items([str(path)]))


@pytest.mark.parametrize("container", ["folder", "tar", "parquet"])
def test_what_two_share_is_found_wherever_it_lies(tmp_path, container):
    save_noise(tmp_path, 7)
    items = places(tmp_path, container)
    copy, longer, other = tmp_path / "copy.png", tmp_path / "longer.png", tmp_path / "other.png"
    content = (tmp_path / "03.png").read_bytes()
    copy.write_bytes(content)
    longer.write_bytes(content + b" ")
    # This file has the same size.
    other.write_bytes(content[:-1] + b" ")
    mine = [Item(str(path)) for path in (longer, tmp_path / "gone.png", copy, other, copy)]
    assert shared(items, mine) == [mine[2], mine[4]] and shared(mine, items) == [items[3]]
    assert shared(mine[:2], items) == [] == shared(items, mine[:2])
    assert distinct([*items, *mine, mine[1]]) == [*items, mine[0], mine[1], mine[3], mine[1]]
    assert shared(items, mine, seconds=-1) == []


def test_training_says_what_its_validation_shares_with_it(trained, tmp_path, capsys):
    """And what has both labels, in one line each."""
    _, items = trained
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    train.write_text("path,label\n" + "".join(f"{item.path},{i % 2}\n" for i, item in enumerate(items[:5])))
    (tmp_path / "copy.png").write_bytes((tmp_path / "03.png").read_bytes())
    val.write_text("path,label\ncopy.png,0\n05.png,1\n06.png,0\n")
    settings = {"data.train": [str(train)], "data.val": [str(val)], "model.name": "dgsnet-tiny"}
    settings |= {
        "data.captions": "none",
        "optim.max_steps": 1,
        "optim.batch_size": 2,
        "preprocess.image_size": 32,
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    main(["train", *words, "--surgery", "none", "--preprocess.mode", "crop", "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dgsnet: warning")]
    first, second, *_ = lines
    assert f"1 of 3 validation image is in the training too, such as {tmp_path / 'copy.png'}: " in first
    assert f"1 of 3 generated image has a file that is labelled real too, such as {items[3].path}: " in second


def test_an_evaluation_of_files_with_both_labels_says_so(trained, tmp_path, capsys):
    run, items = trained
    listed = tmp_path / "list.csv"
    rows = [(0, 0), (1, 1), (2, 0), (1, 0), (0, 1), (6, 1)]
    listed.write_text("path,label\n" + "".join(f"{items[i].path},{label}\n" for i, label in rows))
    (run / "best" / "training_images.npy").unlink()
    evaluate_command([str(listed)], str(run), str(tmp_path / "o"), workers=0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"2 of 3 generated images have files that are labelled real too, such as {items[1].path}" in line
