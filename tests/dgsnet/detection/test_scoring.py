"""`dgsnet predict` scores what it is given and writes one row for each image."""

import csv
import io
import json
import os
import signal
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from dgsnet.data.items import Item, find_items
from dgsnet.detection.detector import Detector
from dgsnet.detection.scoring import predict_command, score
from dgsnet.errors import UserError
from dgsnet.model.backbones import OpenClip
from PIL import Image

from tests.support.pictures import vast_webp
from tests.support.tables import interrupted, read_csv, same


def test_the_table(run, images, table, tmp_path, capsys):
    assert len(table) == 80 and {row["decision"] for row in table.values()} == {"real", "generated"}
    for row in table.values():
        assert row["decision"] == ("generated" if float(row["probability"]) > 0.5 else "real")

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    out = tmp_path / "new" / "scores.csv"
    predict_command([str(images), str(broken), str(tmp_path / "missing.png")], run, str(out))
    written = read_csv(out)
    assert list(written[0]) == ["path", "probability", "decision", "error"]
    assert written[-2:] == [
        dict(path=str(broken), probability="", decision="", error=f"{broken}: empty file"),
        dict(path=f"{tmp_path}/missing.png", probability="", decision="")
        | {"error": f"{tmp_path}/missing.png: no such file or folder"},
    ]
    same(written[:-2], table)
    assert not list(out.parent.glob("*.partial"))
    printed = capsys.readouterr()
    found = [row["decision"] for row in table.values()]
    counts = f"{found.count('generated')} generated, {found.count('real')} real, 2 could not be read; "
    assert f"{out}: {counts}" in printed.out and "images per second" in printed.out

    alone = tmp_path / "alone.csv"
    predict_command([written[7]["path"]], run, str(alone))
    assert read_csv(alone) == [written[7]]


def test_jsonl_and_parquet_hold_the_same_table(run, images, table, tmp_path):
    # This name is no UTF-8 and has two lines.
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.png")
    Image.new("RGB", (40, 40)).save(odd)
    for suffix in (".csv", ".jsonl", ".parquet"):
        predict_command([str(images), odd, "nowhere.png"], run, str(tmp_path / f"t{suffix}"), workers=0)

    with open(tmp_path / "t.csv", newline="", errors="surrogateescape") as file:
        expected = [
            row
            | dict(probability=float(row["probability"]) if row["probability"] else None)
            | {column: row[column] or None for column in ("decision", "error")}
            for row in csv.DictReader(file)
        ]
    assert expected[-1]["probability"] is None and expected[-2]["path"] == odd
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()] == expected
    expected[-2]["path"] = f"{tmp_path}/\\xff\n.png"
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == expected


def test_where_company_shows_the_run_says_so_and_scores_images_alone(run, images, tmp_path, monkeypatch):
    """By a backend that has an image's bits depend a little on the others of its batch."""
    embed = OpenClip.embed

    def mixed(self, pixels):
        tokens, contexts = embed(self, pixels)
        return tokens + 1e-2 * tokens.mean(dim=0), contexts

    monkeypatch.setattr(OpenClip, "embed", mixed)
    arguments = [f"{images}/0*.png"], run
    predict_command(*arguments, str(tmp_path / "alone.csv"), device="cpu")
    with pytest.warns(UserWarning, match="in batches of 4 the bits .*: images are scored one by one"):
        interrupted(predict_command, *arguments, str(tmp_path / "s.csv"), rows=3, device="cpu", batch=4)
    predict_command(*arguments, str(tmp_path / "s.csv"), device="cpu", batch=1, resume=True)
    assert read_csv(tmp_path / "s.csv") == read_csv(tmp_path / "alone.csv")


def test_lists(run, images, table, tmp_path, monkeypatch):
    names = sorted(table)
    (tmp_path / "list.txt").write_text("\n".join(f"{images}/{name}" for name in names[::-1]) + "\r\n\n")
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "path"])
        writer.writerows((0, os.path.relpath(images / name, tmp_path)) for name in names)
    stdin = io.BytesIO(b"".join(os.fsencode(images / name) + b"\n" for name in names))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin))
    for source in (str(tmp_path / "list.txt"), str(tmp_path / "list.csv"), "-"):
        out = tmp_path / "scores.csv"
        predict_command([source], run, str(out))
        same(read_csv(out), table)
        if source.endswith("txt"):
            assert [os.path.basename(row["path"]) for row in read_csv(out)] == names[::-1]

    # A list has a row for each line, repeated or bad.
    (tmp_path / "twice.txt").write_text(f"{images}/00.png\n{images}/00.png\n{images}\nno\0where.png\n")
    predict_command([str(tmp_path / "twice.txt")], run, str(out))
    assert [bool(row["error"]) for row in read_csv(out)] == [False, False, True, True]
    assert "is a directory" in read_csv(out)[2]["error"]
    assert read_csv(out)[3]["path"].endswith("no\ufffdwhere.png")

    (tmp_path / "bad.csv").write_text("file,label\na.png,0\n")
    (tmp_path / "empty.txt").write_text("")
    for source, reason in (("bad.csv", "must name a column path"), ("empty.txt", "the list is empty")):
        with pytest.raises(UserError, match=reason):
            predict_command([str(tmp_path / source)], run, str(out))


