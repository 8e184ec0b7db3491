"""Lists of images as the field writes them: in CSV, JSON and lines, in the encodings of Windows too."""

import codecs
import csv
import io
import json
import os

import pytest
from dgsnet.data.items import Item, find_items, find_samples
from dgsnet.errors import UserError


def one_line(error):
    return "\n" not in str(error.value)


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
