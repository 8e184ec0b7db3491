"""`--engine ray` on a small Ray of this machine: what predict, evaluate and calibrate write is the same."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet.config import Config
from dgsnet.data.tables import Table, partial
from dgsnet.detection.calibrate import calibrate_command
from dgsnet.detection.detector import Detector
from dgsnet.detection.rows import Row, kept
from dgsnet.detection.scoring import predict_command, score, settings
from dgsnet.errors import UserError
from dgsnet.evaluation.evaluate import evaluate_command

from tests.support import published
from tests.support.pictures import vast_webp
from tests.support.tables import interrupted, read_csv

# Batches that images with several tiles share, in a precision in which company would be seen in a table.
HOW = {"device": "cpu", "batch": 4, "precision": "bf16", "crops": "tiles"}


@pytest.fixture
def files(images, tmp_path, monkeypatch):
    """Files in the current folder, to which paths are relative."""
    data = [path.read_bytes() for path in sorted(images.iterdir())]
    columns = {"thumbnail": [b""] * len(data), "photo": data}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=5)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "vast.webp").write_bytes(vast_webp())
    monkeypatch.chdir(tmp_path)
    return os.path.relpath(images, tmp_path)


@pytest.mark.slow
def test_ray_writes_the_same(run, files, monkeypatch, capfd):
    """One Ray is started for predict, stays quiet and would be stopped; the others find and keep it."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", "0.01")
    # Otherwise other tests would leave Ray's processes next to no time.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    stopped = []
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    try:
        predicted(run, files, capfd)
        assert stopped == [True] and ray.is_initialized()
        evaluated(run, files)
        calibrated(run, files)
        published_by_others(files, monkeypatch)
        assert stopped == [True]
    finally:
        monkeypatch.undo()
        ray.shutdown()


def predicted(run, files, capfd):
    """A table that was begun, of files, Parquet and what cannot be read, with copies."""
    paths = [files, "t.parquet#image=photo", "broken.png", "vast.webp", "nowhere.png"]
    predict_command(paths, run, "local.csv", consistency=True, **HOW)
    expected = read_csv("local.csv")
    assert {"real", "unsure", ""} <= {row["decision"] for row in expected}
    assert expected[-2]["error"] == "vast.webp: it takes more than 1.2 GiB of memory to read"
    columns = [(row["probability"], row["spread"]) for row in expected]
    assert columns[:80] == columns[80:160]
    begun = settings(Detector.load(run, **HOW), paths, consistency=True)
    with Table(partial(Path("ray.csv")), begun, kept(declared=False)) as part:
        for row in expected[10:20]:
            values = float(row["probability"]), row["decision"], row["error"], float(row["spread"])
            made = Row(row["path"], *values)._asdict()
            part.add({name: made[name] for name in kept(declared=False)})
    capfd.readouterr()
    options = {"workers": 1, "consistency": True, "resume": True}
    predict_command(paths, run, "ray.csv", engine="ray", **options, **HOW)
    assert read_csv("ray.csv") == expected[10:20] + expected[:10] + expected[20:]
    printed, progress = capfd.readouterr()
    assert printed.startswith("ray.csv: ") and printed.count("\n") == 1
    lines = [line for line in progress.replace("\r", "\n").splitlines() if line and "image [" not in line]
    assert lines == ["the column error of ray.csv says why"]


def evaluated(run, files):
    """All variants, from where a local evaluation was interrupted."""
    names = [f"{files}/{name}" for name in sorted(os.listdir(files))[:10]] + ["broken.png"]
    with open("list.csv", "w") as file:
        file.write("path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    options = {"robustness": ["jpeg:60"], "frozen": True, "views": 2, **HOW}
    evaluate_command(["list.csv"], run, "local", **options)
    interrupted(evaluate_command, ["list.csv"], run, "ray", rows=5, **options)
    evaluate_command(["list.csv"], run, "ray", engine="ray", workers=1, **options)
    for name in ("scores.jsonl", "scores.csv", "metrics.json", "metrics.md"):
        with open(f"local/{name}", "rb") as local, open(f"ray/{name}", "rb") as found:
            assert local.read() == found.read(), name
    assert len(read_csv("local/scores.csv")) == 22 and os.path.getsize("ray/metrics.md")


def calibrated(run, files):
    written = []
    for engine in ("local", "ray"):
        model = shutil.copytree(run, engine + "-model")
        sources = [[f"{files}/[0-3]*.png"], [f"{files}/[45]*.png", "broken.png"]]
        generated = [f"{files}/[67]*.png"]
        calibrate_command(model, sources, generated, fpr=0.2, engine=engine, workers=1, **HOW)
        (path,) = [os.path.join(d, f) for d, _, names in os.walk(model) for f in names if "calibration" in f]
        with open(path, "rb") as file:
            written.append(file.read())
    assert written[0] == written[1] and b'"batch": 4' in written[0]


def published_by_others(files, monkeypatch):
    """In full depth, known to Ray's processes by its name."""
    monkeypatch.setattr(published, "DEPTH", 12)
    model = published.convert_community(Path())
    for engine in ("local", "ray"):
        predict_command([f"{files}/0[0-2].png"], model, f"{engine}-published.csv", engine=engine, workers=1)
    found = read_csv("ray-published.csv")
    assert found == read_csv("local-published.csv") and len({row["probability"] for row in found}) == 3


def test_what_ray_cannot_do_is_one_line(run, images, tmp_path):
    with pytest.raises(UserError, match="engine ray cannot read a list from standard input"):
        predict_command(["-"], run, str(tmp_path / "s.csv"), engine="ray")
    made = Detector(Detector.load(run).model, Config())
    with pytest.raises(UserError, match="engine ray needs a detector"):
        next(score(made, [], engine="ray"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_an_address_without_a_cluster_is_one_line(run, images, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster at RAY_ADDRESS={address}"):
        predict_command([str(images)], run, str(tmp_path / "s.csv"), engine="ray")
