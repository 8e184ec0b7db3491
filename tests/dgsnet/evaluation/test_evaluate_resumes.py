"""A killed `dgsnet evaluate` goes on with the logits that it has, and with no others."""

import hashlib
import json
import shutil
import time

import pytest
from dgsnet import cli
from dgsnet.data.items import find_samples
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import fingerprint, trained_state

from tests.support.fresh import FORKSERVER
from tests.support.tables import interrupted, measure, read_csv
from tests.support.tiny import CROP, save_tiny


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(model, data, tmp_path):
    """SIGKILL while scoring, half a line lost on top: the rest is scored once, and nothing differs."""
    words = [
        "--data",
        str(data),
        "--model",
        str(model),
        "--robustness",
        "jpeg:90,80,70,60,50",
        "--workers",
        "0",
    ]
    journal = tmp_path / "killed/scores.jsonl"
    process = FORKSERVER.Process(
        target=cli.main, args=(["evaluate", *words, "--out", str(tmp_path / "killed")],)
    )
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 30:
            assert process.is_alive(), "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    whole = journal.read_bytes()
    assert not (tmp_path / "killed/metrics.json").exists()
    torn = whole[: whole[:-1].rfind(b"\n") + 20]
    journal.write_bytes(torn)
    kept = torn[: torn.rfind(b"\n") + 1]

    cli.main(["evaluate", *words, "--out", str(tmp_path / "killed")])
    cli.main(["evaluate", *words, "--out", str(tmp_path / "whole")])
    assert journal.read_bytes().startswith(kept)
    for name in ("scores.csv", "metrics.json", "metrics.md", "scores.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    keys = [
        (row["distortion"], row["index"]) for row in map(json.loads, journal.read_text().splitlines()[1:])
    ]
    assert len(keys) == len(set(keys)) == 23 * 6


