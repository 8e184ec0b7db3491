"""Metrics against hand-computed and brute-force values, and what `dgsnet evaluate` prints and writes."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from dgsnet import evaluation
from dgsnet.checkpoint import build_model, save_model
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.errors import UserError
from dgsnet.evaluation import Evaluation, Score, metrics
from PIL import Image

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
    )
    return save_model(tmp_path_factory.mktemp("model") / "m", build_model(config, with_text=False), config)


@pytest.fixture
def data(tmp_path):
    """Two generators, five images of each class, and one damaged image in the second."""
    for generator in ("alpha", "beta"):
        for label in ("0_real", "1_fake"):
            folder = tmp_path / "data" / generator / label
            folder.mkdir(parents=True)
            for i in range(5):
                pixels = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "data/beta/1_fake/broken.png").write_bytes(b"no picture")
    return tmp_path / "data"


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def brute_force_auc(labels, scores):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return np.mean(pairs)


def test_metrics_by_hand():
    result = metrics([0, 0, 1, 1, 1], [0.1, 0.7, 0.9, 0.6, 0.5])
    assert result["accuracy"] == 3 / 5  # 0.5 is not above 0.5
    assert result["real_accuracy"] == 1 / 2
    assert result["generated_accuracy"] == 2 / 3
    assert result["ap"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert result["auc"] == pytest.approx(4 / 6)
    assert (result["n_real"], result["n_generated"]) == (2, 3)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_all_pairs(ties):
    labels = RNG.integers(0, 2, 60)
    scores = RNG.random(60).round(1 if ties else 9)
    assert metrics(labels, scores)["auc"] == pytest.approx(brute_force_auc(labels, scores))


def test_threshold_moves_accuracy_and_not_the_ranking():
    labels, scores = [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]
    assert metrics(labels, scores)["accuracy"] == 0.5
    assert metrics(labels, scores, threshold=0.25)["accuracy"] == 1.0
    assert metrics(labels, scores)["auc"] == metrics(labels, scores, threshold=0.25)["auc"] == 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_accuracy_but_no_ranking(label):
    result = metrics([label] * 3, [0.2, 0.8, 0.9])
    assert result["accuracy"] == pytest.approx(2 / 3 if label else 1 / 3)
    assert math.isnan(result["ap"]) and math.isnan(result["auc"])
    missing = "real_accuracy" if label else "generated_accuracy"
    assert math.isnan(result[missing])


def test_no_images_is_nan_everywhere():
    result = metrics([], [])
    assert all(math.isnan(result[key]) for key in evaluation.MEASURES)
    assert result["n_real"] == result["n_generated"] == 0


@pytest.mark.parametrize(
    ("labels", "scores", "complaint"),
    [([0, 1], [0.5], "must both be"), ([0, 2], [0.1, 0.2], "0 .real."), ([0, 1], [0.1, math.nan], "NaN")],
)
def test_wrong_input_is_refused(labels, scores, complaint):
    with pytest.raises(ValueError, match=complaint):
        metrics(labels, scores)


def test_mean_is_over_generators_not_images():
    scores = [Score(f"{i}", "large", 1, 0.9) for i in range(98)] + [Score("r", "large", 0, 0.1)]
    scores += [Score("a", "small", 1, 0.1), Score("b", "small", 0, 0.1)]
    mean = Evaluation(scores).mean()
    assert mean["accuracy"] == pytest.approx((1.0 + 0.5) / 2)
    assert (mean["n_real"], mean["n_generated"]) == (2, 99)


def test_mean_leaves_out_generators_without_the_measure():
    scores = [Score("a", "both", 0, 0.1), Score("b", "both", 1, 0.9), Score("c", "one class", 1, 0.2)]
    mean = Evaluation(scores).mean()
    assert mean["auc"] == 1.0
    assert mean["accuracy"] == 0.5


def test_evaluate_command(model, data, tmp_path, capsys):
    out = tmp_path / "results"
    evaluation.evaluate_command([str(data)], str(model), str(out))
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["alpha", "beta", "mean"]
    assert "left out: " in printed and "broken.png" in printed and "1 of 21 images" in printed

    document = json.loads((out / "metrics.json").read_text())
    assert document["generators"]["beta"]["n_generated"] == 5
    assert document["generators"]["beta"]["n_damaged"] == document["mean"]["n_damaged"] == 1
    assert [d["path"].endswith("broken.png") for d in document["damaged"]] == [True]

    scores = rows(out / "scores.csv")
    assert len(scores) == 21 and sum(row["probability"] == "" for row in scores) == 1
    alpha = [row for row in scores if row["generator"] == "alpha"]
    again = metrics([int(r["label"]) for r in alpha], [float(r["probability"]) for r in alpha])
    assert again == {key: document["generators"]["alpha"][key] for key in again}

    table = rows(out / "metrics.csv")
    assert [row["generator"] for row in table] == ["alpha", "beta", "mean"]
    assert float(table[2]["auc"]) == document["mean"]["auc"]
    assert Image.open(out / "metrics.png").width > 500
    assert not list(out.glob("*.partial")) and not list(out.glob(".*"))


def test_one_class_is_null_in_json_and_empty_in_csv(model, data, tmp_path):
    shutil.rmtree(data / "alpha/0_real")
    evaluation.evaluate_command([str(data / "alpha")], str(model), str(tmp_path / "o"))
    assert json.loads((tmp_path / "o/metrics.json").read_text())["mean"]["auc"] is None
    assert rows(tmp_path / "o/metrics.csv")[0]["auc"] == ""


def test_several_sources_are_kept_apart(model, data, tmp_path, capsys):
    sources = [str(data), str(data / "alpha")]
    evaluation.evaluate_command(sources, str(model), str(tmp_path / "o"))
    generators = json.loads((tmp_path / "o/metrics.json").read_text())["generators"]
    assert sorted(generators) == ["alpha/alpha", "data/alpha", "data/beta"]


def test_nothing_readable_is_an_error(model, tmp_path):
    folder = tmp_path / "d/0_real"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        evaluation.evaluate_command([str(tmp_path / "d")], str(model), str(tmp_path / "o"))
