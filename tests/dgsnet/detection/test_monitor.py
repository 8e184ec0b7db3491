"""Whether a promise still holds: what an alarm takes, how seldom it is false, and who obeys it."""

import csv
import json
import shutil

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.monitor import LEVEL, alarmed, levels, log_e_values, monitor
from dgsnet.detection.serve import create_app
from dgsnet.errors import UserError
from fastapi.testclient import TestClient
from scipy.stats import binom

from benchmarks.monitor import simulate
from tests.support.tables import interrupted

FPR = 0.05


def promise(folder, fpr=FPR, mean=-20.0):
    """A calibration by which nearly every image of noise is called generated."""
    reals = np.random.default_rng(0).normal(mean, 1, 400)
    save_calibration(folder, calibrate(reals, reals + 1000, fpr=fpr))


@pytest.fixture
def model(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "model")
    promise(folder)
    return folder


def table(path, rows, columns="path,decision,truth"):
    path.write_text("\n".join([columns, *rows, ""]))
    return path


def rows(real=0, wrong=0, source=None):
    """Lines of real images, the wrongly decided ones at the end."""
    decisions = ["real"] * real + ["generated"] * wrong
    return [
        f"{i}.png,{name},real" + ("" if source is None else f",{source}") for i, name in enumerate(decisions)
    ]


def test_the_capital_is_what_the_bets_win():
    """By the formula of the documents, image for image; and whatever the order, for a rate that is true."""
    promised, rng = 0.07, np.random.default_rng(0)
    bets = promised ** (1 - (np.arange(64) + 0.5) / 64)
    weights = (bets - promised) / (promised * (1 - promised))
    x = rng.random(200) < 0.1
    capital = np.cumprod(1 + weights[:, None] * (x - promised), axis=1).mean(0)
    found = log_e_values(np.arange(1, 201), np.cumsum(x), promised)
    np.testing.assert_allclose(np.exp(found), capital, rtol=1e-9)
    # A mean of 1 over what may happen: a fair game at the promised rate, a losing one below.
    for rate, low, high in ((promised, 1 - 1e-9, 1 + 1e-9), (promised / 2, 0, 0.9)):
        mean = (binom.pmf(np.arange(51), 50, rate) * np.exp(log_e_values(50, np.arange(51), promised))).sum()
        assert low < mean < high


def test_levels_are_within_the_whole_however_many_sources_come():
    assert levels(1, named=False).tolist() == [LEVEL]
    several = levels(10_000, named=True)
    assert 0.999 * LEVEL < several.sum() < LEVEL and (np.diff(several) < 0).all()


def test_false_alarms_and_how_soon_true_ones_come():
    """A part of the simulation of the documents."""
    found = {(row["rate"], row["test"]): row for row in simulate(streams=1000, images=2000)}
    for test in ("monitor", "monitor, 4 sources"):
        assert 0 < found[0.01, test]["alarms"] < LEVEL
        assert found[0.1, test]["alarms"] == 1
    assert found[0.01, "fixed size, looked at daily"]["alarms"] > 2 * LEVEL
    assert found[0.1, "monitor"]["median_images"] < 40 < found[0.03, "monitor"]["median_images"] < 400
    assert found[0.02, "monitor"]["median_images"] > found[0.03, "monitor"]["median_images"]


def test_an_alarm_is_raised_kept_and_lifted_by_a_new_calibration(model, tmp_path, capsys):
    path = table(tmp_path / "reviewed.csv", rows(real=30, wrong=1))
    words = ["monitor", "--model", str(model), "--reviewed", str(path)]
    main(words)
    assert "1 of 31 real images were called generated, 3.23% where at most 5.00%" in capsys.readouterr().out
    assert not alarmed(model)
    with path.open("a") as file:
        file.write("\n".join(rows(wrong=12)) + "\nx.png,generated,generated\nhalf.png,gener")
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().out
    assert stop.value.code == 3 and "13 of 43" in said and "ALARM" in said and "--replace" in said
    found = json.loads((model / "best" / "monitor.json").read_text())
    assert {name: found[name] for name in ("alarm", "images", "false_positives", "promised")} == {
        **{"alarm": True, "images": 43, "false_positives": 13, "promised": FPR}
    }
    assert found["e_value"] >= 1 / LEVEL and alarmed(model)
    with path.open("a") as file:
        # Right answers do not undo the alarm.
        file.write("ated,real\n" + "\n".join(rows(real=900)) + "\n")
    with pytest.raises(SystemExit):
        main(words)
    again = json.loads((model / "best" / "monitor.json").read_text())
    assert again["images"] == 944 and again["e_value"] >= found["e_value"]
    promise(model, fpr=0.2)
    assert not alarmed(model)
    main(words)
    assert "no reviewed real images of this calibration yet" in capsys.readouterr().out
    with path.open("a") as file:
        file.write("\n".join(rows(real=4, wrong=1)) + "\n")
    assert monitor(model, path).images == 5 and not alarmed(model)


