"""A killed `dgsnet predict` goes on with the rows that it has, and with no others."""

import os
import signal
import time
from dataclasses import fields

import psutil
import pyarrow.parquet as pq
import pytest
from dgsnet.data.tables import Partial
from dgsnet.detection.decisions import Calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.rows import Score
from dgsnet.detection.scoring import predict_command, settings
from dgsnet.errors import UserError

from tests.support.fresh import FORKSERVER
from tests.support.tables import read_csv, same
from tests.support.tiny import CROP, save_tiny


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
    assert 0 < kept[1] < kept[2] < len(table)

    with pytest.raises(UserError, match=f"holds {kept[2]} rows of a stopped run: go on with --resume"):
        predict_command(*arguments)
    predict_command(*arguments, **options)
    assert not part.exists()
    if suffix == ".csv":
        written = read_csv(out)
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
    written = [os.path.basename(row["path"]) for row in read_csv(tmp_path / "s.csv")]
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
