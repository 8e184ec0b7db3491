"""A killed `dgsnet predict` goes on with the rows that it has, and with no others."""

import json
import os
import shutil
import signal
import time
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest
from dgsnet.detection.categories import category_rates
from dgsnet.detection.decisions import SETTINGS, Calibration, calibrate, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.scoring import predict_command
from dgsnet.errors import UserError
from dgsnet.evaluation.evaluate import evaluate_command
from dgsnet.model.checkpoint import build_model, load_model, load_trained_state, save_model, trained_state

from tests.support.declarations import source_type, with_text, with_xmp
from tests.support.fresh import FORKSERVER
from tests.support.tables import interrupted, read_csv, same


def test_a_killed_run_goes_on_without_losing_or_repeating_a_row(run, images, table, tmp_path):
    out = tmp_path / "scores.csv"
    part = tmp_path / "scores.csv.partial"
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
            # A kill in the middle of a write leaves half a line.
            file.write(b'{"path": "half a li')
    assert 0 < kept[1] < kept[2] < len(table)

    with pytest.raises(UserError, match=f"holds {kept[2]} rows already: go on with --resume"):
        predict_command(*arguments)
    predict_command(*arguments, **options)
    assert not part.exists()
    written = read_csv(out)
    assert [row["path"] for row in written] == [f"{images}/{name}" for name in sorted(table)]
    same(written, table)


def test_where_a_run_was_interrupted_is_not_seen_in_scores_of_batches(run, images, tmp_path):
    """Nor by how many processes it was read, nor by which entry: predict, evaluate, Python."""
    # In bf16 six decimals show in which company an image was scored.
    how = {"device": "cpu", "batch": 4, "precision": "bf16"}
    paths = [str(path) for path in sorted(images.iterdir())[:11]]
    scores = Detector.load(run, **how).predict(paths[::-1])[::-1].astype(float)
    expected = [f"{score:.6f}" for score in scores]
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{path},{i % 2}\n" for i, path in enumerate(paths)))
    for number, (rows, workers) in enumerate(((1, 2), (6, 0))):
        table, folder = str(tmp_path / f"{number}.csv"), str(tmp_path / f"{number}")
        for command, arguments, resume in (
            (predict_command, (paths, str(run), table), {"resume": True}),
            (evaluate_command, ([str(listed)], str(run), folder), {}),
        ):
            interrupted(command, *arguments, rows=rows, workers=0, **how)
            command(*arguments, workers=workers, **resume, **how)
        for written in (table, f"{folder}/scores.csv"):
            assert [row["probability"] for row in read_csv(written)] == expected


