"""Every option of every command arrives with its value at what the command calls; an interrupt loses nothing.

A row is an option, its words, and where its value is seen in the end: an argument of a function that the
command calls, or something that the command wrote. An option without a row fails, whichever command gets it.
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
from typing import Any, NamedTuple

import pytest
from dgsnet.cli import main
from dgsnet.config import Config
from dgsnet.detection.decisions import calibrate, save_calibration
from dgsnet.model.checkpoint import read_extra
from starlette.testclient import TestClient

from tests.support.watched import FILE_MODEL, FUNCTIONS, Watched, write_files


class Row(NamedTuple):
    """An option, the words after it (of a switch none), a place, and the value that is seen there."""

    option: str
    words: str
    place: str
    value: Any


def plain(function: str, **values: Any) -> list[Row]:
    """Options that a function's parameters of the same names get as they are."""
    return [Row(f"--{name}", str(value), f"{function}.{name}", value) for name, value in values.items()]


# Every setting of a training run, none as it is by default.
SETTINGS = {
    "model": {
        **{"name": "timm/vit_x", "pretrained": "mine.pt", "lora_rank": 7, "lora_alpha": 7.5},
        **{"lora_dropout": 0.71, "lora_targets": "mlp", "feature": "class", "l2": True},
    },
    "preprocess": {
        **{"mode": "crop", "image_size": 96, "patch_size": 24, "num_patches": 17, "normalization": "clip"},
        **{"flip": False, "crops": "tiles", "small": "tile", "resize": "squash", "side": 99},
        **{"antialias": False, "grid": 3},
    },
    "data": {
        **{"train": ["old/train", "more.csv"], "val": ["old/val"], "captions": "words.json"},
        **{
            "nuisances": "files",
            "workers": 3,
            "prefetch": 5,
            "balance": "class",
            "cap": 12,
            "pairs": "independent",
            "selection": "device",
            "views": 4,
            "cache": "kept",
        },
    },
    "augment": {"preset": "web", "steps": ["blur:1@0.3", "jpeg:50"]},
    "optim": {
        **{"lr": 0.003, "betas": [0.81, 0.91], "weight_decay": 0.02, "batch_size": 11, "accumulation": 6},
        **{"head_epochs": 8, "epochs": 9, "max_steps": 210, "precision": "bf16", "compile": "default"},
        **{"schedule": "cosine", "warmup": 0.3, "clip": 0.7, "label_smoothing": 0.1, "average": 2},
        "best": "worst_auc",
        **{"checkpointing": True, "parallel": "fsdp"},
    },
    "surgery": {
        **{"mode": "none", "alignment": 0.4, "order": "project_first", "eps": 0.001},
        **{"reference_batch_size": 13, "text": "both", "distillation": 0.6},
    },
    **{"seed": 14, "checkpoint_every": 15, "log_every": 16},
}
# How scores are made.
HOW = {"views": 16, "batch": 4, "precision": "bf16", "crops": 5}
DETECTOR = [
    *plain("load", device="cuda:5", **HOW, pretrained="weights.pt"),
    Row("--model", "mine", "load.run", "mine"),
]
CREDENTIALS = [
    Row("--provenance", "", "provenance", True),
    Row("--trust", "anchors.pem", "ProvenanceReader.trust", "anchors.pem"),
    Row("--declared", "", "declared", True),
]
ON_RAY = [Row("--workers", "7", "on_ray.workers", 7), Row("--model", "mine", "load.run", "mine")]
# Of some commands several lines, as some options do not go together.
TABLE: dict[str, list[Row]] = {
    "audit": [
        Row("--data", "old new", "n_generated", 14 + 19),
        Row("--data", "old new", "page names the data", True),
        Row("--split", "val", "n_real", 12 + 16),
        Row("--captions", "words.json", "AUC of captions", 1.0),
        Row("--out", "o", "files", {"audit.html", "audit.json"}),
    ],
    "train": [
        *(
            Row(f"--{name}", json.dumps(value, separators=(",", ":")).strip('"'), name, value)
            for name, value in Config.from_dict(SETTINGS).flat().items()
        ),
        Row("--out", "o", "train.out", Path("o")),
        Row("--resume", "", "train.resume", True),
    ],
    "train, by a recipe": [
        Row("--recipe", "dda", "augment.preset", "dda"),
        Row("--out", "o", "train.out", Path("o")),
    ],
    "train, from a file": [
        Row("--config", "run.yaml", "seed", 77),
        Row("--out", "o", "train.out", Path("o")),
    ],
    "update": [
        Row("--model", "mine", "model", "mine"),
        Row("--pretrained", "weights.pt", "load_model.pretrained", "weights.pt"),
        Row("--pretrained", "weights.pt", "report.pretrained", "weights.pt"),
        Row("--data", "new old/val", "images", 3 + 4 + 12 + 14),
        Row("--replay", "old new/val", "replayed", 1 + 2 + 16 + 19),
        Row("--test", "a=old/train b=new/val", "suites", {"a": 1 + 2, "b": 16 + 19}),
        Row("--out", "o", "out", Path("o")),
        Row("--rule", "gem", "rule", "gem"),
        Row("--margin", "0.75", "margin", 0.75),
        Row("--lr", "0.25", "optim.lr", 0.25),
        Row("--steps", "3", "optim.max_steps", 3),
        Row("--replay_share", "0.8", "replayed for each new one", pytest.approx(4)),
        Row("--seed", "4", "seed", 4),
        Row("--pinned", "pins.csv", "pinned", 2),
        Row("--allow_lost", "", "settle.allow_lost", True),
        # Called before with the same options.
        Row("--resume", "", "out", Path("o")),
    ],
    "evaluate": [
        *DETECTOR,
        Row("--model", "mine", "page names the model", True),
        Row("--data", "old y=new", "suites", {"old": 1 + 2, "y": 3 + 4}),
        Row("--split", "train", "splits", {"train"}),
        Row(
            "--out",
            "o",
            "files",
            {"metrics.csv", "metrics.json", "metrics.md", "report.html", "scores.jsonl"},
        ),
        Row("--robustness", "jpeg:61 blur:2.5", "distortions", ["jpeg:61", "blur:2.5"]),
        Row("--audit", "audit.json", "evaluate.file_model", FILE_MODEL),
        Row("--threshold", "0.25", "evaluate.threshold", 0.25),
        Row("--frozen", "", "evaluate.frozen", True),
        Row("--reencode", "webp:81", "evaluate.reencode", "webp:81"),
        Row("--raw_cells", "", "write_tables.raw_cells", True),
        Row("--workers", "7", "workers", {7}),
    ],
    "evaluate, with Ray": [
        *ON_RAY,
        Row("--engine", "ray", "on Ray", 3),
        Row("--data", "old/train", "suites", {"old": 1 + 2}),
        Row("--out", "o", "evaluate.engine", "ray"),
    ],
    "evaluate, of scores": [
        Row("--scores", "old.csv", "page names the table", True),
        Row("--model", "rule", "calibrated_threshold", 4.5),
        Row("--out", "o", "files", {"metrics.csv", "metrics.json", "metrics.md", "report.html"}),
    ],
    "predict": [
        *DETECTOR,
        *CREDENTIALS,
        Row("PATHS", "noise/02.png noise/00.png", "paths", ["02.png", "00.png"]),
        Row("--out", "o/scores.jsonl", "files", {"scores.jsonl"}),
        Row("--workers", "7", "workers", {7}),
        # Called before and interrupted after one of two images.
        Row("--resume", "", "loaded", 1),
        Row("--heatmaps", "o/maps", "maps", 2),
        Row("--consistency", "", "spread", True),
    ],
    "predict, into CSV": [
        Row("PATHS", "noise/02.png =none.png", "rows", 2),
        Row("--model", "mine", "load.run", "mine"),
        Row("--out", "o/scores.csv", "files", {"scores.csv"}),
        Row("--raw_cells", "", "raw", True),
    ],
    "predict, of scores": [
        Row("PATHS", "old.csv", "rows", 9),
        Row("--model", "rule", "decisions", {"real", "unsure", "generated"}),
        Row("--out", "o/scores.csv", "files", {"scores.csv"}),
    ],
    "predict, with Ray": [
        Row("PATHS", "noise", "paths", ["00.png", "01.png", "02.png"]),
        Row("--out", "o/scores.jsonl", "files", {"scores.jsonl"}),
        *ON_RAY,
        Row("--engine", "ray", "on Ray", 3),
        Row("--consistency", "", "spread", True),
    ],
    "calibrate": [
        *DETECTOR,
        *(Row(f"--{name}", str(value), name, value) for name, value in HOW.items()),
        Row("--reals", "old/val --reals new/val noise", "sources", {"old/val": 12, "new/val noise": 16 + 3}),
        Row("--generated", "new/val/1_fake old/val", "n_generated", 19 + 14),
        Row("--fpr", "0.4", "fpr", 0.4),
        Row("--miss_rate", "0.3", "miss_rate", 0.3),
        # Called before with another rate.
        Row("--replace", "", "fpr", 0.4),
        Row("--workers", "7", "workers", {7}),
    ],
    "calibrate, of scores": [
        Row("--scores", "old.csv", "n_reals", 6),
        Row("--out", "o", "files", {"calibration.json"}),
        Row("--fpr", "0.6", "fpr", 0.6),
        Row("--miss_rate", "0.8", "miss_rate", 0.8),
    ],
    "monitor": [
        Row("--model", "mine", "images", 2),
        Row("--reviewed", "reviewed.csv", "false_positives", 1),
    ],
    "monitor, of scores": [
        Row("--model", "rule", "images", 6),
        Row("--scores", "old.csv", "false_positives", 1),
    ],
    "average": [
        Row("PATHS", "mine mine/best", "averaged", ["mine", "mine/best"]),
        Row("--out", "o", "files", {"adapters.safetensors", "config.json", "training_images.npy"}),
        Row("--pretrained", "weights.pt", "load_model.pretrained", "weights.pt"),
    ],
    "calibrate, with Ray": [
        *ON_RAY,
        Row("--engine", "ray", "on Ray", 12),
        Row("--reals", "old/val", "n_reals", 12),
        Row("--fpr", "0.4", "fpr", 0.4),
    ],
    "convert": [
        Row("CHECKPOINT", "theirs.pth", "convert.checkpoint", "theirs.pth"),
        *plain("convert", out="o", name="ViT-B-32", alpha=2.5, pretrained="clip.pt"),
        Row("--accept_licence", "", "convert.accept_licence", True),
    ],
    "export": plain("export", model="mine", format="hf", out="o", pretrained="weights.pt"),
    "serve": [
        *DETECTOR,
        *CREDENTIALS,
        Row("--host", "0.0.0.0", "host", "0.0.0.0"),
        Row("--port", "81", "port", 81),
        Row("--reviewed", "told.csv", "reviewed", True),
        Row("--max_megabytes", "6", "max_bytes", 6 * 2**20),
        Row("--per_minute", "3", "answered", 3),
        Row("--consistency", "", "consistency", True),
    ],
    "caption": [
        Row("--data", "old", "folders", {"old"}),
        Row("--split", "val", "splits", {"val"}),
        Row("--out", "o/words.json", "files", {"words.json"}),
        *plain("Captioner", model="blip", device="cuda:5"),
        Row("--batch_size", "5", "batch", 5),
        Row("--workers", "7", "workers", {7}),
        # Called before and interrupted after one of six batches, which hold 26 images.
        Row("--resume", "", "loaded", 5),
    ],
    "twins": [
        Row("--data", "old/val noise", "sources", {"old/val/0_real": 12, "noise": 3}),
        Row("--by", "builtin:nearest resize", "load_makers.words", ["builtin:nearest", "resize"]),
        Row("--device", "cuda:5", "load_makers.device", "cuda:5"),
        Row("--out", "o", "files", {"builtin-nearest", "resize", "captions.json", "twins.csv"}),
        Row("--captions", "words.json", "captions", {"sky"}),
        Row("--seed", "4", "PairWriter.seed", 4),
        Row("--batch_size", "2", "PairWriter.batch", 2),
        Row("--workers", "7", "workers", {7}),
        # Called before and interrupted after the first eight of 15 images and one more.
        Row("--resume", "", "loaded", 7),
    ],
    "demo": [Row("--out", "o", "write_dataset.root", Path("o/data"))],
}
SWITCHES = [(line, row.option) for line, rows in TABLE.items() for row in rows if not row.words]


def words_of(line: str, rows: list[Row]) -> list[str]:
    """A command line; an option with several rows is given once."""
    words = [command_of(line)]
    for option, value in {row.option: row.words for row in rows}.items():
        words += [*([option] if option.startswith("--") else []), *value.split()]
    return words


def command_of(line: str) -> str:
    return line.partition(",")[0]


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
