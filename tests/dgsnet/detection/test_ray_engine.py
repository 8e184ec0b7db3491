"""`--engine ray` on a small Ray of this machine."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgsnet.data.tables import Table, partial
from dgsnet.detection.detector import Detector
from dgsnet.detection.rows import Row
from dgsnet.detection.scoring import predict_command, settings
from dgsnet.errors import UserError

from tests.support.tables import read_csv


@pytest.mark.slow
def test_ray_gives_the_same_table(run, images, table, tmp_path, monkeypatch, capfd):
    """On a small Ray that is started for it on this machine, stays quiet and is stopped."""
    ray = pytest.importorskip("ray")
    data = [(images / name).read_bytes() for name in sorted(table)]
    columns = {"thumbnail": [b""] * len(data), "photo": data}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=5)
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    paths = [os.path.relpath(images, tmp_path), "t.parquet#image=photo", "broken.png", "nowhere.png"]
    predict_command(paths, run, "local.csv", device="cpu", consistency=True)
    expected = read_csv("local.csv")
    assert {"real", "unsure", ""} <= {row["decision"] for row in expected}
    rows = [row["probability"] for row in expected if row["path"].startswith("t.parquet/")]
    assert rows == [table[name]["probability"] for name in sorted(table)]

    begun = settings(Detector.load(run), paths, consistency=True)
    with Table(partial(tmp_path / "ray.csv"), begun, Row._fields) as part:
        for row in expected[10:20]:
            score, spread = float(row["probability"]), float(row["spread"])
            part.add(Row(row["path"], score, row["decision"], row["error"], spread)._asdict())
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", "0.01")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or other tests would leave its processes next to nothing
    capfd.readouterr()
    options = {"workers": 1, "consistency": True, "resume": True}
    predict_command(paths, run, "ray.csv", device="cpu", engine="ray", **options)
    assert not ray.is_initialized()
    found = read_csv("ray.csv")
    assert found == expected[10:20] + expected[:10] + expected[20:]

    printed, progress = capfd.readouterr()
    assert printed.startswith("ray.csv: ") and printed.count("\n") == 1
    lines = [line for line in progress.replace("\r", "\n").splitlines() if line and "image [" not in line]
    assert lines == ["the column error of ray.csv says why"]

    with pytest.raises(UserError, match="engine ray cannot read a list from standard input"):
        predict_command(["-"], run, "ray.csv", engine="ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_an_address_without_a_cluster_is_one_line(run, images, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster at RAY_ADDRESS={address}"):
        predict_command([str(images)], run, str(tmp_path / "s.csv"), engine="ray")
