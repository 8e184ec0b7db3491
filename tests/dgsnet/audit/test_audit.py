"""`dgsnet audit`: what it prints, writes and refuses."""

import itertools
import json
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet import cli
from dgsnet.audit.audit import audit, load_model
from dgsnet.data import parquet
from dgsnet.data.items import Item, find_samples
from dgsnet.data.nuisances import NUISANCES
from dgsnet.errors import UserError
from PIL import Image

EACH = 24
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def data_set(root, kind):
    """24 images of each class, some JPEG and some PNG; captions, one of a broken file missing."""
    rng = np.random.default_rng(1)
    captions = {}
    for label, folder in enumerate(("0_real", "1_fake")):
        (root / folder).mkdir(parents=True)
        for i in range(EACH):
            jpeg = i % 8 > 0 if (kind == "format" and not label) else i % 8 == 0
            side = 16 if label or kind != "size" else 15
            quality = (
                {"quality": 95 if label and kind == "quality" else 80} if jpeg or kind == "quality" else {}
            )
            path = root / folder / f"{i}.{'jpg' if quality else 'png'}"
            Image.fromarray(NOISE[:side]).save(path, **quality)
            captions[f"{folder}/{path.name}"] = " ".join(rng.choice(["cat", "dog", "sky", "tree", "car"], 3))
            if kind == "word" and label:
                captions[f"{folder}/{path.name}"] += " render"
    (root / "1_fake" / "broken.png").write_bytes(b"no picture")
    (root / "words.json").write_text(json.dumps(captions))
    return root


def run(root, out, *more):
    cli.main(["audit", "--data", str(root), "--out", str(out), *more])
    return json.loads((out / "audit.json").read_text())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("format", "format PNG"), ("quality", "JPEG quality"), ("size", "log2 height"), ("word", None)],
)
def test_planted_shortcuts_are_found(kind, name, tmp_path, capsys):
    root = data_set(tmp_path / "d", kind)
    found = run(root, tmp_path / "o", "--captions", str(root / "words.json"))
    assert found["verdict"] == "shortcut"
    assert set(found["nuisances"]) == set(NUISANCES)
    leaking = [key for key, leak in found["nuisances"].items() if leak["low"] > 0.5]
    assert (name in leaking) if name else not leaking
    assert (found["captions"]["low"] > 0.5) == (kind == "word")
    printed = capsys.readouterr().out
    assert "--surgery.text expert --data.nuisances files" in printed and "balance" in printed
    assert ("Re-encode" in printed) == (kind in ("format", "quality")) and ("sizes" in printed) == (
        kind == "size"
    )


def test_balanced_data(tmp_path, capsys):
    found = run(data_set(tmp_path / "d", "balanced"), tmp_path / "o")
    assert found["verdict"] == "none found" and found["captions"] is None
    assert found["files"]["low"] <= 0.5 <= found["files"]["high"]
    assert (found["n_real"], found["n_generated"], found["n_images"]) == (EACH, EACH, 2 * EACH + 1)
    assert len(found["damaged"]) == 1 and "broken.png: not an image" in found["damaged"][0]
    printed = capsys.readouterr().out
    assert "No shortcut was found" in printed and "left out: " in printed and "expert" not in printed
    assert not list((tmp_path / "o").glob(".*"))