def test_what_changed_since_the_kill(run, images, tmp_path):
    """Rows that are there stay; images that came since get theirs; a list's repetitions are counted."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "d.png", "e.png"):
        (folder / name).write_bytes((images / "00.png").read_bytes())
    listed = tmp_path / "l.txt"
    listed.write_text("images/b.png\n" * 3)
    arguments = ([str(folder), str(listed)], run, str(tmp_path / "s.csv"))

    interrupted(predict_command, *arguments, rows=4)
    (folder / "a.png").write_bytes((images / "01.png").read_bytes())
    (folder / "c.png").write_bytes((images / "01.png").read_bytes())
    (folder / "e.png").unlink()
    predict_command(*arguments, resume=True)
    written = [os.path.basename(row["path"]) for row in read_csv(tmp_path / "s.csv")]
    assert written == ["b.png", "d.png", "e.png", "b.png", "a.png", "c.png", "b.png", "b.png"]


@pytest.fixture
def calibrated(run, tmp_path):
    """A copy of the model with a calibration no two numbers of which are equal."""
    copy = shutil.copytree(run, tmp_path / "calibrated")
    rng = np.random.default_rng(0)
    sources = {"phones": rng.normal(-2, 1, 200), "scans": rng.normal(-1, 1, 90)}
    calibration = calibrate(sources, rng.normal(2, 1, 150), fpr=0.05, miss_rate=0.1)
    save_calibration(copy, calibration)
    return copy, calibration


def test_whatever_part_of_a_calibration_changes_the_rows_are_refused(calibrated, images, tmp_path):
    model, calibration = calibrated
    arguments = [f"{images}/0*.png"], str(model), str(tmp_path / "s.csv")
    interrupted(predict_command, *arguments, rows=3)
    before = (tmp_path / "s.csv.partial").read_bytes()
    others = {
        **{"precision": "bf16", "crops": "tiles"},
        "categories": category_rates(["night"], [0], [True]),
    }
    for part in fields(Calibration):
        # A network's calibration is never raw.
        if part.name == "raw":
            continue
        value = getattr(calibration, part.name)
        if part.name in others:
            other = others[part.name]
        else:
            other = (
                value[::-1] if part.name == "sources" else value + (1 if isinstance(value, int) else 0.001)
            )
        save_calibration(model, replace(calibration, **{part.name: other}))
        named = f"{part.name}, calibration" if part.name in SETTINGS else "calibration"
        with pytest.raises(UserError, match=rf"begun with other settings \({named}\)"):
            predict_command(*arguments, resume=True)
    assert (tmp_path / "s.csv.partial").read_bytes() == before
    save_calibration(model, calibration)
    predict_command(*arguments, resume=True)
    assert len(read_csv(tmp_path / "s.csv")) == 10


def parts_of(model):
    """Copies of a model folder, in each of which one part is another, and what names it."""
    loaded, config = load_model(model)
    names = trained_state(loaded)
    (first, *_, last) = [name for name in names if not name.startswith("head.")]
    for name in (first, last, "head.image_head.weight", "head.image_head.bias"):
        state = trained_state(loaded)
        state[name] = state[name] + 0.01
        other, _ = load_model(model)
        load_trained_state(other, state)
        yield "model", other, config
    # Only the backbone of this model is another.
    other = build_model(replace(config, seed=1), with_text=False)
    load_trained_state(other, trained_state(loaded))
    yield "model", other, replace(config, seed=1)
    for change in (
        {"flip": False},
        {"normalization": "inception"},
        {"mode": "patches", "patch_size": 8, "num_patches": 16},
    ):
        yield "preprocessing", loaded, replace(config, preprocess=replace(config.preprocess, **change))


def test_whatever_part_of_a_model_changes_the_rows_are_refused(run, images, tmp_path):
    """Of a table and of an evaluation's logits: adapters, head, backbone and preprocessing."""
    model = shutil.copytree(run, tmp_path / "model")
    arguments = [f"{images}/0*.png"], str(model), str(tmp_path / "s.csv")
    interrupted(predict_command, *arguments, rows=3)
    listed = tmp_path / "list.csv"
    listed.write_text(f"path,label\n{images}/00.png,0\n{images}/01.png,1\n{images}/02.png,1\n")
    measured = [str(listed)], str(model), str(tmp_path / "o")
    interrupted(evaluate_command, *measured, rows=2)
    for named, other, config in parts_of(model):
        save_model(model / "best", other, config)
        for command, words, options in (
            (predict_command, arguments, {"resume": True}),
            (evaluate_command, measured, {}),
        ):
            with pytest.raises(UserError, match=rf"begun with other settings \({named}.*\)"):
                command(*words, **options)
    with pytest.raises(UserError, match=r"other settings \(views\)"):
        predict_command(arguments[0], run, arguments[2], resume=True, views=2)
    with pytest.raises(UserError, match=r"other settings \(paths\)"):
        predict_command([f"{images}/0?.png"], run, arguments[2], resume=True)
    predict_command(arguments[0], run, arguments[2], resume=True)
    assert len(read_csv(arguments[2])) == 10


def test_what_files_declare_has_columns_where_it_is_asked_for(run, tmp_path):
    """A table that an older version began without them goes on without them."""
    folder = tmp_path / "declaring"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(with_xmp(source_type("compositeSynthetic"), "JPEG"))
    (folder / "b.png").write_bytes(with_text(Software="NovelAI"))
    (folder / "c.png").write_bytes(b"none")
    paths, out, table = [str(folder)], str(tmp_path / "t.csv"), tmp_path / "t.csv.partial"
    predict_command(paths, run, out, declared=True)
    rows = [list(row.values()) for row in read_csv(out)]
    assert [row[4:] for row in rows] == [
        ["partly", "compositeSynthetic (XMP DigitalSourceType)"],
        ["generated", "NovelAI (PNG Software)"],
        ["", ""],
    ]
    interrupted(predict_command, paths, run, out, rows=1)
    with pytest.raises(UserError, match=r"other settings \(declared\)"):
        predict_command(paths, run, out, declared=True, resume=True)
    head, *lines = table.read_text().splitlines()
    assert all("declared" not in line for line in lines)
    older = {key: value for key, value in json.loads(head).items() if key != "declared"}
    table.write_text("\n".join([json.dumps(older), *lines, ""]))
    predict_command(paths, run, out, resume=True)
    assert [row[:4] for row in rows] == [list(row.values()) for row in read_csv(out)]


def test_a_partial_table_of_version_0_1_is_refused_in_one_line(run, images, tmp_path):
    """As that version left it: its hash of the model was another one, with the preprocessing in it."""
    part = tmp_path / "s.csv.partial"
    settings = {"model": "25855c3d7fd70c5f", "calibration": "None", "views": 1, "paths": [str(images)]}
    row = {
        "path": f"{images}/00.png",
        "probability": 0.386235,
        "decision": "real",
        "error": "",
        "spread": None,
    }
    row |= {"provenance": "", "issuer": "", "source_type": "", "provenance_note": ""}
    lines = [settings | {"consistency": False, "provenance": ""}, row]
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = part.read_bytes()
    with pytest.raises(
        UserError, match=r"s.csv.partial is no table of this command and version.*delete it$"
    ) as e:
        predict_command([str(images)], run, str(tmp_path / "s.csv"), resume=True)
    assert "\n" not in str(e.value) and part.read_bytes() == before
