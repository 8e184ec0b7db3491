"""Every option of every command, and where its value is seen in the end; see test_forwarding.py.

A row is an option, its words, and where its value is seen: an argument of a function that the command calls,
or something that the command wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dgsnet.config import Config

from tests.support.watched import FILE_MODEL


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
