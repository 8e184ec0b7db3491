"""A killed `dgsnet evaluate` goes on with the logits that it has, and with no others."""

import json
import time

import pytest
from dgsnet import cli
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError

from tests.support.fresh import FORKSERVER
from tests.support.tables import measure
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
    with pytest.raises(UserError, match=r"scores.jsonl holds scores that were made with another model: give"):
        measure(other, data, tmp_path / "o")
    with pytest.raises(UserError, match="made with another number of views"):
        measure(model, data, tmp_path / "o", views=2)
    with pytest.raises(UserError, match="made with other images, or other names of suites"):
        measure(model, [f"renamed={data}"], tmp_path / "o")
    paths = sorted((data / "alpha").rglob("*.png"))
    for labels in ((0, 1), (1, 0)):
        lines = [f"{path},{labels[i % 2]}\n" for i, path in enumerate(paths)]
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
        if labels == (0, 1):
            measure(model, tmp_path / "list.csv", tmp_path / "listed")
    with pytest.raises(UserError, match="made with other images"):
        measure(model, tmp_path / "list.csv", tmp_path / "listed")
    (data / "alpha/1_fake/0.png").unlink()
    before = (tmp_path / "o/scores.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "--data", str(data), "--model", str(model), "--out", str(tmp_path / "o")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and "other images" in message and len(message.splitlines()) == 1
    assert (tmp_path / "o/scores.jsonl").read_bytes() == before


def test_what_is_already_scored_is_used(model, data, tmp_path, monkeypatch):
    """Another threshold needs no score at all, a further distortion only its own."""
    plain = measure(model, data, tmp_path / "o")
    seen = []
    stream = Detector.stream_logits

    def counting(self, images, **options):
        seen.append(len(images))
        return stream(self, images, **options)

    monkeypatch.setattr(Detector, "stream_logits", counting)
    moved = measure(model, data, tmp_path / "o", threshold=0.45)
    assert sum(seen) == 0 and moved["mean"]["auc"] == plain["mean"]["auc"]
    measure(model, data, tmp_path / "o", robustness=["jpeg:50"])
    assert sum(seen) == 23


@pytest.mark.parametrize(
    "content", [b"path,probability\na.png,0.5\n", b'{"path": "a.png"}\n', b"no end of line"]
)
def test_a_file_that_is_no_journal_is_left_alone(model, data, tmp_path, content):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/scores.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="not the journal of an evaluation"):
        measure(model, data, tmp_path / "o")
    assert (tmp_path / "o/scores.jsonl").read_bytes() == content


def test_rows_from_where_one_is_of_another_image_are_made_anew(model, data, tmp_path):
    first = measure(model, data, tmp_path / "o")
    journal = tmp_path / "o/scores.jsonl"
    whole = journal.read_text()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"path": "elsewhere.png", "logit": 99.0}) + "\n"
    journal.write_text("".join(lines))
    assert measure(model, data, tmp_path / "o") == first and journal.read_text() == whole


@pytest.mark.parametrize("part", [0, 40])
def test_a_journal_killed_within_its_first_line_begins_anew(model, data, tmp_path, part):
    first = measure(model, data, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/scores.jsonl").write_bytes((tmp_path / "a/scores.jsonl").read_bytes()[:part])
    assert measure(model, data, tmp_path / "b") == first