def test_an_alarm_is_of_one_source_and_that_of_all_their_images_may_be_silent(model, tmp_path):
    columns = "path,source,decision,truth"
    calm = [f"{i}.png,calm,real,real" for i in range(400)]
    odd = [f"{i}.png,odd,{'generated' if i % 2 else 'unsure'},0" for i in range(24)]
    found = monitor(model, table(tmp_path / "several.csv", [*calm, *odd], columns))
    assert [(s.name, s.images, s.false_positives, s.alarm) for s in found.sources] == [
        ("calm", 400, 0, False),
        ("odd", 24, 12, True),
    ]
    assert [s.level for s in found.sources] == pytest.approx([LEVEL / 2, LEVEL / 6])
    assert found.alarm and found.e_value == pytest.approx(found.sources[1].e_value / 6)
    (model / "best" / "monitor.json").unlink()
    assert not monitor(
        model, table(tmp_path / "one.csv", [row.replace("odd", "calm") for row in [*calm, *odd]], columns)
    ).alarm


def test_predict_and_the_page_obey(model, images, tmp_path):
    def decisions(name):
        main(
            ["predict", str(images), "--model", str(model), "--device", "cpu", "--out", str(tmp_path / name)]
        )
        with open(tmp_path / name, newline="") as file:
            return {row["path"]: (row["probability"], row["decision"]) for row in csv.DictReader(file)}

    before = decisions("before.csv")
    assert "generated" in {decision for _, decision in before.values()}
    client = TestClient(create_app(Detector.load(model, device="cpu")), base_url="http://localhost")
    image = (images / "00.png").read_bytes()
    assert client.post("/api/score", content=image).json()["decision"] == "generated"
    from dgsnet.detection.scoring import predict_command

    interrupted(predict_command, [str(images)], str(model), str(tmp_path / "half.csv"), rows=1)
    # The e-value is beyond 64 bits.
    assert monitor(model, table(tmp_path / "r.csv", rows(wrong=60))).alarm
    after = decisions("after.csv")
    assert {path: (p, "unsure" if d == "generated" else d) for path, (p, d) in before.items()} == after
    with pytest.raises(UserError, match=r"other settings \(alarm\)"):
        predict_command([str(images)], str(model), str(tmp_path / "half.csv"), resume=True)
    # The page was there before the alarm.
    assert client.post("/api/score", content=image).json()["decision"] == "unsure"
    assert client.get("/api/model").json()["alarm"] and "does not hold" in client.get("/").text
    assert Detector.load(model, device="cpu", calibrated=False).decide([0.9]) == ["generated"]


def test_the_page_notes_what_was_real_once_and_where_it_is_asked_to(model, images, tmp_path):
    path, image = tmp_path / "reviewed.csv", (images / "00.png").read_bytes()
    detector = Detector.load(model, device="cpu")
    plain = TestClient(create_app(detector), base_url="http://localhost")
    row = plain.post("/api/score", content=image).json()
    assert "review" not in row and plain.post("/api/reviewed?review=").status_code == 404
    client = TestClient(create_app(detector, reviewed=path), base_url="http://localhost")
    assert client.get("/api/model").json()["reviewed"] and not path.exists()
    for name in ("a, b.png", "=2.png"):
        row = client.post("/api/score", params={"name": name}, content=image).json()
        assert client.post("/api/reviewed", params={"review": row["review"]}).json() == {"status": "noted"}
        assert client.post("/api/reviewed", params={"review": row["review"]}).status_code == 404
    assert path.read_text() == 'path,decision,truth\n"a, b.png",generated,real\n\'=2.png,generated,real\n'
    assert client.post("/api/reviewed", headers={"Origin": "http://elsewhere"}).status_code == 403
    found = monitor(model, path)
    assert (found.images, found.false_positives) == (2, 2)
    path.write_text("a,b\n")
    row = client.post("/api/score", content=image).json()
    answer = client.post("/api/reviewed", params={"review": row["review"]})
    assert answer.status_code == 500 and "log says why" in answer.json()["detail"]


def test_mistakes_are_one_line_and_lose_nothing(model, run, tmp_path):
    good = table(tmp_path / "good.csv", rows(real=3))
    with pytest.raises(UserError, match="promises nothing: set its threshold"):
        monitor(run, good)
    monitor(model, good)
    stored = (model / "best" / "monitor.json").read_bytes()
    for content, words in (
        (good.read_text().replace("1.png", "9.png"), "does not begin with the lines that were read before"),
        ("path,decision,truth\n", "does not begin with"),
        (good.read_text() + "a.png,fake,real\n", "line 5 has no decision"),
        (good.read_text() + "\n\na.png,real\n", "line 7 has no decision"),
        (good.read_text() + 'a.png,"real,real\n', "is no CSV"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            monitor(model, tmp_path / "bad.csv")
        assert "\n" not in str(caught.value)
    assert (model / "best" / "monitor.json").read_bytes() == stored
    (model / "best" / "monitor.json").write_text('{"alarm": true}')
    with pytest.raises(UserError, match=r"monitor\.json is damaged .*: remove it"):
        Detector.load(model, device="cpu")
    (model / "best" / "monitor.json").unlink()
    for content, words in ((b"path,truth\n", "has no column decision"), (b"\xff\xfe\n", "is not UTF-8")):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(UserError, match=words):
            monitor(model, tmp_path / "bad.csv")
    with pytest.raises(UserError, match="No such file"):
        monitor(model, tmp_path / "none.csv")