def test_scores_of_other_settings_are_refused(model, data, tmp_path, capsys):
    measure(model, data, tmp_path / "o")
    other = save_tiny(tmp_path, CROP, seed=1)
    with pytest.raises(UserError, match=r"scores.jsonl was begun with other settings \(model\): give"):
        measure(other, data, tmp_path / "o")
    with pytest.raises(UserError, match=r"other settings \(views\)"):
        measure(model, data, tmp_path / "o", views=2)
    with pytest.raises(UserError, match=r"other settings \(images\)"):
        measure(model, [f"renamed={data}"], tmp_path / "o")
    paths = sorted((data / "alpha").rglob("*.png"))
    for labels in ((0, 1), (1, 0)):
        lines = [f"{path},{labels[i % 2]}\n" for i, path in enumerate(paths)]
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
        if labels == (0, 1):
            measure(model, tmp_path / "list.csv", tmp_path / "listed")
    with pytest.raises(UserError, match=r"other settings \(images\)"):
        measure(model, tmp_path / "list.csv", tmp_path / "listed")
    (data / "alpha/1_fake/0.png").unlink()
    before = (tmp_path / "o/scores.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "--data", str(data), "--model", str(model), "--out", str(tmp_path / "o")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "other settings (images)" in message and len(message.splitlines()) == 1
    assert (tmp_path / "o/scores.jsonl").read_bytes() == before


def test_what_is_already_scored_is_used(model, data, tmp_path, monkeypatch):
    """Another threshold needs no score at all, a further distortion only its own."""
    plain = measure(model, data, tmp_path / "o")
    seen = []
    logits = Detector.logits

    def counting(self, pixels):
        seen.append(len(pixels))
        return logits(self, pixels)

    monkeypatch.setattr(Detector, "logits", counting)
    moved = measure(model, data, tmp_path / "o", threshold=0.45)
    assert sum(seen) == 0 and moved["mean"]["auc"] == plain["mean"]["auc"]
    measure(model, data, tmp_path / "o", robustness=["jpeg:50"])
    # One image cannot be read.
    assert sum(seen) == 22


def test_what_was_interrupted_goes_on_in_the_same_process(model, data, tmp_path):
    interrupted(measure, model, data, tmp_path / "o", rows=9)
    assert (tmp_path / "o/scores.jsonl").read_text().count("\n") == 10
    assert measure(model, data, tmp_path / "o") == measure(model, data, tmp_path / "whole")


def test_each_part_of_an_images_place_is_a_setting(model, data, tmp_path):
    """The generator alone, the label alone, the path alone, the suite's name alone."""
    rows = [("a.png", 0, "g"), ("b.png", 1, "g"), ("c.png", 1, "h")]
    for name, *_ in [*rows, ("d.png",)]:
        shutil.copy(data / "alpha/0_real/0.png", tmp_path / name)

    def listed(rows, name="list"):
        lines = [f"{tmp_path}/{path},{label},{generator}\n" for path, label, generator in rows]
        (tmp_path / f"{name}.csv").write_text("path,label,generator\n" + "".join(lines))
        return tmp_path / f"{name}.csv"

    first = measure(model, listed(rows), tmp_path / "o")
    for place, other in ((0, "d.png"), (1, 1), (2, "i")):
        changed = [list(row) for row in rows]
        changed[0][place] = other
        with pytest.raises(UserError, match=r"other settings \(images\)"):
            measure(model, listed(changed), tmp_path / "o")
    with pytest.raises(UserError, match=r"other settings \(images\)"):
        measure(model, listed(rows, "renamed"), tmp_path / "o")
    assert measure(model, listed(rows), tmp_path / "o") == first


def test_a_row_of_another_image_is_refused(model, data, tmp_path):
    first = measure(model, data, tmp_path / "o")
    journal = tmp_path / "o/scores.jsonl"
    whole = journal.read_text()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[4])
    other = {"path": "elsewhere.png", "logit": 99.0}
    for wrong in (other, {"index": 23}, {"index": "3"}, {"logit": None}, {"distortion": []}):
        lines[4] = json.dumps(row | wrong) + "\n"
        journal.write_text("".join(lines))
        with pytest.raises(UserError, match=r"scores.jsonl: line 5 is damaged: delete it and go on"):
            measure(model, data, tmp_path / "o")
    journal.write_text("".join(lines[:4] + lines[5:]))
    assert measure(model, data, tmp_path / "o") == first and sorted(journal.read_text()) == sorted(whole)


def test_logits_of_version_0_1_are_gone_on_with(model, data, tmp_path):
    """As version 0.1 wrote them, hash of the model included."""
    first = measure(model, data, tmp_path / "o")
    detector = Detector.load(model, "cpu")
    digest = hashlib.sha256(fingerprint(detector.model).encode())
    for name, tensor in sorted(trained_state(detector.model).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    images = hashlib.sha256()
    for sample in find_samples(str(data)):
        images.update(repr(("data", sample.path, sample.label, sample.generator)).encode())
    names = "mode", "image_size", "patch_size", "num_patches", "normalization", "flip"
    preprocessing = {name: getattr(detector.config.preprocess, name) for name in names}
    settings = {"model": digest.hexdigest()[:16], "preprocessing": preprocessing}
    settings |= {"views": 1, "images": images.hexdigest()[:16]}
    path = find_samples(str(data))[2].path
    row = {"distortion": "", "index": 2, "path": path, "logit": 3.25, "error": ""}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/scores.jsonl").write_text(json.dumps(settings) + "\n" + json.dumps(row) + "\n")
    assert measure(model, data, tmp_path / "old") != first
    scores = read_csv(tmp_path / "old/scores.csv")
    assert scores[2]["path"] == path and float(scores[2]["probability"]) == pytest.approx(0.962673)
    rest = [row for row in read_csv(tmp_path / "o/scores.csv") if row["path"] != path]
    assert [row for row in scores if row["path"] != path] == rest
