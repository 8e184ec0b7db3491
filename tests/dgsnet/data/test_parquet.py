"""Parquet as published data sets lay it out: columns, labels, row groups, and what is refused."""

import json
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet import cli
from dgsnet.data import parquet
from dgsnet.data.images import ImageError, file_hash
from dgsnet.data.items import find_images, find_items, find_labelled, find_samples
from dgsnet.data.loading import epoch_order
from dgsnet.errors import UserError

from tests.support.pictures import encode, picture
from tests.support.tables import read_csv

PICTURES = [picture(30 + 2 * i, 44 - 3 * i, seed=i) for i in range(4)]
FILES = [encode(pixels, "png") for pixels in PICTURES]
STRUCTS = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(FILES)]


def write(path, columns, names=None, **options):
    """A file; `names`: the class names of columns, as Hugging Face's datasets writes them down."""
    table = pa.table(columns)
    if names:
        features = {column: {"names": words, "_type": "ClassLabel"} for column, words in names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


LAYOUTS = {
    "Community Forensics": (
        {
            "image_name": list("abcd"),
            "image_data": FILES,
            "model_name": ["sdxl", "real", "dalle", "sdxl"],
            "prompt": ["a cat", None, "", "a dog"],
            "label": [1, 0, 1, 1],
        },
        None,
        [(1, "sdxl", "a cat"), (0, "real", None), (1, "dalle", None), (1, "sdxl", "a dog")],
    ),
    "OpenFake": (
        {
            "image": STRUCTS,
            "prompt": ["a", "b", "c", None],
            "label": ["real", "fake", "fake", "real"],
            "model": ["real", "flux", "imagen", None],
            "type": ["x"] * 4,
        },
        None,
        [(0, "real", "a"), (1, "flux", "b"), (1, "imagen", "c"), (0, "photos", None)],
    ),
    "OpenSDI": (
        {"key": list("abcd"), "image": STRUCTS, "mask": STRUCTS[::-1], "label": [1, 0, 0, 1]},
        {"label": ["real", "fake"]},
        [(1, "photos", None), (0, "photos", None), (0, "photos", None), (1, "photos", None)],
    ),
    "Tiny-GenImage": (
        {"image": STRUCTS, "label": [1, 0, 1, 1], "generator": [2, 0, 1, 2]},
        {"label": ["nature", "ai"], "generator": ["real", "ADM", "BigGAN"]},
        [(1, "BigGAN", None), (0, "real", None), (1, "ADM", None), (1, "BigGAN", None)],
    ),
    "labels the other way round": (
        {"image": FILES, "label": [1, 0, 0, 1]},
        {"label": ["fake", "real"]},
        [(0, "photos", None), (1, "photos", None), (1, "photos", None), (0, "photos", None)],
    ),
    "several columns of a kind, of which the first of the rule counts": (
        {
            "prompt": list("efgh"),
            "model": list("ijkl"),
            "image_data": FILES[::-1],
            "image": FILES,
            "label": [1, 0, 0, 1],
            "generator": list("mnop"),
            "caption": list("abcd"),
        },
        None,
        [(1, "m", "a"), (0, "n", "b"), (0, "o", "c"), (1, "p", "d")],
    ),
    "yes and no": (
        {"image": pa.array(FILES, pa.large_binary()), "label": [True, False, False, True]},
        None,
        [(1, "photos", None), (0, "photos", None), (0, "photos", None), (1, "photos", None)],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(layout, tmp_path):
    columns, names, expected = LAYOUTS[layout]
    source = write(tmp_path / "photos-00.parquet", columns, names, row_group_size=3)
    samples = find_samples(source)
    assert [(sample.label, sample.generator, sample.caption) for sample in samples] == expected
    assert [sample.path for sample in samples] == [f"{source}/{i}" for i in range(4)]
    for i in (3, 0, 2, 1):
        np.testing.assert_array_equal(samples[i].read(), PICTURES[i])


def test_columns_may_be_named(tmp_path):
    columns = {"a": FILES, "b": FILES[::-1], "bad": [0, 1, 1, 0], "who": list("wxyz"), "told": list("stuv")}
    write(tmp_path / "photos-0.parquet", columns)
    source = f"{tmp_path}/photos-*.parquet#image=b,label=bad,generator=who,caption=told"
    samples = find_samples(source)
    assert [(s.label, s.generator, s.caption) for s in samples] == [
        (0, "w", "s"),
        (1, "x", "t"),
        (1, "y", "u"),
        (0, "z", "v"),
    ]
    assert find_labelled(source) == samples
    np.testing.assert_array_equal(samples[1].read(), PICTURES[2])
    items = list(find_items([f"{tmp_path}/photos-0.parquet#image=b"]))
    assert [item.path for item in items] == [f"{tmp_path}/photos-0.parquet/{i}" for i in range(4)]
    for item in (items[3], find_images([f"{tmp_path}/photos-0.parquet#image=b"])[0][3]):
        np.testing.assert_array_equal(item.read(), PICTURES[0])
    for named, reason in {
        "#image=c": "no column c, but a, b, bad, who, told",
        "#image=who": "call the one of the images image, or name it",
        "#img=a": "img is none of image, label, generator, caption",
        "": r"several columns of bytes \(a, b\)",
        "#image=a": "photos-0.parquet/0: label None is unknown",
    }.items():
        with pytest.raises(UserError, match=reason) as error:
            find_samples(f"{tmp_path}/photos-0.parquet{named}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": FILES, "label": [0, 1, 2, 0]}, r"t\.parquet/2: label 2 is unknown"),
        ({"image": FILES, "label": [0, 1, None, 0]}, r"t\.parquet/2: label None is unknown"),
        ({"image": FILES, "label": [0, 1, 1, 0], "caption": [1, 2, 3, 4]}, "0: caption is not text"),
        (
            {"image": FILES, "label": [0, 1, 1, 0], "prompt": ["a" * (2**20 + 1)] * 4},
            "a caption of more than",
        ),
        ({"label": [0, 1]}, "no column of bytes"),
        ({"image": [{"bytes": "text"}, {"bytes": "text"}], "label": [0, 1]}, "no column of bytes"),
        ({"image": [{"raw": b"1"}, {"raw": b"2"}], "label": [0, 1]}, "no column of bytes"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "holds no images"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(columns, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        find_samples(write(tmp_path / "t.parquet", columns))
    assert "\n" not in str(error.value) and str(tmp_path / "t.parquet") in str(error.value)


def test_rows_without_an_image_of_their_own(tmp_path):
    (tmp_path / "beside.png").write_bytes(FILES[1])
    (tmp_path / "sub").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"bytes": None, "path": "../beside.png"},
        {"bytes": None, "path": "inside.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": bytes(2**26 + 1), "path": None},
    ]
    (tmp_path / "sub" / "inside.png").write_bytes(FILES[0])
    source = write(tmp_path / "sub" / "t.parquet", {"image": pa.array(rows, kind), "label": [0, 1, 1, 0, 1]})
    nothing, large = "no image in this row", "larger than 67,108,864 bytes"
    reasons = ["a link out of", "", nothing, nothing, large]
    for items in (find_samples(source), list(find_items([str(source)]))):
        for item, reason in zip(items, reasons, strict=True):
            if reason:
                with pytest.raises(ImageError, match=f"{item.path}: {reason}"):
                    item.read()
            else:
                np.testing.assert_array_equal(item.read(), PICTURES[0])


def test_large_row_groups_are_refused_from_the_footer_and_scored_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_GROUP", 5 * len(FILES[0]))
    columns = {"image": FILES * 4, "label": [0, 1] * 8}
    source = write(tmp_path / "t.parquet", columns, row_group_size=16, use_dictionary=False)
    with pytest.raises(UserError, match=r"image of row group 0 takes more than .*row_group_size=100"):
        find_samples(source)
    assert [item.data for item in find_items([str(source)])] == FILES * 4
    held, _ = find_images([str(source)])
    assert {item.data for item in held} == {None}
    # A dictionary's footer tells little of what its rows become.
    source = write(tmp_path / "d.parquet", {"image": FILES[:1] * 40, "label": [1] * 40})
    samples = find_samples(source)
    with pytest.raises(ImageError, match=r"d\.parquet/7: .*takes more than"):
        samples[7].read()


def test_a_column_that_unpacks_to_many_times_its_size_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_GROUP", 2**20)
    options = {"compression": "zstd", "use_dictionary": False, "row_group_size": 4}
    source = write(tmp_path / "t.parquet", {"image": [*FILES, bytes(2**21)]}, **options)
    *items, last = find_items([str(source)])
    assert [item.data for item in items] == FILES and last.path == str(source)
    assert "image of row group 1 takes more than 1,048,576 bytes" in last.error


def number(data, place):
    """Thrift's number at a place, its sign in the last bit, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
        if data[place - 1] < 128:
            return value, place


def packed(value, size):
    """The same number in so many bytes."""
    return bytes((value >> 7 * i) & 127 | 128 * (i < size - 1) for i in range(size))


def with_a_page_of_two_gib(path, offset):
    """Let a page's own header say so, and not the footer, in the bytes that its checksum took."""
    data = path.read_bytes()
    places = [offset]
    # Kind, bytes, packed bytes and checksum each are a number behind its field's byte.
    for _ in range(4):
        assert data[places[-1]] == 0x15
        places.append(number(data, places[-1] + 1)[1])
    kind, _, packed_bytes, _ = (number(data, place + 1)[0] for place in places[:4])
    rest = b"\x15" + packed(2**32 - 2, 5) + data[places[2] : places[3]] + b"\x2c"
    assert data[places[4]] == 0x1C and packed_bytes > 0
    head = b"\x15" + packed(kind, places[4] - offset - len(rest)) + rest
    path.write_bytes(data[:offset] + head + data[places[4] + 1 :])


def test_a_page_that_is_larger_than_the_footer_says_fills_no_memory(tmp_path):
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    large = encode(picture(200, 300), "BMP")
    source = write(tmp_path / "t.parquet", {"image": [large], "label": [1]}, **options)
    find_samples(source)[0].read()
    column = pq.ParquetFile(source).metadata.row_group(0).column(0)
    with_a_page_of_two_gib(source, column.data_page_offset)
    assert pq.ParquetFile(source).metadata.row_group(0).column(0).total_uncompressed_size < 2**20
    (sample,) = find_samples(source)
    with pytest.raises(ImageError, match=r"not readable as Parquet: it takes more than 1\.2 GiB of memory"):
        sample.read()
    (item,) = find_items([str(source)])
    assert "it takes more than 1.2 GiB of memory" in item.error


def test_long_texts_of_a_row_group_are_refused_from_the_footer(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_TEXTS", 1000)
    columns = {"image": FILES, "label": [0, 1, 1, 0], "prompt": [letter * 400 for letter in "abcd"]}
    with pytest.raises(UserError, match=r"prompt of row group 0 takes more than 1,000 bytes"):
        find_samples(write(tmp_path / "t.parquet", columns))


def test_a_row_group_is_read_once_while_it_is_kept(tmp_path, monkeypatch):
    """What is read again is seen by a file of other images that looks the same from outside."""
    options = {"row_group_size": 4, "use_dictionary": False, "compression": "none"}
    label = [0, 1] * 6
    source = write(tmp_path / "t.parquet", {"image": FILES * 3, "label": label}, **options)
    other = write(tmp_path / "other.parquet", {"image": FILES[::-1] * 3, "label": label}, **options)
    contents, state = [path.read_bytes() for path in (source, other)], source.stat()
    assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
    samples = find_samples(source)

    def read(which, i):
        """Whether image i is read from the file that is there now, which is the one or the other."""
        source.write_bytes(contents[which])
        os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
        found = samples[i].read_bytes()
        assert found in (FILES[i % 4], FILES[3 - i % 4])
        return (found == FILES[3 - i % 4]) == which

    assert [read(0, 0), read(1, 1), read(1, 5), read(1, 2), read(0, 4)] == [True, False, True, False, False]
    # Only the last row group is kept.
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1)
    assert [read(0, 8), read(1, 9), read(1, 0), read(1, 8)] == [True, False, True, True]
    # Two of the three fit, also after a third one has taken a place and given it back.
    monkeypatch.setattr(parquet, "KEPT_BYTES", 2 * sum(map(len, FILES)))
    assert [read(0, 0), read(0, 4), read(0, 8), read(1, 0)] == [True, True, True, True]
    assert [read(1, 8), read(0, 1), read(1, 9)] == [False, False, False]


def test_relative_paths_are_of_the_current_folder(tmp_path, monkeypatch):
    """Also when files in two folders look the same from outside."""
    for name, content in ("first", FILES), ("second", FILES[::-1]):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write("t.parquet", {"image": content}, use_dictionary=False, compression="none")
        os.utime("t.parquet", ns=(1, 1))
        assert [item.read_bytes() for item in find_items(["t.parquet"])] == content
        assert parquet.read_row("t.parquet", 0, 0) == content[0]


def test_a_file_that_changes_later_damages_only_images(tmp_path):
    samples = find_samples(write(tmp_path / "t.parquet", {"image": FILES, "label": [0, 1, 1, 0]}))
    np.testing.assert_array_equal(samples[2].read(), PICTURES[2])
    write(tmp_path / "t.parquet", {"image": FILES[:1] + FILES[:1], "label": [0, 1]})
    os.utime(tmp_path / "t.parquet", ns=(1, 1))
    np.testing.assert_array_equal(samples[1].read(), PICTURES[0])
    with pytest.raises(ImageError, match="its row is gone"):
        samples[2].read()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ImageError, match=r"t\.parquet/0: not readable as Parquet"):
        samples[0].read()
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(ImageError, match="No such file"):
        samples[0].read()


def test_an_epoch_reads_few_row_groups_at_a_time(tmp_path, monkeypatch):
    columns = {"image": FILES * 100, "label": [0, 1] * 200}
    source = write(tmp_path / "t.parquet", columns, row_group_size=10, use_dictionary=False)
    samples = find_samples(source)
    groups = np.array([sample.group for sample in samples])
    assert groups.tolist() == [i // 10 for i in range(400)]

    def at_a_time():
        order = epoch_order(samples, np.random.default_rng(5))
        assert sorted(order) == list(range(400))
        met = groups[order]
        return max(
            sum((met[:i] == g).any() and (met[i:] == g).any() for g in range(40)) for i in range(0, 400, 7)
        )

    # 40 row groups are in three windows of at most SHARDS_MIXED.
    assert at_a_time() == 14
    monkeypatch.setattr("dgsnet.data.loading.KEPT_GROUPS", 4 * max(sample.size for sample in samples))
    assert at_a_time() == 4


@pytest.mark.slow
def test_every_command_takes_it(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 60), ("new", 30)):
        labels = (rng.permutation(count) % 2).tolist()
        noise = [rng.integers(0, 256, (36 + i % 3, 40 - i % 5, 3), dtype=np.uint8) for i in range(count)]
        columns = {
            "image": [encode(pixels // (1 + 3 * label), "png") for pixels, label in zip(noise, labels)],
            "label": labels,
            "model": [f"generator {i % 3 // 2}" for i in range(count)],
            "prompt": ["noise"] * count,
        }
        write(tmp_path / f"{split}.parquet", columns, row_group_size=7)
    train, test, run = (str(tmp_path / name) for name in ("train.parquet", "test.parquet", "run"))
    settings = {
        "data.train": train,
        "data.val": test,
        "data.workers": "1",
        "model.name": "dgsnet-tiny",
        "model.pretrained": "",
        "preprocess.mode": "crop",
        "preprocess.image_size": "32",
        "optim.batch_size": "6",
        "optim.epochs": "1",
    }
    cli.main(["train", "--out", run, *(f"--{name}={value}" for name, value in settings.items())])
    cli.main(["audit", "--data", f"{test}#caption=prompt", "--out", str(tmp_path / "audit")])
    cli.main(["evaluate", "--data", f"{test}#label=label", "--model", run, "--out", str(tmp_path / "report")])
    cli.main(["calibrate", "--reals", test, "--model", run, "--fpr", "0.2"])
    cli.main(["predict", test, "--model", run, "--out", str(tmp_path / "scores.csv")])
    assert "its 30 real images are taken, its 30 generated ones are not" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert "generator 1" in json.dumps(metrics)
    report = {row["path"]: row["probability"] for row in read_csv(tmp_path / "report" / "scores.csv")}
    scores = {row["path"]: row["error"] for row in read_csv(tmp_path / "scores.csv")}
    assert report.keys() == scores.keys() == {f"{test}/{i}" for i in range(60)}
    assert set(scores.values()) == {""} and "" not in report.values()

    new, updated = str(tmp_path / "new.parquet"), tmp_path / "updated"
    words = ["--data", new, "--replay", train, "--rule", "gem"]
    cli.main(["update", "--model", run, "--out", str(updated), *words])
    changes = read_csv(updated / "changes.csv")
    assert Counter(row["suite"] for row in changes) == {"new": 4, "old": 2}
    assert all(row["path"].startswith({"new": new, "old": train}[row["suite"]]) for row in changes)
    # What the model was trained on before, and the new images but for those held out.
    held = {row["path"] for row in changes if row["suite"] == "new"}
    items = [*find_samples(train), *(item for item in find_samples(new) if item.path not in held)]
    trained = np.load(updated / "best" / "training_images.npy").tolist()
    assert len(items) == 24 + 26 and trained == sorted(file_hash(item.read_bytes()) for item in items)