def test_tar_shards(run, images, table, tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/shard-%03d.tar", maxcount=30, verbose=0) as writer:
        for name in sorted(table):
            data = (images / name).read_bytes()
            writer.write({"__key__": name.removesuffix(".png"), "png": data, "cls": 1, "json": {"a": 1}})
    for pattern in ("shard-{000..002}.tar", "shard-*.tar"):
        out = tmp_path / "scores.csv"
        predict_command([str(tmp_path / pattern)], run, str(out), workers=2)
        written = read_csv(out)
        same(written, table)
        assert written[31]["path"] == f"{tmp_path}/shard-001.tar/31.png"


@pytest.mark.parametrize("kind", ["binary", "large", "struct"])
def test_parquet(run, images, table, tmp_path, kind):
    data = [(images / name).read_bytes() for name in sorted(table)]
    if kind == "struct":
        # Hugging Face's datasets writes images like this.
        column = pa.array([{"bytes": d, "path": None} for d in data])
    else:
        column = pa.array(data, pa.binary() if kind == "binary" else pa.large_binary())
    columns = {"label": pa.array([0] * len(data)), "image": column, "thumbnail": pa.array([b""] * len(data))}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=33)
    out = tmp_path / "scores.csv"
    predict_command([str(tmp_path / "t.parquet")], run, str(out))
    written = read_csv(out)
    assert [row["path"] for row in written] == [f"{tmp_path}/t.parquet/{i}" for i in range(len(data))]
    same([row | {"path": f"{i:02}.png"} for i, row in enumerate(written)], table)


def test_links_out_of_the_folder_and_what_is_no_file(run, images, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes((images / "00.png").read_bytes())
    (inside / "out.png").symlink_to(outside / "a.png")
    (inside / "folder").symlink_to(outside)
    (inside / "within.png").symlink_to("sub/a.png")
    (inside / "again").symlink_to("sub")
    (inside / "circle").symlink_to(".")
    (inside / "dangling.png").symlink_to("nowhere.png")
    (inside / "self.png").symlink_to("self.png")
    os.mkfifo(inside / "pipe.png")
    (inside / "sub" / "folder.png").mkdir()
    out = tmp_path / "scores.csv"

    expected = {
        "dangling.png": "a link to nothing",
        "folder": f"a link out of {inside}, not followed",
        "out.png": f"a link out of {inside}, not followed",
        "pipe.png": "not a regular file",
        "self.png": "cannot be opened: Too many levels of symbolic links",
        "sub/a.png": "",
        "within.png": "",
    }
    predict_command([str(inside)], run, str(out))
    found = {row["path"].removeprefix(f"{inside}/"): row["error"] for row in read_csv(out)}
    assert found == {name: reason and f"{inside}/{name}: {reason}" for name, reason in expected.items()}
    predict_command([f"{inside}/*.png"], run, str(out))
    found = {row["path"].removeprefix(f"{inside}/"): bool(row["error"]) for row in read_csv(out)}
    assert found == {
        name: bool(expected[name]) for name in expected if name.endswith(".png") and "/" not in name
    }

    # What is named outright is followed, and devices are not waited for.
    predict_command([str(inside / "out.png"), "/dev/zero", "/dev/stdin"], run, str(out))
    assert [row["error"].rpartition(": ")[2] for row in read_csv(out)] == ["", *["not a regular file"] * 2]


def test_nothing_to_score_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder") as error:
        predict_command([str(tmp_path / "nowhere")], run, str(tmp_path / "s.csv"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images"):
        predict_command([str(tmp_path / "broken.png")], run, str(tmp_path / "s.csv"))
    assert "empty" in read_csv(tmp_path / "s.csv")[0]["error"]
    with pytest.raises(UserError, match=r"s.xlsx: the table's name must end in one of .csv, .jsonl"):
        predict_command([str(tmp_path / "broken.png")], run, str(tmp_path / "s.xlsx"))


@dataclass(frozen=True, slots=True)
class Deadly(Item):
    """An image whose decoder takes its process with it."""

    def read(self):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_an_image_that_kills_its_reader_costs_one_row(run, images, table):
    detector = Detector.load(run, device="cpu")
    items = list(find_items([str(images)]))[:12]
    items[5:5] = [Deadly("first.png")]
    items.append(Deadly("last.png"))
    seen, died = [], []
    before = signal.signal(signal.SIGCHLD, lambda *_: died.append(True))
    try:
        noted = score(detector, iter(items), workers=2, on_score=lambda item, row: seen.append(item.path))
        found = list(noted)
        os.kill(os.getpid(), signal.SIGCHLD)
        # The signal is its owner's again.
        assert died
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert [row.path for row in found] == [item.path for item in items]
    assert {row.path: row.error for row in found if row.error} == {
        name: f"{name}: the process that read it died" for name in ("first.png", "last.png")
    }
    for row in found:
        if not row.error:
            assert f"{row.probability:.6f}" == table[os.path.basename(row.path)]["probability"]
    assert seen == [row.path for row in found if not row.error]


def test_an_image_beyond_the_limits_costs_one_row(run, images, table, tmp_path):
    """In this process too."""
    (tmp_path / "vast.webp").write_bytes(vast_webp())
    paths = [str(images / "03.png"), str(tmp_path / "vast.webp"), str(images / "05.png")]
    predict_command(paths, run, str(tmp_path / "s.csv"), workers=0)
    before, vast, after = read_csv(tmp_path / "s.csv")
    assert vast["error"] == f"{paths[1]}: it takes more than 1.2 GiB of memory to read"
    same([before, after], {name: table[name] for name in ("03.png", "05.png")})


def test_endless_sources_are_not_read_ahead(run, images):
    detector = Detector.load(run, device="cpu")
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Item("a.png", container=str(images / "00.png"))

    found = score(detector, endless(), workers=2)
    for _ in range(100):
        assert next(found).error == ""
    found.close()
    assert taken < 120
