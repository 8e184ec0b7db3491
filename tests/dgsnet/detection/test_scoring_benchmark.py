"""benchmarks/scoring.py: every way scores the same images, and what it measures is seen where it is known."""

from __future__ import annotations

import csv
import json
import mmap
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import scoring, scoring_table
from benchmarks.processor_time import ProcessorTime
from tests.support.tables import read_csv

NAME = "dgsnet-tiny"


@pytest.fixture
def small(monkeypatch):
    for name, value in {"PLAIN_BATCH": 6, "SIDE": 232, "MOST_FILES": 70, "COMPARED": 5}.items():
        monkeypatch.setattr(scoring, name, value)


def test_every_way_scores_the_same_images(small, tmp_path):
    files = scoring.write_files(tmp_path, 14)
    before, ours = scoring.faster(NAME, "cpu")
    scoring.to_table(files, ours, tmp_path / "ours.csv")
    rows = read_csv(tmp_path / "ours.csv")
    assert [row["path"] for row in rows] == files
    probabilities = [float(row["probability"]) for row in rows]
    assert len(set(probabilities)) == 14
    one, plain = scoring.one_at_a_time(files, before, 0), scoring.plain(files, before, 0)
    np.testing.assert_allclose(one, before.predict(files), atol=1e-5)
    for found in (probabilities, plain):
        np.testing.assert_allclose(found, one, atol=0.02)
    assert before.precision == "fp32" and before.batch == 1
    scoring.written(plain, files, tmp_path / "plain.csv")
    with open(tmp_path / "plain.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == files


@pytest.mark.slow
def test_rates_and_their_ratios(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    words = f"scoring --parts rates --models {NAME} --threads 1 --seconds 0 --device cpu --out {out}"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    command.main()
    (row,) = json.loads(out.read_text())["results"]
    rate, core = row["images_per_second"], row["core_ms_per_image"]
    ways = {scoring.OURS, scoring.BEFORE, scoring.PLAIN, scoring.CEILING, scoring.INPUT}
    assert rate.keys() == core.keys() == ways and all(value > 0 for value in rate.values())
    rounds = {way: np.array(seconds) for way, seconds in row["seconds_per_image"].items()}
    for way, seconds in rounds.items():
        assert len(seconds) == row["rounds"] == 2 and rate[way] == pytest.approx(1 / np.median(seconds))
    for name, way in (("before", scoring.BEFORE), ("plain", scoring.PLAIN), ("ceiling", scoring.CEILING)):
        assert row[f"of_{name}"] == pytest.approx(np.median(rounds[way] / rounds[scoring.OURS]))
    assert row["of_bound"] >= row["of_ceiling"] and row["cores_allow"] > 0
    # What decodes and prepares is in other processes, and counts: ours takes more than the model alone.
    assert core[scoring.OURS] > core[scoring.CEILING] and row["compared"] == 5 and row["images"] % 6 == 0
    assert "of what is possible" in capsys.readouterr().out


def test_a_leak_is_seen(monkeypatch):
    kept, score = [], scoring.score

    def leaking(detector, items, **options):
        for row in score(detector, items, **options):
            # Of the system, since what earlier tests have freed would not be seen.
            kept.append(mmap.mmap(-1, 2**20))
            kept[-1].write(b"x" * 2**20)
            yield row

    monkeypatch.setattr(scoring, "score", leaking)
    row = scoring.memory("cpu", images=120, samples=12)
    assert len(row["mib"]) == 12 and [done for done, _, _ in row["mib"]] == list(range(10, 121, 10))
    assert 800 < row["own_mib_per_1000"] < 1400 and row["all_mib_per_1000"] > 500


def test_the_page_under_clients(small, monkeypatch):
    row = scoring.page("cpu", NAME, each=1)
    assert row["clients"] == 16 and row["images_per_second"] > 0
    # Sixteen who ask at once wait for longer than one alone.
    assert row["median_ms"] > row["alone_ms"] > 0


def test_processor_time_of_what_is_gone_counts():
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    with ProcessorTime() as used:
        subprocess.run([sys.executable, "-c", burn], check=True)
    # The system counts in hundredths of a second, the program's and its own apart.
    assert 0.45 < used.seconds < 1.5


def test_numbers_are_shortened():
    found = [scoring_table.short(number) for number in (0.0241, 1.349, 31.4, 612_345.0, 2.71e6, 104.0)]
    assert found == ["0.024", "1.3", "31", "610,000", "2.7 million", "100"]


def test_documents_say_what_was_measured():
    content = json.loads((scoring_table.ROOT / scoring_table.RESULT).read_text())
    text = (scoring_table.ROOT / "docs" / "using.md").read_text()
    assert scoring_table.between(text, scoring_table.using(content)) == text
    assert scoring_table.readme(content) in (scoring_table.ROOT / "README.md").read_text()
    with pytest.raises(SystemExit, match="nothing between"):
        scoring_table.between("no marks", "")
