"""Every option of every command arrives with its value at what the command calls; an interrupt loses nothing.

The rows are in forwarded.py. An option without one fails, whichever command gets it.
"""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dgsnet.cli import main
from dgsnet.config import Config
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.model.checkpoint import read_extra
from starlette.testclient import TestClient

from tests.dgsnet.forwarded import SETTINGS, SWITCHES, TABLE, Row, command_of, words_of
from tests.support.watched import FUNCTIONS, Watched, write_files


def look(command: str, seen: dict[str, Any]) -> None:
    """Add what a command wrote, or what the page shows that it serves."""
    out = Path("o")
    seen["files"] = {name for name in os.listdir(out) if not name.startswith(".")} if out.is_dir() else set()
    if command == "audit":
        found = json.loads((out / "audit.json").read_text())
        seen |= {name: found[name] for name in ("n_real", "n_generated")}
        seen["page names the data"] = "old, new" in (out / "audit.html").read_text()
        seen["AUC of captions"] = found["captions"] and found["captions"]["auc"]
    elif command == "train":
        seen |= seen["train.config"].flat()
    elif command == "average":
        seen["averaged"] = read_extra(out)["averaged"]
    elif command == "update":
        job, update = seen["fit.job"], seen["fit.job"].update
        seen |= {
            **job.config.flat(),
            "out": job.out,
            "images": len(job.samples),
            "rule": update.rule,
            "margin": update.margin,
        }
        seen |= {"replayed": len(update.samples), "replayed for each new one": update.ratio}
        seen["suites"] = {name: len(items) for name, items in seen["report.suites"].items()}
        seen["model"] = json.loads((out / "update.json").read_text())["model"]
        seen["pinned"] = update.pins and len(update.pins.items)
    elif command == "evaluate" and "evaluate.samples" not in seen:
        seen["page names the table"] = "old.csv" in (out / "report.html").read_text()
        seen |= json.loads((out / "metrics.json").read_text())
        seen["files"] -= {"metrics.png", "scores.csv"}
    elif command == "evaluate":
        suites = seen["evaluate.samples"]
        seen["suites"] = {name: len(samples) for name, samples in suites.items()}
        seen["splits"] = {Path(sample.path).parts[1] for samples in suites.values() for sample in samples}
        seen["distortions"] = [distortion.name for distortion in seen["evaluate.distortions"]]
        seen["page names the model"] = bool(re.search(r"\bmine\b", (out / "report.html").read_text()))
        seen["files"] &= {"metrics.csv", "metrics.json", "metrics.md", "report.html", "scores.jsonl"}
    elif command == "predict":
        seen["files"] -= {"maps"}
        lines = (out / "scores.csv").read_text().splitlines() if (out / "scores.csv").exists() else []
        seen["decisions"] = {line.split(",")[2] for line in lines[1:]}
        seen |= {"rows": len(lines[1:]), "raw": any(line.startswith("=none.png,") for line in lines)}
        table = out / "scores.jsonl"
        rows = [json.loads(row) for row in table.read_text().splitlines()] if table.exists() else []
        seen["paths"] = [Path(row["path"]).name for row in rows]
        seen["spread"] = any(row.get("spread") is not None for row in rows)
        seen["provenance"] = any(row.get("provenance") for row in rows)
        seen["declared"] = any(row.get("declared") for row in rows)
        seen["maps"] = len(list(out.glob("maps/**/*.png")))
    elif command == "monitor":
        seen |= json.loads(next(Path().rglob("monitor.json")).read_text())
    elif command == "calibrate":
        found = json.loads(next(Path("o" if out.is_dir() else "mine").rglob("calibration.json")).read_text())
        seen |= {**found, "sources": {source["name"]: source["n"] for source in found["sources"]}}
    elif command == "serve":
        seen["host"], seen["port"] = seen["create_server.address"]
        client = TestClient(seen["app"])
        seen |= client.get("/api/model").json()
        image = next(Path("noise").iterdir()).read_bytes()
        answers = (client.post("/api/score", content=image).status_code for _ in range(9))
        seen["answered"] = len(list(itertools.takewhile(lambda code: code == 200, answers)))
    elif command == "caption":
        paths = [Path(name.removeprefix("../")) for name in json.loads((out / "words.json").read_text())]
        seen["folders"], seen["splits"] = ({path.parts[i] for path in paths} for i in (0, 1))
    elif command == "twins":
        with open(out / "twins.csv", newline="") as file:
            seen["sources"] = Counter(os.path.dirname(row["source"]) for row in csv.DictReader(file))
        words = out / "captions.json"
        seen["captions"] = set(json.loads(words.read_text()).values()) if words.exists() else set()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def watched(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Watched(files, monkeypatch)


def prepare(line: str, rows: list[Row], watched: Watched) -> None:
    """Make what the switches of these rows are for: a calibration to replace, something to go on with."""
    before = [row for row in rows if row.option not in ("--resume", "--replace")]
    if line == "update":
        Path("pins.csv").write_text("path,label\nnoise/00.png,0\nnoise/01.png,1\n")
    if line.endswith("of scores"):
        # Of three decisions; the second table's rows are those that a threshold is made of.
        rows_of_scores = (f"{i}.png,{i},{('real', 'generated')[i > 5]}" for i in range(9))
        Path("old.csv").write_text("\n".join(["path,score,label", *rows_of_scores, ""]))
        made = calibrate(range(6), range(6, 9), fpr=0.6, miss_rate=0.8, raw=True)
        Path("rule").mkdir(exist_ok=True)
        save_calibration("rule", replace(made, low=3.0, threshold=4.5))
    if line == "monitor":
        assert watched.call(["calibrate", "--model", "mine", "--reals", "old/val", "--fpr", "0.4"]) == 0
        rows_of_images = ("a.png,generated,real", "b.png,real,real", "c.png,real,generated")
        Path("reviewed.csv").write_text("\n".join(["path,decision,truth", *rows_of_images, ""]))
    elif line == "calibrate":
        assert watched.call([*words_of(line, before), "--fpr", "0.45"]) == 0
    elif line == "update":
        assert watched.call(words_of(line, before)) == 0
    elif line in ("predict", "caption"):
        assert watched.call(words_of(line, before), interrupt_after=1) == 130
    elif line == "twins":
        assert watched.call(words_of(line, before), interrupt_after=9) == 130


@pytest.mark.parametrize("line", TABLE)
def test_every_option_arrives(line, watched, capsys):
    rows = TABLE[line]
    prepare(line, rows, watched)
    code = watched.call(words_of(line, rows))
    # The demo is stopped where it begins.
    assert code == (2 if line == "demo" else 0), capsys.readouterr().err
    look(command_of(line), watched.seen)
    found = [(row.option, row.place, watched.seen.get(row.place)) for row in rows]
    assert found == [(row.option, row.place, row.value) for row in rows]


@pytest.mark.parametrize("line, option", SWITCHES)
def test_a_switch_is_off_without_its_name_and_no_other_with_it(line, option, watched):
    # Nor with it what does not go without it, and what takes long.
    left_out = {option, "--heatmaps", *(("--trust",) if option == "--provenance" else ())}
    rest = [row for row in TABLE[line] if row.option not in left_out]
    prepare(line, rest, watched)
    if watched.call(words_of(line, rest)) == 2:
        # Without these two something is in the way.
        assert option in ("--replace", "--resume")
        return
    look(command_of(line), watched.seen)
    for row in TABLE[line]:
        assert (watched.seen.get(row.place) == row.value) == (row in rest), row


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_help_says_what_options_do_and_each_has_a_row(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    described = inspect.getdoc(FUNCTIONS[command])
    for parameter in inspect.signature(FUNCTIONS[command]).parameters:
        assert parameter in said and f"    {parameter}: " in described
    options = set(re.findall(r"^  (--[a-z0-9_.]+)", said, flags=re.MULTILINE)) - {"--print_config"}
    if command == "train":
        options -= {f"--{name}" for name, value in SETTINGS.items() if isinstance(value, dict)}
    rows = {row.option for line in TABLE if command_of(line) == command for row in TABLE[line]}
    assert options == {option for option in rows if option.startswith("--")} and options


@pytest.mark.parametrize("line", [line for line in TABLE if command_of(line) != "train"])
def test_no_value_is_a_default_or_that_of_another_option(line):
    given = [row.words for row in TABLE[line] if row.words]
    assert len(set(given)) == len({row.option for row in TABLE[line] if row.words})
    parameters = inspect.signature(FUNCTIONS[command_of(line)]).parameters
    assert not {str(parameter.default) for parameter in parameters.values()} & set(given)


def test_no_setting_is_a_default():
    defaults = Config().flat()
    assert defaults.keys() == Config.from_dict(SETTINGS).flat().keys()
    assert not [name for name, value in Config.from_dict(SETTINGS).flat().items() if value == defaults[name]]


@pytest.mark.parametrize(
    "line, written, images",
    [
        ("predict noise --model mine --out o/scores.csv --resume --workers 1", "scores.csv", 3),
        ("evaluate --data old --split train --model mine --out o --workers 1", "scores.csv", 3),
        ("caption --data old --split train --batch_size 1 --out o/words.json --resume", "words.json", 3),
    ],
)
def test_an_interrupt_loses_nothing(line, written, images, watched, capsys):
    """The same words again do what was left, and then everything is as if there had been no interrupt."""
    target = Path("o") / written
    assert watched.call(line.split()) == 0 and watched.seen["loaded"] == images
    whole = target.read_bytes()
    shutil.rmtree("o")
    for expected in (130, 0):
        capsys.readouterr()
        code = watched.call(line.split(), interrupt_after=1 if expected else images)
        assert code == expected and target.exists() == (not expected)
        assert capsys.readouterr().err.splitlines()[-1:] == ["interrupted"] * bool(expected)
    assert watched.seen["loaded"] == images - 1 and target.read_bytes() == whole


def test_an_interrupt_leaves_the_former_calibration(watched):
    words = ["calibrate", "--model", "mine", "--reals", "new/val", "--fpr", "0.4"]
    words += ["--batch", "1", "--workers", "1"]
    assert watched.call(words) == 0
    kept = next(Path("mine").rglob("calibration.json"))
    before = kept.read_bytes()
    assert watched.call([*words, "--fpr", "0.3", "--replace"], interrupt_after=9) == 130
    assert kept.read_bytes() == before and [*kept.parent.glob("*calibration*")] == [kept]
