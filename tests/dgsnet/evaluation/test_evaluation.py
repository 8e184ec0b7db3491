"""Metrics against hand-computed and brute-force values, and what `dgsnet evaluate` prints and writes."""

import csv
import json
import math
import pickle
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from dgsnet import cli
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data import distortions
from dgsnet.data.images import read_image
from dgsnet.detection.decisions import Calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation import evaluate as evaluation
from dgsnet.evaluation import metrics as evaluation_metrics
from dgsnet.evaluation import published, robustness
from dgsnet.evaluation import report as evaluation_report
from dgsnet.evaluation.evaluate import find_suites
from dgsnet.evaluation.metrics import _Scores, interval, metrics, reliability, resampled, roc
from dgsnet.evaluation.results import Evaluation, Score
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image

from tests.support.fresh import FORKSERVER

RNG = np.random.default_rng(0)


def make_model(folder, seed=0):
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        seed=seed,
    )
    return save_model(folder, build_model(config, with_text=False), config)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def data(tmp_path):
    """Two generators, five images of each class, and one damaged image in the second."""
    for generator in ("alpha", "beta"):
        for label in ("0_real", "1_fake"):
            for i in range(5):
                picture(tmp_path / "data" / generator / label / f"{i}.png")
    (tmp_path / "data/beta/1_fake/broken.png").write_bytes(b"no picture")
    return tmp_path / "data"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


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


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_against_scikit_learn(ties):
    from sklearn.metrics import auc, average_precision_score, roc_auc_score

    for n in (2, 3, 10, 500):
        labels = np.append(RNG.integers(0, 2, n - 2), [0, 1])
        scores = RNG.random(n).round(1 if ties else 9)
        result = metrics(labels, scores)
        assert result["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert result["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        false, found = roc(labels, scores)
        assert auc(false, found) == pytest.approx(result["auc"], abs=1e-12)
        assert (false[0], found[0], false[-1], found[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "rate", "key"), [(300, 0.05, "tpr_at_5"), (100, 0.01, "tpr_at_1"), (40, 0.01, "tpr_at_1")]
)
def test_tpr_is_the_best_of_all_thresholds_within_the_rate(ties, n, rate, key):
    labels = np.arange(2 * n) % 2
    scores = (0.4 * RNG.random(2 * n) + 0.3 * labels).round(2 if ties else 9)
    allowed = [
        np.mean(scores[labels == 1] > threshold)
        for threshold in [-1, *scores]
        if np.mean(scores[labels == 0] > threshold) <= rate
    ]
    assert metrics(labels, scores)[key] == pytest.approx(max(allowed))


def test_tpr_where_every_threshold_calls_reals_generated():
    assert metrics([0, 1, 1], [0.9, 0.9, 0.2])["tpr_at_1"] == 0
    assert metrics([0, 1, 1], [0.9, 0.95, 0.2])["tpr_at_5"] == 0.5


def test_ece_by_hand():
    # Bins of 1/15: two images in the last, one in the first.
    assert metrics([1, 0, 0], [0.95, 0.97, 0.01])["ece"] == pytest.approx((abs(0.95 + 0.97 - 1) + 0.01) / 3)
    assert metrics([1, 0], [1.0, 0.0])["ece"] == 0
    bins = reliability([1, 0, 0], [0.95, 0.97, 0.01])
    assert bins["count"].tolist() == [1, *[0] * 13, 2]
    assert bins["generated"][14] == 0.5 and bins["probability"][14] == pytest.approx(0.96)


def test_ece_does_not_merge_neighbouring_bins():
    """Of fifteen: 0.05 lies in the first, 0.08 in the second."""
    assert metrics([0, 1], [0.05, 0.08])["ece"] == pytest.approx((0.05 + 0.92) / 2)


def test_ece_vanishes_for_probabilities_that_are_true():
    scores = RNG.random(200_000)
    labels = RNG.random(200_000) < scores
    assert metrics(labels, scores)["ece"] < 0.005
    assert metrics(labels, np.sqrt(scores))["ece"] > 0.1


def test_calibrated_threshold_adds_its_accuracies():
    labels, scores = RNG.integers(0, 2, 100), RNG.random(100)
    both = metrics(labels, scores, 0.5, 0.8)
    other = metrics(labels, scores, 0.8)
    for key in ("accuracy", "real_accuracy", "generated_accuracy"):
        assert both[f"calibrated_{key}"] == other[key]
    assert {k: v for k, v in both.items() if not k.startswith("calibrated")} == metrics(labels, scores)


@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_has_the_metrics_of_its_images(ties):
    labels = np.append(RNG.integers(0, 2, 58), [0, 1])
    scores = RNG.random(60).round(1 if ties else 9)
    sorted_scores = _Scores(labels, scores)
    counts = [
        RNG.multinomial(len(g), np.full(len(g), 1 / len(g)), size=5).astype(float)
        for g in (sorted_scores.generated, sorted_scores.real)
    ]
    values = sorted_scores.measures(*counts, 0.5, 0.7)
    for b in range(5):
        drawn = [
            np.repeat(g, c[b].astype(int))
            for g, c in zip((sorted_scores.generated, sorted_scores.real), counts)
        ]
        expected = metrics(np.repeat([1, 0], [len(d) for d in drawn]), np.concatenate(drawn), 0.5, 0.7)
        assert {key: v[b] for key, v in values.items()} == pytest.approx(
            {k: expected[k] for k in values}, abs=1e-12
        )


def test_resampling_is_seeded_and_within_classes(monkeypatch):
    labels, scores = np.arange(50) % 5 == 0, RNG.random(50)
    first, again, other = (resampled(labels, scores, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert (first["auc"] != other["auc"]).any() and len(first["auc"]) == 1000
    # The share of generated images is not left to chance.
    assert set(resampled(labels, np.ones(50), seed=0)["accuracy"]) == {0.2}
    from dgsnet.evaluation import metrics as module

    monkeypatch.setattr(module, "CHUNK", 500)
    assert len(resampled(labels, scores, resamples=37)["auc"]) == 37


def test_intervals_are_those_of_theory_and_of_scipy():
    from scipy.stats import bootstrap
    from sklearn.metrics import roc_auc_score

    labels = np.arange(800) % 2
    scores = np.clip(RNG.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    values, result = resampled(labels, scores, seed=0), metrics(labels, scores)
    low, high = interval(values["real_accuracy"])
    p = result["real_accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 400), rel=0.12)
    assert low < p < high

    def auc(generated, real):
        return roc_auc_score(
            np.repeat([1, 0], [len(generated), len(real)]), np.concatenate([generated, real])
        )

    theirs = bootstrap(
        (scores[labels == 1], scores[labels == 0]),
        auc,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert interval(values["auc"]) == pytest.approx(tuple(theirs), abs=0.006)


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
    assert all(math.isnan(result[key]) for key in evaluation_metrics.MEASURES)
    assert result["n_real"] == result["n_generated"] == 0
    assert all(math.isnan(bound) for bound in interval(resampled([], [])["auc"]))


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


def run(model, data, out, **options):
    evaluation.evaluate_command([str(d) for d in np.atleast_1d(data)], str(model), str(out), **options)
    return json.loads((out / "metrics.json").read_text())


def test_the_scores_are_those_of_predict(model, data, tmp_path):
    run(model, data, tmp_path / "o", robustness=["jpeg:60", "blur:1+crop:0.9"])
    detector = Detector.load(model, device="cpu")
    scores = rows(tmp_path / "o/scores.csv")
    assert [row["distortion"] for row in scores] == [""] * 21 + ["jpeg:60"] * 21 + ["blur:1+crop:0.9"] * 21
    for distortion in (lambda image: image, *robustness.parse(["jpeg:60", "blur:1+crop:0.9"])):
        name = getattr(distortion, "name", "")
        chosen = [row for row in scores if row["distortion"] == name and not row["error"]]
        assert len(chosen) == 20
        expected = detector.predict([distortion(read_image(row["path"])) for row in chosen])
        np.testing.assert_allclose([float(row["probability"]) for row in chosen], expected, atol=1e-6)


def test_robustness_is_reported_per_distortion(model, data, tmp_path, capsys):
    document = run(model, data, tmp_path / "o", robustness=["jpeg:20,80"])
    assert list(document["robustness"]) == ["jpeg:20", "jpeg:80"]
    assert set(document["robustness"]["jpeg:20"]["generators"]) == {"alpha", "beta"}
    assert document["robustness"]["jpeg:20"]["mean"]["n_damaged"] == 1
    assert len(document["damaged"]) == 1  # not once more for every distortion
    printed = capsys.readouterr().out
    lines = printed.split("distortion ")[1].splitlines()[2:5]
    assert [line.split()[0] for line in lines] == ["none", "jpeg:20", "jpeg:80"]
    table = rows(tmp_path / "o/metrics.csv")
    assert [(r["generator"], r["distortion"]) for r in table[3:6]] == [
        ("alpha", "jpeg:20"),
        ("beta", "jpeg:20"),
        ("mean", "jpeg:20"),
    ]
    assert "| jpeg:80 |" in (tmp_path / "o/metrics.md").read_text()


def test_an_image_that_cannot_be_distorted_is_listed(model, tmp_path, monkeypatch):
    for i in range(4):
        picture(tmp_path / f"d/{i % 2}_{'real' if i % 2 == 0 else 'fake'}/{i}.png")
    monkeypatch.setattr(distortions, "MAX_PIXELS", 3000)
    document = run(model, tmp_path / "d", tmp_path / "o", robustness=["resize:2"])
    assert [d["distortion"] for d in document["damaged"]] == ["resize:2"] * 4
    assert all("0.png: resize:2 makes it" in d["error"] for d in document["damaged"][:1])
    assert document["mean"]["n_damaged"] == 0 and document["robustness"]["resize:2"]["mean"]["n_damaged"] == 4


def test_intervals_hold_the_value_and_are_reproducible(model, data, tmp_path):
    first, again = (run(model, data, tmp_path / name) for name in ("a", "b"))
    assert first["generators"] == again["generators"] and first["confidence"] == 0.95
    for row in (first["mean"], *first["generators"].values()):
        for key, (low, high) in row["intervals"].items():
            assert (low is None and key == "ece") or low <= row[key] <= high, key
    # The interval of a generator depends on its scores and its name alone.
    shutil.rmtree(data / "beta")
    assert run(model, data, tmp_path / "c")["generators"]["alpha"] == first["generators"]["alpha"]


def test_the_mean_is_surer_than_its_parts():
    scores = [
        Score(f"{g}{i}", g, i % 2, float(np.clip(RNG.normal(0.4 + 0.2 * (i % 2), 0.2), 0, 1)))
        for g in "abcdefghi"
        for i in range(100)
    ]
    results = Evaluation(scores).results
    widths = [np.diff(r.interval("auc"))[0] for r in results]
    assert widths[-1] == pytest.approx(np.mean(widths[:-1]) / 3, rel=0.2)
    assert results[-1].is_mean and not any(r.is_mean for r in results[:-1])


def test_a_calibrated_model_is_measured_at_its_threshold_too(model, data, tmp_path, capsys):
    calibrated = shutil.copytree(model, tmp_path / "m")
    plain = run(calibrated, data, tmp_path / "o")
    assert plain["calibrated_threshold"] is None and "calibrated_accuracy" not in plain["mean"]
    journal = (tmp_path / "o/scores.jsonl").read_bytes()
    threshold = sorted(float(r["probability"]) for r in rows(tmp_path / "o/scores.csv") if r["probability"])[
        7
    ]
    values = {"fpr": 0.1, "fpr_upper": 0.1, "fpr_observed": 0.05, "miss_rate": None, "miss_upper": None}
    values |= {"unsure_reals": 0.0, "unsure_generated": None, "tpr_observed": None, "confidence": 0.95}
    calibration = Calibration(
        threshold=threshold, low=threshold, temperature=1.0, n_reals=99, n_generated=0, **values
    )
    save_calibration(calibrated, calibration)
    capsys.readouterr()
    document = run(calibrated, data, tmp_path / "o")
    assert document["calibrated_threshold"] == threshold
    again = rows(tmp_path / "o/scores.csv")
    beta = [r for r in again if r["generator"] == "beta" and r["probability"]]
    right = [(float(r["probability"]) > threshold) == (r["label"] == "1") for r in beta]
    assert document["generators"]["beta"]["calibrated_accuracy"] == pytest.approx(np.mean(right))
    assert {k: v for k, v in document["mean"].items() if k in plain["mean"] and k != "intervals"} == {
        k: v for k, v in plain["mean"].items() if k != "intervals"
    }
    found = document["false_positives"]
    wrong = sum(r["label"] == "0" and float(r["probability"]) > threshold for r in beta)
    assert (found["threshold"], found["promised"]) == (threshold, 0.1)
    assert found["sources"]["beta"]["wrong"] == wrong and found["sources"]["beta"]["exceeds"]
    printed = capsys.readouterr().out
    assert "calibrated" in printed.splitlines()[0] and "\nreal images of" in printed
    assert "\nwarning: The calibrated rate of 10.0% false positives does not hold" in printed
    # Calibrating does not score anew.
    assert (tmp_path / "o/scores.jsonl").read_bytes() == journal


def test_three_layouts_at_once(model, tmp_path, capsys):
    for name in ("dalle/0_real/a.png", "dalle/1_fake/b.png", "ldm_100/0_real/c.png", "ldm_100/1_fake/d.png"):
        picture(tmp_path / "UniversalFakeDetect" / name)
    for name in (
        "ADM/val/nature/a.png",
        "ADM/val/ai/b.png",
        "ADM/train/ai/left_out.png",
        "BigGAN/val/nature/c.png",
        "BigGAN/val/ai/d.png",
    ):
        picture(tmp_path / "GenImage" / name)
    for name in ("DALLE-3/0_real/a.png", "DALLE-3/1_fake/b.png", "MyOwn/0_real/c.png", "MyOwn/1_fake/d.png"):
        picture(tmp_path / "aigi/test" / name)
    sources = [tmp_path / "UniversalFakeDetect", tmp_path / "GenImage", f"AIGIBench={tmp_path}/aigi/test"]
    with pytest.raises(UserError, match="GenImage: holds the splits train, val; choose one"):
        run(model, sources, tmp_path / "o")
    document = run(model, sources, tmp_path / "o", split="val")
    assert list(document["suites"]) == ["UniversalFakeDetect", "GenImage", "AIGIBench"]
    assert document["mean"]["n_real"] == 6
    generators = document["generators"]
    ours = [generators["AIGIBench/DALLE-3"], generators["AIGIBench/MyOwn"]]
    assert document["suites"]["AIGIBench"]["accuracy"] == pytest.approx(
        np.mean([g["accuracy"] for g in ours])
    )
    assert document["mean"]["auc"] == pytest.approx(np.mean([g["auc"] for g in generators.values()]))
    # Only what was measured is compared.
    percent = document["published"]["AIGIBench"]["percent"]
    assert percent[0][:2] == ["this model", "1 of 25"] and percent[0][2] == f"{100 * ours[0]['accuracy']:.1f}"
    assert percent[1] == ["DGS-Net, published", "the same 1", "41.5", "40.8"]
    assert ["SAFE, published", "all 25", "78.1", "83.6"] in percent
    assert "Midjourney" in document["published"]["AIGIBench"]["missing"]
    assert document["published"]["GenImage"]["percent"][1][2] == "91.0"  # ADM 97.5 and BigGAN 84.6
    printed = capsys.readouterr().out
    assert "mean of GenImage" in printed and "the same 1" in printed
    assert "## AIGIBench: published results" in (tmp_path / "o/metrics.md").read_text()


def test_the_names_of_suites(model, data, tmp_path):
    (tmp_path / "AIGIBench").mkdir()
    shutil.copytree(data, tmp_path / "AIGIBench/test")
    (tmp_path / "list.csv").write_text(f"path,label\n{data}/alpha/0_real/0.png,0\n")
    shutil.copytree(data, tmp_path / "a=b")
    found = find_suites(
        [str(tmp_path / "AIGIBench/test"), str(tmp_path / "list.csv"), str(tmp_path / "a=b"), f"x={data}"]
    )
    assert list(found) == ["AIGIBench", "list", "a=b", "x"]
    with pytest.raises(UserError, match=r"two suites are called 'data'.*NAME="):
        find_suites([str(data), str(data)])
    with pytest.raises(UserError, match="no such file"):
        find_suites([f"x={tmp_path}/nowhere"])


def test_published_figures_agree_with_their_published_means():
    for suite in published.SUITES:
        means = np.mean(list(suite.generators.values()), axis=0)
        assert means[:2] == pytest.approx(suite.methods["DGS-Net"], abs=0.051), suite.name
    assert [len(suite.generators) for suite in published.SUITES] == [8, 16, 25]
    assert published.find("aigibench").generator("dalle3")[0] == 41.5
    assert published.find("AIGCDetectBenchmark").name == "GenImage"
    assert published.find("mine") is None
    assert published.compare("AIGIBench", {"mine": {"accuracy": 1.0, "ap": 1.0}}) is None


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
    assert len(keys) == len(set(keys)) == 21 * 6


def test_scores_of_other_settings_are_refused(model, data, tmp_path, capsys):
    run(model, data, tmp_path / "o")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"scores.jsonl holds scores that were made with another model: give"):
        run(other, data, tmp_path / "o")
    with pytest.raises(UserError, match="made with another number of views"):
        run(model, data, tmp_path / "o", views=2)
    with pytest.raises(UserError, match="made with other images, or other names of suites"):
        run(model, [f"renamed={data}"], tmp_path / "o")
    paths = sorted((data / "alpha").rglob("*.png"))
    for labels in ((0, 1), (1, 0)):
        lines = [f"{path},{labels[i % 2]}\n" for i, path in enumerate(paths)]
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
        if labels == (0, 1):
            run(model, tmp_path / "list.csv", tmp_path / "listed")
    with pytest.raises(UserError, match="made with other images"):
        run(model, tmp_path / "list.csv", tmp_path / "listed")
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
    plain = run(model, data, tmp_path / "o")
    seen = []
    stream = Detector.stream_logits

    def counting(self, images, **options):
        seen.append(len(images))
        return stream(self, images, **options)

    monkeypatch.setattr(Detector, "stream_logits", counting)
    moved = run(model, data, tmp_path / "o", threshold=0.45)
    assert sum(seen) == 0 and moved["mean"]["auc"] == plain["mean"]["auc"]
    run(model, data, tmp_path / "o", robustness=["jpeg:50"])
    assert sum(seen) == 21


@pytest.mark.parametrize(
    "content", [b"path,probability\na.png,0.5\n", b'{"path": "a.png"}\n', b"no end of line"]
)
def test_a_file_that_is_no_journal_is_left_alone(model, data, tmp_path, content):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/scores.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="not the journal of an evaluation"):
        run(model, data, tmp_path / "o")
    assert (tmp_path / "o/scores.jsonl").read_bytes() == content


def test_rows_from_where_one_is_of_another_image_are_made_anew(model, data, tmp_path):
    first = run(model, data, tmp_path / "o")
    journal = tmp_path / "o/scores.jsonl"
    whole = journal.read_text()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"path": "elsewhere.png", "logit": 99.0}) + "\n"
    journal.write_text("".join(lines))
    assert run(model, data, tmp_path / "o") == first and journal.read_text() == whole


@pytest.mark.parametrize("part", [0, 40])
def test_a_journal_killed_within_its_first_line_begins_anew(model, data, tmp_path, part):
    first = run(model, data, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/scores.jsonl").write_bytes((tmp_path / "a/scores.jsonl").read_bytes()[:part])
    assert run(model, data, tmp_path / "b") == first


def test_the_page_is_complete_and_self_contained(model, data, tmp_path):
    (data / "alpha").rename(data / "<b>DALLE-3 & $x^2$")
    sources = [f"AIGIBench={data}", str(data)]
    (data / "DALLE-3").mkdir()
    for label in ("0_real", "1_fake"):
        picture(data / "DALLE-3" / label / "0.png")
    run(model, sources, tmp_path / "o", robustness=["jpeg:50"], threshold=0.48)
    text = (tmp_path / "o/report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page refers to another file"
    assert "{{" not in text and "{%" not in text
    assert "<b>DALLE" not in text and "&lt;b&gt;DALLE-3 &amp; $x^2$" in text
    # Two suites with bars and curves, distortions, distribution of scores.
    assert text.count("<svg ") == 6
    for expected in (
        "41.5",
        "jpeg:50",
        "broken.png: ",
        "at the threshold 0.48",
        'src="data:image/jpeg;base64,',
    ):
        assert expected in text

    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open_tags = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []


def test_the_verdict_follows_the_numbers():
    def scores(generator, real, generated, distortion=""):
        return [
            Score(f"{generator}{label}{i}", generator, label, p, "", "", distortion)
            for label, values in ((0, real), (1, generated))
            for i, p in enumerate(values)
        ]

    good = scores("good", [0.1] * 20, [0.9] * 20)
    moved = scores("moved", [0.6] * 20, [0.9] * 20)
    blind = scores("blind", [0.3, 0.7] * 10, [0.3, 0.7] * 10)
    sentences = " ".join(evaluation_report.verdict(Evaluation(good + moved + blind)))
    assert "Not told apart (AUC below 75.0): blind (AUC 50.0)." in sentences
    assert "the threshold 0.5 is wrong: moved (AUC 100.0)." in sentences
    assert "distortion" not in sentences and "could not be read" not in sentences

    swept = good + scores("good", [0.1] * 20, [0.9] * 20, "jpeg:90") + scores("good", [0.5], [0.5], "blur:2")
    sentences = " ".join(evaluation_report.verdict(Evaluation(swept)))
    assert "blur:2 costs most: \N{MINUS SIGN}50.0 points of AUC" in sentences
    assert "Not told apart" not in sentences and "is wrong" not in sentences


def test_an_evaluation_crosses_processes():
    result = Evaluation([Score("a", "x", 0, 0.1), Score("b", "x", 1, 0.9)])
    interval_here = result.mean_of().interval("auc")
    assert pickle.loads(pickle.dumps(result)).mean_of().interval("auc") == interval_here
