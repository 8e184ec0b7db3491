"""What files and generators are called is shown, and neither computed nor obeyed, wherever it is read."""

import csv
import io
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.data.cells import guarded, unguarded
from dgsnet.data.items import find_items, find_samples
from dgsnet.data.lists import read_list
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.detection.monitor import append, monitor
from dgsnet.evaluation.changes import per_image
from dgsnet.evaluation.results import Score
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.tables import read_csv
from tests.support.tiny import CROP, save_noise, save_tiny

NAMES = ["=1+1.png", "+1.png", "-1.png", "@a.png", "'=1.png", "'tis.png", "a=1.png"]
FORMULAS = ("=", "+", "-", "@", "\t", "\r")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), CROP)


@given(st.text())
@example("'")
@example("''=1")
def test_what_is_guarded_is_no_formula_and_is_read_back(text):
    cell = guarded(text)
    assert not cell.startswith(FORMULAS) and unguarded(cell) == text
    assert cell in (text, f"'{text}")


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The current folder, with images of these names."""
    monkeypatch.chdir(tmp_path)
    for picture, name in zip(sorted(save_noise(tmp_path, len(NAMES)).glob("*.png")), NAMES):
        picture.rename(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("raw", [False, True])
def test_a_table_of_scores_holds_no_formulas_and_is_a_list_of_the_same_images(named, run, raw):
    main(["predict", ".", "--model", str(run), "--workers", "0", *["--raw_cells"] * raw])
    cells = [os.path.basename(row["path"]) for row in read_csv(named / "scores.csv")]
    assert sorted(cells) == sorted(NAMES) and all(
        row["probability"] for row in read_csv(named / "scores.csv")
    )
    # The list's names begin as the files' names do.
    (named / "list.txt").write_text("\n".join(NAMES))
    main(["predict", "list.txt", "--model", str(run), "--workers", "0", *["--raw_cells"] * raw])
    cells = [row["path"] for row in read_csv(named / "scores.csv")]
    assert cells == (NAMES if raw else [guarded(name) for name in NAMES])
    if not raw:
        assert [item.path for item in find_items(["scores.csv"])] == NAMES


def test_an_evaluation_holds_no_formulas_and_no_markup(named, run, capsys):
    generators = ["=cmd|' /C calc'!A0", "<img src=x>", "[a](http://b)", "\x1b[2Jx"]
    with (named / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "generator"])
        for i, name in enumerate(NAMES):
            rows.writerow([guarded(name), i % 2, guarded(generators[i // 2])])
    samples = find_samples("list.csv")
    assert [sample.path for sample in samples] == NAMES and samples[0].generator == generators[0]
    (named / "-1.png").write_bytes(b"none")
    main(["evaluate", "--data", "list.csv", "--model", str(run), "--out", "o", "--workers", "0"])
    for table in ("scores.csv", "metrics.csv"):
        with (named / "o" / table).open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert guarded(generators[0]) in cells and not any(cell.startswith(FORMULAS) for cell in cells)
    text = (named / "o" / "metrics.md").read_text()
    assert "&lt;img src=x>" in text.replace("&gt;", ">") and "<img" not in text
    assert r"\[a\](http://b)" in text
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and r"\x1b[2Jx" in said.out and "<img src=x>" in said.out


def test_a_table_of_twins_holds_no_formulas_and_is_read_back(named):
    (named / "list.txt").write_text("\n".join(NAMES))
    main(["twins", "--data", "list.txt", "--by", "resize", "--out", "o", "--workers", "0"])
    cells = [cell for row in read_csv(named / "o" / "twins.csv") for cell in row.values()]
    assert not any(cell.startswith(FORMULAS) for cell in cells)
    assert [row["source"] for _, row in read_list(str(named / "o" / "twins.csv"))] == NAMES


def test_a_table_of_changes_holds_no_formulas():
    score = Score("=1+1.png", "@maker", 1, 0.75, suite="+web")
    rows = io.StringIO(per_image([score], [replace(score, probability=0.25)], 0.5))
    (cells,) = csv.DictReader(rows)
    wanted = {"suite": "'+web", "generator": "'@maker", "path": "'=1+1.png", "before": "0.75"}
    assert {name: cells[name] for name in wanted} == wanted


def test_reviewed_images_are_no_formulas_and_sources_are_read_as_they_were(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "best")
    rng = np.random.default_rng(0)
    save_calibration(tmp_path, calibrate({"a": rng.normal(-1, 1, 300)}, rng.normal(1, 1, 300), fpr=0.05))
    append(tmp_path / "reviewed.csv", NAMES[0], "real")
    (cells,) = read_csv(tmp_path / "reviewed.csv")
    assert cells["path"] == guarded(NAMES[0])
    (tmp_path / "reviewed.csv").write_text("path,decision,truth,source\na,real,real,'=1\nb,real,real,'tis\n")
    found = monitor(tmp_path, tmp_path / "reviewed.csv")
    assert [source.name for source in found.sources] == ["=1", "'tis"]


def test_no_name_reaches_the_terminal_as_it_is(tmp_path, run, monkeypatch, capsys):
    """Of what is printed in good order, of warnings, and of the line that ends a command."""
    monkeypatch.chdir(tmp_path)
    names = ["a\x1b[31m.png", "b\x9b2J.png", "c\u202egnp.png", "d\rwas here.png", "e\x07.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"none")
    (tmp_path / os.fsdecode(b"f\xff.png")).write_bytes(b"none")
    save_noise(tmp_path, 1)
    shutil.copy("00.png", "again.png")
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f'"{name}",{i % 2}\n' for i, name in enumerate(names) if "\r" not in name)
        + "00.png,0\nagain.png,1\n"
    )  # fmt: skip
    np.save(run / "best" / "training_images.npy", np.zeros(1, np.int64))
    main(["evaluate", "--data", "list.csv", "--model", str(run), "--out", "o", "--workers", "0"])
    with pytest.raises(SystemExit):
        main(["predict", *names, "--model", str(run), "--workers", "0", "--out", "o/\x1b]0;t\x07.csv"])
    with pytest.raises(SystemExit):
        main(["calibrate", "--reals", *map(str, sorted(tmp_path.glob("*.png"))), "--model", str(run)])
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not {"\x1b", "\x9b", "\u202e", "\x07", "\udcff"} & {*text} and "\rwas" not in text
        assert r"\x1b" in text
    for code in (r"\x9b2J", r"\u202egnp", r"f\xff.png", r"\x07"):
        assert code in said.out + said.err
