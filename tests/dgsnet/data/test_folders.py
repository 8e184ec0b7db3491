"""Data sets as the field lays them out, in folders and lists."""

import codecs
import csv
import io
import json
import os

import pytest
from dgsnet.data.items import Item, find_items, find_samples
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


# Lists

ROWS = [
    {"path": "z/b.png", "label": 1, "generator": "sd", "caption": "a cat, sitting"},
    {"path": "a.png", "label": "real"},
]


def expected_of_list(folder):
    return [
        Item(str(folder / "z/b.png"), 1, "sd", "a cat, sitting"),
        Item(str(folder / "a.png"), 0, "mine", None),
    ]


def test_json_list(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    assert find_samples(path) == expected_of_list(tmp_path)
    path.write_text(json.dumps({"z/b.png": 1, str(tmp_path / "elsewhere.png"): "0"}))
    assert find_samples(path) == [
        Item(str(tmp_path / "z/b.png"), 1, "mine"),
        Item(str(tmp_path / "elsewhere.png"), 0, "mine"),
    ]


def test_csv_list(tmp_path):
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["path", "label", "generator", "caption"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert find_samples(path) == expected_of_list(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", ["csv", "json", "txt", "-"])
def test_lists_in_every_encoding_that_windows_writes(tmp_path, monkeypatch, kind, encoding):
    """With a byte-order mark, as PowerShell's > does; the names are no ASCII."""
    names = ["häuser/größe.png", "漢字.png"]
    text = {
        "csv": "path,label\r\n" + "".join(f"{name},1\r\n" for name in names),
        "json": json.dumps([{"path": name, "label": 1} for name in names], ensure_ascii=False),
    }.get(kind, "".join(f"{name}\r\n" for name in names))
    data = codecs.BOM_UTF16_BE * (encoding == "utf-16-be") + text.encode(encoding)
    path = tmp_path / f"list.{kind}"
    path.write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    monkeypatch.chdir(tmp_path)
    found = [os.path.relpath(item.path, tmp_path) for item in find_items([path if kind != "-" else "-"])]
    assert found == names
    if kind in ("csv", "json"):
        assert [item.path for item in find_samples(path)] == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("text", ["a.png\nb.png\n", "path\na.png\n"])
def test_a_list_in_unmarked_utf_16_gives_no_rows_of_nuls(tmp_path, monkeypatch, text):
    for path in (tmp_path / "a.txt", tmp_path / "a.csv"):
        path.write_bytes(text.encode("utf-16-le"))
        with pytest.raises(UserError, match="a byte-order mark: save it as UTF-8") as error:
            list(find_items([path]))
        assert one_line(error) and str(path) in str(error.value)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-16-le"))))
    with pytest.raises(UserError, match="standard input looks like UTF-16"):
        list(find_items(["-"]))


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.json", "{", "not readable as JSON"),
        ("a.json", "[1, 2]", "expected a JSON array"),
        ("a.json", "[]", "list is empty"),
        ("a.json", '[{"path": "x.png"}]', "entry 1: label None is unknown"),
        ("a.json", '[{"path": "x.png", "label": 0}, {"label": 1}]', "entry 2: path is missing"),
        ("a.json", '{"x.png": 2}', "entry 1: label 2 is unknown"),
        ("a.json", '[{"path": "x.png", "label": 0, "caption": ["a"]}]', "entry 1: caption is not text"),
        (
            "a.json",
            '[{"path": "x.png", "label": 0, "caption": "' + "a" * (2**20 + 1) + '"}]',
            "a caption of more than 1,048,576 letters",
        ),
        ("a.csv", "x.png,0\n", "must name the columns path and label"),
        ("a.csv", "", "must name the columns path and label"),
        ("a.csv", "path,label\n", "list is empty"),
        ("a.csv", "path,label\nx.png,0\ny.png,\n", "line 3: label '' is unknown"),
        ("a.csv", b"path,label\n\xff\xfe.png,0\n", "not readable as CSV in UTF-8"),
        ("a.csv", "path,label\nx.png,0\n".encode("utf-16")[:-1], "not readable as CSV in UTF-8 or UTF-16"),
        ("a.json", '{"x.png": 0}'.encode("utf-16")[:-1], "not readable as JSON"),
        ("a.json", '{"x.png": ' + "1" * 5000 + "}", "not readable as JSON"),
    ],
)
def test_bad_lists_are_named_in_one_line(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason) as error:
        find_samples(tmp_path / name)
    assert one_line(error) and str(tmp_path / name) in str(error.value)
