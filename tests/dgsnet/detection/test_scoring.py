"""`dgsnet predict` finds what it is given, writes one row for each image, and loses none to a kill."""

import csv
import io
import json
import os
import signal
import tarfile
import time
from dataclasses import dataclass, fields

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from dgsnet.data.sources import Item, find_items
from dgsnet.data.tables import Partial
from dgsnet.detection.decisions import Calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.rows import Score
from dgsnet.detection.scoring import predict_command, score, settings
from dgsnet.errors import UserError
from PIL import Image

from tests.support.fresh import FORKSERVER
from tests.support.permissions import folder_of_others, unprivileged
from tests.support.tiny import CROP, save_noise, save_tiny

N = 80


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model with random weights whose adapters and head are not at their initial zeros."""
    return str(save_tiny(tmp_path_factory.mktemp("run"), CROP))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_noise(tmp_path_factory.mktemp("images"), N)


@pytest.fixture(scope="module")
def table(run, images, tmp_path_factory):
    """Rows of all images, by file name, of one undisturbed run."""
    out = tmp_path_factory.mktemp("table") / "scores.csv"
    predict_command([str(images)], run, str(out), workers=0)
    return {os.path.basename(row["path"]): row for row in rows(out)}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(found, table):
    """The rows found are the table's, whatever their paths are called."""
    found = {os.path.basename(row["path"]): row for row in found}
    assert found.keys() == table.keys()
    for name, row in found.items():
        assert row["path"].endswith(name)
        for column in ("probability", "decision", "error"):
            assert row[column] == table[name][column], name


def paths_of(items, folder):
    return [item.name.removeprefix(f"{folder}/") for item in items if not item.error]


def errors_of(items, folder):
    return {item.name.removeprefix(f"{folder}/"): item.error for item in items if item.error}


def test_the_table(run, images, table, tmp_path, capsys):
    assert len(table) == N and {row["decision"] for row in table.values()} == {"real", "generated"}
    for row in table.values():
        assert row["decision"] == ("generated" if float(row["probability"]) > 0.5 else "real")

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    out = tmp_path / "new" / "scores.csv"
    predict_command([str(images), str(broken), str(tmp_path / "missing.png")], run, str(out))
    written = rows(out)
    assert list(written[0]) == ["path", "probability", "decision", "error"]
    assert written[-2:] == [
        dict(path=str(broken), probability="", decision="", error=f"{broken}: empty file"),
        dict(path=f"{tmp_path}/missing.png", probability="", decision="")
        | {"error": f"{tmp_path}/missing.png: no such file or folder"},
    ]
    same(written[:-2], table)
    assert not list(out.parent.glob("*.partial"))
    printed = capsys.readouterr()
    assert "2 could not be read; " in printed.out and "images per second" in printed.out

    alone = tmp_path / "alone.csv"
    predict_command([written[7]["path"]], run, str(alone))
    assert rows(alone) == [written[7]]


