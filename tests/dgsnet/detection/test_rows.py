"""A score as a row, and the images that have none yet."""

import pytest
from dgsnet.data.items import Item
from dgsnet.data.tables import Table
from dgsnet.detection.detector import Detector
from dgsnet.detection.rows import Row, Todo, columns, kept


@pytest.fixture(scope="module")
def detector(run):
    return Detector.load(run, device="cpu")


def test_a_row_agrees_with_itself(detector):
    """What is written with six decimals decides."""
    item = Item("a.png")
    assert Row.of(detector, item, 0.5000004, "") == Row("a.png", 0.5, "real", "")
    assert Row.of(detector, item, 0.5000006, "") == Row("a.png", 0.500001, "generated", "")
    assert Row.of(detector, item, float("nan"), "broken") == Row("a.png", None, "", "broken")
    assert Row.of(detector, item, [0.7, 0.9, 0.6], "") == Row("a.png", 0.7, "generated", "", 0.3)
    assert Row.of(detector, item, [0.7, 0.2], "") == Row("a.png", 0.7, "unsure", "", 0.5)


def test_columns_are_those_asked_for():
    plain = ("path", "probability", "decision", "error")
    words = ("provenance", "issuer", "source_type", "provenance_note")
    assert columns() == plain and columns(consistency=True) == (*plain, "spread")
    assert columns(provenance=True) == (*plain, *words)
    unsigned = ("declared", "declared_by")
    assert columns(declared=True) == (*plain, *unsigned)
    every = columns(consistency=True, provenance=True, declared=True)
    assert every == (*plain, "spread", *words, *unsigned) == Row._fields
    assert kept(declared=True) == every and kept(declared=False) == every[:-2]


@pytest.mark.parametrize(
    ("done", "left"),
    [
        ("", "cabbad"),
        ("cab", "bad"),
        ("abc", "bad"),
        ("dabbac", ""),
        ("xxab", "cbad"),
        ("bbb", "caad"),
    ],
)
def test_images_without_a_row_come_in_their_order(tmp_path, done, left):
    """A list may repeat an image, and rows may be in another order or of images that went."""
    for name in "abcd":
        (tmp_path / name).touch()
    (tmp_path / "l.txt").write_text("\n".join("cabbad"))
    with Table(tmp_path / "t", {"s": 1}, Row._fields) as table:
        for name in done:
            table.add(Row(f"{tmp_path}/{name}", 0.5, "real", "")._asdict())
    with Table(tmp_path / "t", {"s": 1}, Row._fields) as table:
        # This row is later than what was there.
        table.add(Row(f"{tmp_path}/d", 0.5, "real", "")._asdict())
        todo = Todo([str(tmp_path / "l.txt")], table.path, table.end)
        assert [item.path.rpartition("/")[2] for item in todo] == list(left)
