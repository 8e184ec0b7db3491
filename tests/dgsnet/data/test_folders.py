"""Data sets in folders as the field lays them out: labels, generators and splits by folders' names."""

import os

import pytest
from dgsnet.data.items import find_samples
from dgsnet.errors import UserError

from tests.support.datasets import tree
from tests.support.permissions import folder_of_others, unprivileged


def listing(samples, root):
    return [(os.path.relpath(s.path, root), s.label, s.generator) for s in samples]


def one_line(error):
    return "\n" not in str(error.value)


def test_generator_and_class_folders(tmp_path):
    tree(tmp_path, "progan/cat/0_real/a.png", "progan/cat/1_fake/b.png", "progan/car/1_fake/c.png")
    tree(tmp_path, "biggan/0_real/d.JPG", "biggan/1_fake/e.png")
    assert listing(find_samples(tmp_path), tmp_path) == [
        ("biggan/0_real/d.JPG", 0, "biggan"),
        ("biggan/1_fake/e.png", 1, "biggan"),
        ("progan/car/1_fake/c.png", 1, "progan"),
        ("progan/cat/0_real/a.png", 0, "progan"),
        ("progan/cat/1_fake/b.png", 1, "progan"),
    ]


def test_class_folders_directly_in_the_root(tmp_path):
    root = tree(tmp_path / "sd14", "0_real/a.png", "1_fake/deeper/b.png")
    assert listing(find_samples(root), root) == [
        ("0_real/a.png", 0, "sd14"),
        ("1_fake/deeper/b.png", 1, "sd14"),
    ]
    other = tree(tmp_path / "other", "Nature/a.png", "AI/b.png")
    assert listing(find_samples(other), other) == [("AI/b.png", 1, "other"), ("Nature/a.png", 0, "other")]


def test_genimage(tmp_path):
    name = "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4"
    for split in ("train", "val"):
        tree(tmp_path / name / split, "nature/a.png", "ai/a.png")
    assert listing(find_samples(tmp_path, "val"), tmp_path) == [
        (f"{name}/val/ai/a.png", 1, "stable_diffusion_v_1_4"),
        (f"{name}/val/nature/a.png", 0, "stable_diffusion_v_1_4"),
    ]
    assert len(find_samples(tmp_path, "train")) == 2
    inside = tmp_path / name / "val"
    assert {s.generator for s in find_samples(inside)} == {"imagenet_ai_0419_sdv4"}
    with pytest.raises(UserError, match="splits train, val; choose one with --split") as error:
        find_samples(tmp_path)
    assert one_line(error)


def test_split_folders_around_generators(tmp_path):
    tree(tmp_path, "train/progan/cat/0_real/a.png", "test/biggan/1_fake/b.png")
    assert listing(find_samples(tmp_path, "test"), tmp_path) == [("test/biggan/1_fake/b.png", 1, "biggan")]
    with pytest.raises(UserError, match="no labelled images of split val"):
        find_samples(tmp_path, "val")
    # Named directly, a folder of one split needs no choice, and the choice does not hurt.
    assert find_samples(tmp_path / "train") == find_samples(tmp_path / "train", "train")


def test_innermost_class_folder_decides(tmp_path):
    tree(tmp_path, "progan/nature/1_fake/a.png")
    assert listing(find_samples(tmp_path), tmp_path) == [("progan/nature/1_fake/a.png", 1, "progan")]


def test_other_files_are_no_samples(tmp_path):
    tree(tmp_path, "x/0_real/a.png", "x/b.png", "x/0_real/.hidden.png", "x/.hidden/0_real/c.png")
    (tmp_path / "x/0_real/Thumbs.db").write_bytes(b"0")
    (tmp_path / "x/captions.json").write_text("{}")
    assert listing(find_samples(tmp_path), tmp_path) == [("x/0_real/a.png", 0, "x")]


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path / "elsewhere", "0_real/a.png")
    root = tree(tmp_path / "root", "gan/1_fake/b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gan/1_fake/again").symlink_to(root)
    (root / "gan/1_fake/broken.png").symlink_to(tmp_path / "nowhere.png")
    assert listing(find_samples(root), root) == [
        ("gan/1_fake/b.png", 1, "gan"),
        ("gan/1_fake/broken.png", 1, "gan"),
        ("linked/0_real/a.png", 0, "linked"),
    ]


@pytest.mark.parametrize(
    "name, reason", [("empty", "looked for .*0_real,1_fake.*nature,ai"), ("none", "no such")]
)
def test_nothing_found(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason) as error:
        find_samples(tmp_path / name)
    assert one_line(error) and name in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="needs the permissions of POSIX")
def test_folder_that_cannot_be_listed():
    with folder_of_others() as folder:
        root = folder / "root"
        root.mkdir()
        root.chmod(0)
        with unprivileged(), pytest.raises(UserError, match="root: cannot be listed: Permission denied"):
            find_samples(root)


def test_unknown_split_and_unknown_file(tmp_path):
    with pytest.raises(UserError, match="split 'dev' is unknown; choose one of train, val, test"):
        find_samples(tmp_path, "dev")
    (tmp_path / "list.txt").write_text("a.png 0")
    with pytest.raises(UserError, match=r"ends in \.json or \.csv"):
        find_samples(tmp_path / "list.txt")