def test_jsonl_and_parquet_hold_the_same_table(run, images, table, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.png")  # no UTF-8, two lines
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


def test_files_folders_and_patterns(tmp_path):
    for name in (
        "a.png",
        "b.JPG",
        "notes.md",
        "deep/er/c.webp",
        "deep/d.jpeg",
        "odd[1].png",
        "._a.png",
        ".x/e.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*names):
        return paths_of(find_items([tmp_path / name for name in names]), tmp_path)

    def missing(*names):
        return [item.error for item in find_items([tmp_path / name for name in names]) if item.missing]

    assert found(".") == ["a.png", "b.JPG", "deep/d.jpeg", "deep/er/c.webp", "odd[1].png"]
    assert found("b.JPG", "a.png", "b.JPG", ".")[:3] == ["b.JPG", "a.png", "deep/d.jpeg"]
    assert found("*.png") == ["a.png", "odd[1].png"]
    assert found("odd[1].png") == ["odd[1].png"]
    assert found("**/*.webp") == ["deep/er/c.webp"]
    assert found("dee*") == ["deep/d.jpeg", "deep/er/c.webp"]
    assert found("{deep/d,a}.{jpeg,png}") == ["deep/d.jpeg", "a.png"]
    assert found("notes.md") == ["notes.md"]
    assert missing("none.png", "*.gif") == ["no such file or folder", "no image matches this pattern"]
    assert missing("{deep/d,a}.png") == ["no such file or folder"]
    (tmp_path / "empty").mkdir()
    assert missing("empty")[0].startswith("no image in this folder")


def test_a_folder_is_gone_through_without_being_held(tmp_path):
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "z.png").touch()
    (tmp_path / "a.png").touch()
    items = find_items([str(tmp_path)])
    assert next(items).name == f"{tmp_path}/a.png"
    (tmp_path / "d" / "b.png").touch()  # its folder has not been opened yet
    assert [os.path.basename(item.name) for item in items] == ["b.png", "z.png"]


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
        same(rows(out), table)
        if source.endswith("txt"):
            assert [os.path.basename(row["path"]) for row in rows(out)] == names[::-1]

    # A list has a row for each line, repeated or bad.
    (tmp_path / "twice.txt").write_text(f"{images}/00.png\n{images}/00.png\n{images}\nno\0where.png\n")
    predict_command([str(tmp_path / "twice.txt")], run, str(out))
    assert [bool(row["error"]) for row in rows(out)] == [False, False, True, True]
    assert "is a directory" in rows(out)[2]["error"]
    assert rows(out)[3]["path"].endswith("no\ufffdwhere.png")

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
        written = rows(out)
        same(written, table)
        assert written[31]["path"] == f"{tmp_path}/shard-001.tar/31.png"


def test_members_of_a_tar_that_are_not_read(tmp_path):
    path = str(tmp_path / "odd.tar")
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("/etc/absolute.png", tarfile.REGTYPE),
            ("a/../../out.png", tarfile.REGTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("._hidden.png", tarfile.REGTYPE),
            ("text.txt", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        good = tarfile.TarInfo("good.png")
        good.size = 10
        tar.addfile(good, io.BytesIO(b"0123456789"))
    items = list(find_items([path]))
    assert paths_of(items, path) == ["good.png"]
    assert errors_of(items, path) == {
        "link.png": "a link in a tar, not followed",
        "hard.png": "a link in a tar, not followed",
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "/etc/absolute.png": "its name leads out of the tar",
        "a/../../out.png": "its name leads out of the tar",
    }


def huge_header():
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2**34
    return header.tobuf()


def many_headers():
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    return header.tobuf() * 5000


def test_damaged_shards_cost_one_row(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 2000
        tar.addfile(member, io.BytesIO(bytes(2000)))
    kinds = {
        "noise.tar": bytes(range(256)) * 8,
        "gzip.tar": b"\x1f\x8b\x08" + bytes(600),
        "huge.tar": huge_header() + bytes(1024),
        "many.tar": many_headers() + bytes(1024),
        "noise.parquet": bytes(range(256)) * 8,
        "short.parquet": b"PAR1",
    }
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
        [item] = find_items([str(tmp_path / name)])
        assert item.name == f"{tmp_path}/{name}" and "not readable as" in item.error, name
        assert "\n" not in item.error
    (tmp_path / "huge.tar").write_bytes(b"")
    os.truncate(tmp_path / "huge.tar", 2**40)  # sparse: a terabyte of zeros ends the archive at once
    [item] = find_items([str(tmp_path / "huge.tar")])
    assert item.missing

    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:1500])
    items = list(find_items([str(tmp_path / "cut.tar")]))
    assert items[0].name.endswith("cut.tar/a.png")
    with pytest.raises(Exception, match=r"cut.tar/a.png: cut off by the end of its file"):
        items[0].read()
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("pipe.tar", "pipe.parquet"):
        [item] = find_items([str(tmp_path / name)])
        assert "not a regular file" in item.error


@pytest.mark.parametrize("kind", ["binary", "large", "struct"])
def test_parquet(run, images, table, tmp_path, kind):
    data = [(images / name).read_bytes() for name in sorted(table)]
    if kind == "struct":  # as Hugging Face's datasets writes images
        column = pa.array([{"bytes": d, "path": None} for d in data])
    else:
        column = pa.array(data, pa.binary() if kind == "binary" else pa.large_binary())
    columns = {"label": pa.array([0] * N), "image": column, "thumbnail": pa.array([b""] * N)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=33)
    out = tmp_path / "scores.csv"
    predict_command([str(tmp_path / "t.parquet")], run, str(out))
    written = rows(out)
    assert [row["path"] for row in written] == [f"{tmp_path}/t.parquet/{i}" for i in range(N)]
    same([row | {"path": f"{i:02}.png"} for i, row in enumerate(written)], table)


def test_rows_of_parquet_without_bytes(images, tmp_path):
    (tmp_path / "inside.png").write_bytes((images / "00.png").read_bytes())
    column = [
        {"bytes": None, "path": "inside.png"},
        {"bytes": None, "path": str(images / "00.png")},
        {"bytes": None, "path": "../../etc/passwd"},
        {"bytes": None, "path": None},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"photo": pa.array(column, kind)}), tmp_path / "t.parquet")
    items = list(find_items([str(tmp_path / "t.parquet")]))
    assert items[0].read().shape[2] == 3
    for item, reason in zip(items[1:], ["a link out of", "a link out of", "no image in", "no image in"]):
        with pytest.raises(Exception, match=f"{item.name}: {reason}"):
            item.read()
    pq.write_table(pa.table({"image": [bytes(2**26 + 1), b"small"]}), tmp_path / "large.parquet")
    large, small = find_items([str(tmp_path / "large.parquet")])
    assert large.error.startswith("larger than 67,108,864 bytes") and large.data is None
    assert small.data == b"small"
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), tmp_path / "two.parquet")
    [item] = find_items([str(tmp_path / "two.parquet")])
    assert "several columns of bytes (a, b); call the one of the images image" in item.error


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
    found = {row["path"].removeprefix(f"{inside}/"): row["error"] for row in rows(out)}
    assert found == {name: reason and f"{inside}/{name}: {reason}" for name, reason in expected.items()}
    predict_command([f"{inside}/*.png"], run, str(out))
    found = {row["path"].removeprefix(f"{inside}/"): bool(row["error"]) for row in rows(out)}
    assert found == {
        name: bool(expected[name]) for name in expected if name.endswith(".png") and "/" not in name
    }

    # What is named outright is followed, and devices are not waited for.
    predict_command([str(inside / "out.png"), "/dev/zero", "/dev/stdin"], run, str(out))
    assert [row["error"].rpartition(": ")[2] for row in rows(out)] == ["", *["not a regular file"] * 2]


