"""Captions from JSON files, and the images that they are of."""

import json

import pytest
from dgsnet.data.captions import attach_captions
from dgsnet.data.items import find_samples
from dgsnet.errors import UserError

from tests.dgsnet.data.test_lists import ROWS
from tests.support.datasets import tree


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture
def captioned(tmp_path):
    root = tree(tmp_path / "root", "gan/0_real/a.png", "gan/1_fake/b.png")
    return root, find_samples(root)


def captions_of(samples):
    return [sample.caption for sample in samples]


def test_captions_by_every_kind_of_key(captioned, tmp_path):
    root, samples = captioned
    captions = tmp_path / "texts" / "all.json"
    captions.parent.mkdir()
    keys = (
        [samples[0].path, samples[1].path],
        ["gan/0_real/a.png", "./gan/1_fake/b.png"],
        ["../root/gan/0_real/a.png", "../root/gan/1_fake/b.png"],
    )
    for first, second in keys:
        captions.write_text(json.dumps({first: "real", second: "fake", "unused.png": "x"}))
        assert captions_of(attach_captions(samples, captions, root)) == ["real", "fake"]


def test_relative_root(captioned, tmp_path, monkeypatch):
    root, samples = captioned
    (root / "captions.json").write_text(json.dumps({s.path: "absolute" for s in samples}))
    monkeypatch.chdir(tmp_path)
    assert captions_of(attach_captions(find_samples("root"), "auto", "root")) == ["absolute"] * 2


def test_auto_reads_the_root_and_its_splits(tmp_path):
    tree(tmp_path, "train/gan/0_real/a.png", "val/gan/0_real/a.png")
    for split in ("train", "val"):
        (tmp_path / split / "captions.json").write_text(json.dumps({"gan/0_real/a.png": split}))
        samples = find_samples(tmp_path, split)
        assert captions_of(attach_captions(samples, "auto", tmp_path)) == [split]
        assert captions_of(attach_captions(samples, "auto", tmp_path / split)) == [split]


def test_where_two_readings_of_a_key_meet_the_files_own_folder_wins(tmp_path):
    """Each key is read relative to its JSON's folder and to the root; the same key means two images here."""
    key = "gan/0_real/a.png"
    tree(tmp_path, key, f"train/{key}")
    for folder in (tmp_path, tmp_path / "train"):
        (folder / "captions.json").write_text(json.dumps({key: f"of {folder.name}"}))
    samples = find_samples(tmp_path, "train")
    expected = [f"of {tmp_path.name}", "of train"]
    assert captions_of(attach_captions(samples, "auto", tmp_path)) == expected
    # One file alone: its own folder's reading of a key wins over the root's, whichever comes first in it.
    both = {f"../{key}": "up", key: "down"}
    for order in (both, dict(reversed(both.items()))):
        (tmp_path / "train" / "other.json").write_text(json.dumps(order))
        assert captions_of(attach_captions(samples, tmp_path / "train" / "other.json", tmp_path)) == [
            "up",
            "down",
        ]


def test_captions_that_some_images_lack(captioned):
    root, samples = captioned
    (root / "captions.json").write_text(json.dumps({"gan/1_fake/b.png": "x"}))
    assert captions_of(attach_captions(samples, "auto", root, partly=True)) == [None, "x"]
    (root / "captions.json").write_text("{}")
    with pytest.raises(UserError, match="2 of 2 images have no caption"):
        attach_captions(samples, "auto", root, partly=True)


def test_captions_of_a_list_are_kept_and_completed(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "from the file", "z/b.png": "not this"}))
    samples = attach_captions(find_samples(path), "auto", path)
    assert captions_of(samples) == ["a cat, sitting", "from the file"]
    assert captions_of(attach_captions(samples, "none", path)) == ["", ""]


def test_missing_captions_are_counted_with_the_remedy(captioned):
    root, samples = captioned
    with pytest.raises(UserError, match=r"2 of 2 images .*captions\.json, which does not exist"):
        attach_captions(samples, "auto", root)
    (root / "captions.json").write_text(json.dumps({"gan/0_real/a.png": "x"}))
    with pytest.raises(UserError) as error:
        attach_captions(samples, "auto", root)
    message = str(error.value)
    assert one_line(error) and message.startswith(
        f"1 of 2 images have no caption, the first is {samples[1].path}"
    )
    assert f"`dgsnet caption --data {root}`" in message and "captions none" in message


@pytest.mark.parametrize(
    "text, reason", [("[1]", "JSON object"), ('{"a": 1}', "JSON object"), ("{", "as JSON")]
)
def test_unusable_captions(captioned, tmp_path, text, reason):
    root, samples = captioned
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=rf"c\.json.*{reason}"):
        attach_captions(samples, tmp_path / "c.json", root)
    with pytest.raises(UserError, match=r"nowhere\.json.*No such file"):
        attach_captions(samples, tmp_path / "nowhere.json", root)
