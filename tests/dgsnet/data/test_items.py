"""What `find_items` finds in files, folders, patterns, tars and Parquet, and what it does not follow."""

import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet.data.items import find_items

from tests.support.permissions import folder_of_others, unprivileged
from tests.support.tiny import save_picture


def paths_of(items, folder):
    return [item.path.removeprefix(f"{folder}/") for item in items if not item.error]


def errors_of(items, folder):
    return {item.path.removeprefix(f"{folder}/"): item.error for item in items if item.error}


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


@pytest.mark.parametrize(
    "paths",
    [
        # This finds every folder, and every file of each.
        ["**"],
        ["**/*"],
        [".", "cats/sub"],
        ["{cats,cats/sub,dogs}"],
        ["{cats/sub/b.png,**}"],
        ["cats/a.png", "c*s", "*/*.png", "cats/sub/b.png", "."],
    ],
)
def test_what_several_paths_or_one_pattern_have_in_common_comes_once(tmp_path, paths):
    for name in ("cats/a.png", "cats/sub/b.png", "dogs/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = paths_of(find_items([tmp_path / path for path in paths]), tmp_path)
    assert sorted(found) == ["cats/a.png", "cats/sub/b.png", "dogs/c.png"]


def test_a_list_may_name_an_image_twice_beside_other_paths(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "l.txt").write_text("a.png\na.png\n")
    found = find_items([tmp_path / "l.txt", tmp_path / "a.png", tmp_path / "*.png"])
    assert [item.path for item in found] == [str(tmp_path / "a.png")] * 3


def test_a_folder_is_gone_through_without_being_held(tmp_path):
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "z.png").touch()
    (tmp_path / "a.png").touch()
    items = find_items([str(tmp_path)])
    assert next(items).path == f"{tmp_path}/a.png"
    # The folder of this file has not been opened yet.
    (tmp_path / "d" / "b.png").touch()
    assert [os.path.basename(item.path) for item in items] == ["b.png", "z.png"]


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
        assert item.path == f"{tmp_path}/{name}" and "not readable as" in item.error, name
        assert "\n" not in item.error
    (tmp_path / "huge.tar").write_bytes(b"")
    # The file is sparse: a terabyte of zeros ends the archive at once.
    os.truncate(tmp_path / "huge.tar", 2**40)
    [item] = find_items([str(tmp_path / "huge.tar")])
    assert item.missing

    (tmp_path / "cut.tar").write_bytes(whole.getvalue()[:1500])
    items = list(find_items([str(tmp_path / "cut.tar")]))
    assert items[0].path.endswith("cut.tar/a.png")
    with pytest.raises(Exception, match=r"cut.tar/a.png: cut off by the end of its file"):
        items[0].read()
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("pipe.tar", "pipe.parquet"):
        [item] = find_items([str(tmp_path / name)])
        assert "not a regular file" in item.error


def test_rows_of_parquet_without_bytes(tmp_path):
    outside, inside = tmp_path / "outside.png", tmp_path / "data" / "inside.png"
    save_picture(outside)
    save_picture(inside)
    tmp_path = inside.parent
    column = [
        {"bytes": None, "path": "inside.png"},
        {"bytes": None, "path": str(outside)},
        {"bytes": None, "path": "../../etc/passwd"},
        {"bytes": None, "path": None},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"photo": pa.array(column, kind)}), tmp_path / "t.parquet")
    items = list(find_items([str(tmp_path / "t.parquet")]))
    assert items[0].read().shape[2] == 3
    for item, reason in zip(items[1:], ["a link out of", "a link out of", "no image in", "no image in"]):
        with pytest.raises(Exception, match=f"{item.path}: {reason}"):
            item.read()
    pq.write_table(pa.table({"image": [bytes(2**26 + 1), b"small"]}), tmp_path / "large.parquet")
    large, small = find_items([str(tmp_path / "large.parquet")])
    assert large.error.startswith("larger than 67,108,864 bytes") and large.data is None
    assert small.data == b"small"
    pq.write_table(pa.table({"a": [b""], "b": [b""]}), tmp_path / "two.parquet")
    [item] = find_items([str(tmp_path / "two.parquet")])
    assert "several columns of bytes (a, b); call the one of the images image" in item.error


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