@pytest.mark.skipif(os.name == "nt", reason="needs the permissions of POSIX")
def test_what_may_not_be_read():
    with folder_of_others() as folder:
        for name in ("closed", "open"):
            (folder / name).mkdir(parents=True)
            (folder / name / "a.png").touch()
        (folder / "b.png").touch()
        (folder / "b.png").chmod(0)
        (folder / "closed").chmod(0)
        with unprivileged():
            items = list(find_items([str(folder)]))
            assert paths_of(items, folder) == ["b.png", "open/a.png"]
            assert errors_of(items, folder) == {"closed/": "cannot be listed: Permission denied"}
            with pytest.raises(Exception, match=r"b.png: cannot be opened: Permission denied$"):
                items[0].read()
        (folder / "closed").chmod(0o700)


def test_nothing_to_score_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder") as error:
        predict_command([str(tmp_path / "nowhere")], run, str(tmp_path / "s.csv"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images"):
        predict_command([str(tmp_path / "broken.png")], run, str(tmp_path / "s.csv"))
    assert "empty" in rows(tmp_path / "s.csv")[0]["error"]
    with pytest.raises(UserError, match=r"s.xlsx: the table's name must end in one of .csv, .jsonl"):
        predict_command([str(tmp_path / "broken.png")], run, str(tmp_path / "s.xlsx"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_killed_run_goes_on_without_losing_or_repeating_a_row(run, images, table, tmp_path, suffix):
    out = tmp_path / f"scores{suffix}"
    part = tmp_path / f"scores{suffix}.partial"
    arguments = ([str(images)], run, str(out))
    options = {"workers": 1, "resume": True}
    kept = [0]
    for least in (5, 40):
        child = FORKSERVER.Process(target=predict_command, args=arguments, kwargs=options)
        child.start()
        while child.is_alive() and (not part.exists() or part.read_bytes().count(b"\n") < least):
            time.sleep(0.002)
        workers = psutil.Process(child.pid).children(recursive=True)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert workers and not psutil.wait_procs(workers, timeout=20)[1]
        assert not out.exists()
        kept.append(part.read_bytes().count(b"\n") - 1)
        with open(part, "ab") as file:
            file.write(b'{"path": "half a li')  # what a kill in the middle of a write leaves
    assert 0 < kept[1] < kept[2] < N

    with pytest.raises(UserError, match=f"holds {kept[2]} rows of a stopped run: go on with --resume"):
        predict_command(*arguments)
    predict_command(*arguments, **options)
    assert not part.exists()
    if suffix == ".csv":
        written = rows(out)
        assert [row["path"] for row in written] == [f"{images}/{name}" for name in sorted(table)]
        same(written, table)
    else:
        assert pq.read_table(out)["path"].to_pylist() == [f"{images}/{name}" for name in sorted(table)]


def test_what_changed_since_the_kill(run, images, tmp_path, monkeypatch):
    """Rows that are there stay; images that came since get theirs; a list's repetitions are counted."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "d.png", "e.png"):
        (folder / name).write_bytes((images / "00.png").read_bytes())
    listed = tmp_path / "l.txt"
    listed.write_text("images/b.png\n" * 3)
    arguments = ([str(folder), str(listed)], run, str(tmp_path / "s.csv"))

    done, add = iter(range(5)), Partial.add

    def interrupted(self, row):
        if next(done) == 4:
            raise KeyboardInterrupt
        add(self, row)

    monkeypatch.setattr(Partial, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_command(*arguments)
    monkeypatch.undo()
    (folder / "a.png").write_bytes((images / "01.png").read_bytes())
    (folder / "c.png").write_bytes((images / "01.png").read_bytes())
    (folder / "e.png").unlink()
    predict_command(*arguments, resume=True)
    written = [os.path.basename(row["path"]) for row in rows(tmp_path / "s.csv")]
    assert written == ["b.png", "d.png", "e.png", "b.png", "a.png", "c.png", "b.png", "b.png"]


def test_a_partial_table_that_does_not_fit_is_refused(run, images, tmp_path):
    out, part = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    detector = Detector.load(run, device="cpu")

    ours = settings(detector, [str(images)])

    def begun(by=ours):
        part.unlink(missing_ok=True)
        with Partial(out, by, resume=False) as table:
            table.add(Score("a.png", 0.5, "real", "")._asdict())

    def refused(match, paths=(str(images),), model=run, **options):
        before = part.read_bytes()
        with pytest.raises(UserError, match=match) as error:
            predict_command(list(paths), model, str(out), resume=True, **options)
        assert "\n" not in str(error.value) and part.read_bytes() == before

    begun()
    refused(r"begun with other settings \(paths\)", paths=[str(images / "00.png")])
    refused(r"begun with other settings \(views\)", views=2)
    refused(r"begun with other settings \(model\)", model=str(save_tiny(tmp_path, CROP, seed=1)))
    numbers = {field.name: 0.5 for field in fields(Calibration)}
    detector.calibration = Calibration(**numbers | {"views": 1})
    begun(settings(detector, [str(images)]))
    refused(r"begun with other settings \(calibration\)")
    begun({"of": "another program"})
    refused("is no partial table of this version")
    begun()
    lines = part.read_bytes().splitlines(keepends=True)
    for damage in (b"noise\n", b"[]\n", b'{"path": 1}\n'):
        part.write_bytes(b"".join([*lines, damage, *lines[1:]]))
        refused("line 3 is damaged")
    part.write_bytes(b"noise\n" + lines[1])
    refused("line 1 is damaged")
    begun()
    with Partial(out, ours, resume=True) as table:
        assert table.done == 1
        refused("is being written by another process")


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
    seen = []
    found = list(score(detector, iter(items), workers=2, on_score=lambda item, row: seen.append(item.name)))
    assert [row.path for row in found] == [item.name for item in items]
    assert {row.path: row.error for row in found if row.error} == {
        name: f"{name}: the process that read it died" for name in ("first.png", "last.png")
    }
    for row in found:
        if not row.error:
            assert f"{row.probability:.6f}" == table[os.path.basename(row.path)]["probability"]
    assert seen == [row.path for row in found if not row.error]


def test_endless_sources_are_not_read_ahead(run, images):
    detector = Detector.load(run, device="cpu")
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Item("a.png", str(images / "00.png"))

    found = score(detector, endless(), workers=2)
    for _ in range(100):
        assert next(found).error == ""
    found.close()
    assert taken < 120


@pytest.mark.slow
def test_ray_gives_the_same_table(run, images, table, tmp_path, monkeypatch, capfd):
    """On a small Ray that is started for it on this machine, stays quiet and is stopped."""
    ray = pytest.importorskip("ray")
    data = [(images / name).read_bytes() for name in sorted(table)]
    pq.write_table(pa.table({"image": data}), tmp_path / "t.parquet")
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    paths = [os.path.relpath(images, tmp_path), "t.parquet", "broken.png", "nowhere.png"]
    predict_command(paths, run, "local.csv", device="cpu", consistency=True)
    expected = rows("local.csv")
    assert {"real", "unsure", ""} <= {row["decision"] for row in expected}

    begun = settings(Detector.load(run), paths, consistency=True)
    with Partial(tmp_path / "ray.csv", begun, resume=False) as part:
        for row in expected[10:20]:
            score, spread = float(row["probability"]), float(row["spread"])
            part.add(Score(row["path"], score, row["decision"], row["error"], spread)._asdict())
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", "0.01")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or other tests would leave its processes next to nothing
    capfd.readouterr()
    options = {"workers": 1, "consistency": True, "resume": True}
    predict_command(paths, run, "ray.csv", device="cpu", engine="ray", **options)
    assert not ray.is_initialized()
    found = rows("ray.csv")
    assert found == expected[10:20] + expected[:10] + expected[20:]

    printed, progress = capfd.readouterr()
    assert printed.startswith("ray.csv: ") and printed.count("\n") == 1
    lines = [line for line in progress.replace("\r", "\n").splitlines() if line and "image [" not in line]
    assert lines == ["the column error of ray.csv says why"]

    with pytest.raises(UserError, match="engine ray cannot read a list from standard input"):
        predict_command(["-"], run, "ray.csv", engine="ray")