def test_the_page_is_complete_and_self_contained(tmp_path):
    root = data_set(tmp_path / "<b>d", "format")
    # Each of the two generators has both classes.
    for generator in ("one", "two"):
        for label in ("0_real", "1_fake"):
            (root / generator).mkdir(exist_ok=True)
            (root / generator / label).symlink_to(root / label)
    out = tmp_path / "o"
    found = run(root, out, "--captions", str(root / "words.json"))
    assert set(found["generators"]) == {"<b>d", "one", "two"}
    text = (out / "audit.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page refers to another file"
    assert "{{" not in text and "<b>d" not in text and "&lt;b&gt;d" in text
    # The figures are together and alone, by class, and by generator.
    assert text.count("<svg ") == 3
    for expected in ("What to do", "broken.png: ", "The same in all images: ", "one, files", "99%"):
        assert expected in text


def test_shards(tmp_path):
    root = data_set(tmp_path / "d", "format")
    (root / "1_fake" / "broken.png").unlink()
    for path in root.rglob("*.png"):
        path.with_suffix(".txt").write_text("a cat")
    with tarfile.open(tmp_path / "s-0.tar", "w") as tar:
        for path in sorted(root.rglob("*.[jpt][pnx][gt]")):
            tar.add(path, f"{path.parent.name}/{path.name}")
    plain = audit(find_samples(root)).shortcuts
    assert audit(find_samples(tmp_path / "s-0.tar")).shortcuts == plain


def test_parquet_is_read_a_row_group_at_a_time(tmp_path, monkeypatch):
    root = data_set(tmp_path / "d", "format")
    (root / "1_fake" / "broken.png").unlink()
    samples = find_samples(root)
    columns = {"image": [s.read_bytes() for s in samples], "label": [s.label for s in samples]}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet", row_group_size=7)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 1)
    rows = find_samples(tmp_path / "d.parquet")
    groups, once = [], Item.read_bytes
    monkeypatch.setattr(Item, "read_bytes", lambda item: groups.append(item.group) or once(item))
    found = audit(rows, most=40)
    assert len(list(itertools.groupby(groups))) == 7 and len(found.labels) == 40
    assert found.shortcuts.verdict == "shortcut"
    # The same images as of files, though in another order.
    of_files = audit(samples, most=40)
    assert sorted(map(tuple, found.nuisances)) == sorted(map(tuple, of_files.nuisances))


def test_only_so_many_are_drawn(tmp_path):
    samples = find_samples(data_set(tmp_path / "d", "format"))
    # The first 24 of them are real.
    result = audit(samples, most=32)
    assert len(result.labels) + len(result.damaged) == 32 and result.total == 2 * EACH + 1
    assert min(np.bincount(result.labels)) >= 10
    assert audit(samples, most=32).shortcuts == result.shortcuts


def fails(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1
    return error


def test_errors_are_one_line(tmp_path, capsys):
    root = data_set(tmp_path / "d", "balanced")
    out = ["--out", str(tmp_path / "o")]
    assert "no such file or folder" in fails(["--data", str(tmp_path / "nowhere"), *out], capsys)
    assert "not readable as JSON" in fails(["--data", str(root), "--captions", "no.json", *out], capsys)
    assert "25 of 49 images have no caption" not in fails(["--data", str(root)], capsys)
    none = tmp_path / "none.json"
    none.write_text('{"x.png": "a cat"}')
    assert "49 of 49 images have no" in fails(["--data", str(root), "--captions", str(none), *out], capsys)
    none.write_text('{"d/0_real/0.jpg": "a cat"}')
    message = fails(["--data", str(root), "--captions", str(none), *out], capsys)
    assert "at least 10 real images with a caption, here are 1" in message
    for path in list((root / "1_fake").glob("*.png"))[:16]:
        path.write_bytes(b"")
    message = fails(["--data", str(root), *out], capsys)
    assert (
        "at least 10 generated images, here are" in message and "files could not be read, such as" in message
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(["--data", str(root), "--out", str(tmp_path / "file")], capsys)
    assert not (tmp_path / "o").exists()


def test_the_files_model_is_kept(tmp_path):
    root = data_set(tmp_path / "d", "format")
    run(root, tmp_path / "o")
    model = load_model(tmp_path / "o" / "audit.json")
    result = audit(find_samples(root))
    assert np.mean((model.logits(result.nuisances) > 0) == result.labels) == pytest.approx(7 / 8)
    saved = json.loads((tmp_path / "o" / "audit.json").read_text())
    saved["model"]["of"][0] = "another"
    (tmp_path / "old.json").write_text(json.dumps(saved))
    (tmp_path / "none.json").write_text("[]")
    for name in ("old", "none"):
        with pytest.raises(UserError, match=rf"{name}\.json is no audit\.json of this version"):
            load_model(tmp_path / f"{name}.json")
