"""Thresholds keep the rates they promise, temperatures are the right ones, and a calibrated model decides."""

import csv
import io
import json
import math
import shutil
import tarfile

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.images import file_hash
from dgsnet.detection.decisions import (
    Calibration,
    calibrate,
    decide,
    fit_temperature,
    load_calibration,
    save_calibration,
    summary,
)
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image
from scipy import stats

REPEATS = 600


def plausible(count, repeats, expected):
    return stats.binomtest(count, repeats, expected).pvalue > 1e-4


@pytest.mark.parametrize(("n", "fpr", "confidence"), [(299, 0.01, 0.95), (500, 0.05, 0.95), (90, 0.1, 0.8)])
def test_the_asked_rate_is_exceeded_as_rarely_as_promised(n, fpr, confidence):
    # Logits of the standard logistic distribution have uniform probabilities: the true rate above t is 1 - t.
    rng = np.random.default_rng(0)
    drawn = [calibrate(rng.logistic(size=n), fpr=fpr, confidence=confidence) for _ in range(REPEATS)]
    assert all(c.fpr_upper <= fpr and c.fpr_observed <= fpr for c in drawn)
    exceeded = sum(1 - c.threshold > fpr for c in drawn)
    above = round(drawn[0].fpr_observed * n)
    expected = stats.beta.sf(fpr, above + 1, n - above)  # exact for an order statistic
    assert expected <= 1 - confidence
    assert plausible(exceeded, REPEATS, expected)
    # One real image more above it, and the promise would not hold.
    assert stats.beta.sf(fpr, above + 2, n - above - 1) > 1 - confidence
    # The lower end of the band, without generated images: as rarely is the true rate below the one asked for.
    assert sum(1 - c.low < fpr for c in drawn) <= stats.binom.ppf(0.9999, REPEATS, 1 - confidence)


def test_the_rate_holds_for_all_sources_at_once_as_often_as_promised():
    """Also where all sources are alike, and any of them may turn out to be the worst."""
    rng = np.random.default_rng(6)
    for shifts in ((0, 0, 0), (-3, 0, 1)):
        exceeded = 0
        for _ in range(REPEATS):
            sources = {
                f"{i}": rng.logistic(shift, size=n)
                for i, (shift, n) in enumerate(zip(shifts, (90, 200, 120)))
            }
            c = calibrate(sources, fpr=0.05)
            assert c.threshold == max(s.threshold for s in c.sources)
            assert c.threshold == max(calibrate(logits, fpr=0.05).threshold for logits in sources.values())
            rates = stats.logistic.sf(math.log(c.threshold / (1 - c.threshold)), loc=shifts)
            exceeded += max(rates) > 0.05
        assert exceeded <= stats.binom.ppf(0.9999, REPEATS, 0.05)


def test_sources_are_reported_each():
    rng = np.random.default_rng(7)
    quiet, loud, fakes = rng.normal(-3, 1, 400), rng.normal(0, 1, 300), rng.normal(3, 1, 300)
    c = calibrate({"quiet": quiet, "loud": loud}, fakes, fpr=0.05)
    assert [s.name for s in c.sources] == ["quiet", "loud"] and [s.n for s in c.sources] == [400, 300]
    pooled = calibrate(np.concatenate([quiet, loud]), fakes, fpr=0.05)
    assert pooled.temperature == c.temperature and pooled.threshold < c.threshold and pooled.sources == ()
    scores = {
        name: np.round(1 / (1 + np.exp(-x / c.temperature)), 6)
        for name, x in (("quiet", quiet), ("loud", loud))
    }
    for source in c.sources:
        assert source.fpr_observed == (scores[source.name] > c.threshold).mean()
        assert source.fpr_observed < source.fpr_upper <= 0.05
    assert c.threshold == c.sources[1].threshold > c.sources[0].threshold
    assert c.sources[0].fpr_upper == pytest.approx(stats.beta.ppf(0.95, 1, 400))  # nothing above
    assert c.fpr_upper == c.sources[1].fpr_upper
    # Pooled, the loud source would have had more than was asked for.
    assert (scores["loud"] > pooled.threshold).mean() > 0.08
    assert Calibration.from_json(c.to_json()) == c
    older = json.loads(pooled.to_json())
    del older["sources"]  # as calibrations were before sources
    assert Calibration.from_json(json.dumps(older)) == pooled
    said = summary(c)
    assert said.index("loud: at most") < said.index("quiet: at most 0.75% (0.00% of 400)")
    with pytest.raises(UserError, match=r"^20 real images of loud are too few"):
        calibrate({"quiet": quiet, "loud": loud[:20]}, fpr=0.05)


def test_as_rarely_are_generated_images_called_real():
    rng = np.random.default_rng(1)
    # The count allowed is the largest whose Clopper-Pearson bound fits.
    k = next(k for k in range(200) if stats.beta.ppf(0.95, k + 2, 200 - k - 1) > 0.1)
    missed = 0
    for _ in range(REPEATS):
        # One high real image puts the threshold above the band.
        reals = np.append(rng.logistic(-5, size=60), 4.0)
        c = calibrate(reals, rng.logistic(size=200), fpr=0.05, miss_rate=0.1)
        assert c.miss_upper == pytest.approx(stats.beta.ppf(0.95, k + 1, 200 - k)) and c.miss_upper <= 0.1
        assert 0 < c.low < c.threshold
        missed += stats.logistic.cdf(c.temperature * math.log(c.low / (1 - c.low))) > 0.1
    assert plausible(missed, REPEATS, stats.beta.sf(0.1, k + 1, 200 - k))


def test_the_band_lies_between_the_two_errors():
    rng = np.random.default_rng(2)
    reals, generated = rng.normal(-1, 1, 2000), rng.normal(1, 1, 2000)
    c = calibrate(reals, generated, fpr=0.02, miss_rate=0.05)
    calls = [decide(1 / (1 + np.exp(-x / c.temperature)), c) for x in (reals, generated)]
    assert calls[0].count("generated") / 2000 == c.fpr_observed <= 0.02
    assert calls[1].count("real") / 2000 <= 0.05
    assert calls[0].count("unsure") / 2000 == c.unsure_reals > 0.1
    assert calls[1].count("unsure") / 2000 == c.unsure_generated > 0.1
    assert calls[1].count("generated") / 2000 == c.tpr_observed
    # Classes far apart leave nothing to be unsure of.
    apart = calibrate(reals - 20, generated + 20, fpr=0.02, miss_rate=0.05)
    assert apart.low == apart.threshold and apart.unsure_reals == 0


def test_ties_never_raise_the_rate():
    scores = np.repeat([0.0, 1.0, 2.0], 200)
    c = calibrate(scores, fpr=0.05)
    assert c.fpr_observed == 0 and c.threshold == round(1 / (1 + math.exp(-2)), 6)
    saturated = calibrate(np.full(100, 60.0), fpr=0.05)
    assert saturated.threshold == 1 and decide([1.0], saturated) == ["real"]


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 59), (0.01, 299), (0.001, 2995)])
def test_too_few_images_are_told_with_how_many_are_needed(fpr, needed):
    scores = np.random.default_rng(0).normal(size=needed)
    with pytest.raises(UserError, match=f"^{needed - 1} real .* at least {needed} are needed"):
        calibrate(scores[1:], fpr=fpr)
    assert calibrate(scores, fpr=fpr).fpr_observed == 0
    with pytest.raises(UserError, match=f"^3 generated .* at least {needed} are needed.*miss_rate"):
        calibrate(scores, [5.0, 6.0, 7.0], fpr=fpr)
    with pytest.raises(UserError, match="0 real images are too few"):
        calibrate([], fpr=fpr)


def test_impossible_requests_are_one_line():
    scores = np.random.default_rng(0).normal(size=500)
    for wrong in ({"fpr": 0}, {"fpr": 1.5}, {"fpr": math.nan}, {"confidence": 1}):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            calibrate(scores, **wrong)
    with pytest.raises(UserError, match="swapped"):
        calibrate(scores + 1, scores)


def test_the_temperature_is_the_one_the_labels_were_drawn_with():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 4, 40000)
    generated = rng.random(40000) < 1 / (1 + np.exp(-logits / 2.5))
    assert fit_temperature(logits[~generated], logits[generated]) == pytest.approx(2.5, rel=0.04)
    # Fewer images of one class weigh as much as the others.
    assert fit_temperature(logits[~generated], logits[generated][::10]) == pytest.approx(2.5, rel=0.1)


def test_the_temperature_minimises_the_log_loss():
    rng = np.random.default_rng(4)
    reals, generated = rng.normal(-3, 5, 300), rng.normal(2, 5, 200)

    def loss(t):
        smooth = [1 / 302, 1 / 202]
        return sum(
            np.mean((1 - e) * np.logaddexp(0, s * z / t) + e * np.logaddexp(0, -s * z / t))
            for z, s, e in ((reals, 1, smooth[0]), (generated, -1, smooth[1]))
        )

    fitted = fit_temperature(reals, generated)
    grid = np.exp(np.linspace(-3, 4, 2000))
    assert loss(fitted) <= min(map(loss, grid)) + 1e-9
    # Separated classes do not make the scores certain.
    assert 0.05 < fit_temperature(np.full(50, -1.0), np.full(50, 1.0)) < 1


def test_decide():
    c = calibrate(np.random.default_rng(0).normal(-2, 1, 400), fpr=0.05)
    low, high = c.low, c.high
    assert 0 < low < high < 1
    assert decide([0, low, low + 2e-6, high, high + 2e-6, 1, math.nan], c) == [
        "real",
        "real",
        "unsure",
        "unsure",
        "generated",
        "generated",
        "",
    ]
    # What is written with six decimals decides as what was computed.
    assert decide([high + 4e-7], c) == decide([high], c)
    assert decide(np.float32([0.5, 0.500001, np.nan])) == ["real", "generated", ""]
    assert decide(0.7) == ["generated"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Smooth images and the same kind with a checkerboard, and a model whose head tells them apart."""
    root = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    for kind, strength in (("real", 0), ("fake", 14)):
        (root / kind).mkdir()
        for i in range(110):
            coarse = rng.integers(40, 216, (6, 6, 3), dtype=np.uint8)
            picture = np.asarray(Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)).astype(
                int
            )
            picture = picture + rng.normal(0, 6, picture.shape)
            picture[::2, ::2] += strength
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / kind / f"{i:03}.png")
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=0),
        preprocess=PreprocessConfig(mode="patches", image_size=32, patch_size=8, num_patches=16),
    )
    model = build_model(config, with_text=False).eval()
    detector = Detector(model, config)
    from dgsnet.data.images import read_image
    from sklearn.linear_model import LogisticRegression

    files = [*sorted((root / "real").iterdir())[:40], *sorted((root / "fake").iterdir())[:40]]
    with torch.no_grad():
        features = torch.cat(
            [model.student_features(detector.preprocess(read_image(f))[None]) for f in files]
        )
        head = LogisticRegression(C=100, max_iter=1000).fit(features.numpy(), [0] * 40 + [1] * 40)
        model.head.image_head.weight.copy_(torch.from_numpy(head.coef_))
        model.head.image_head.bias.copy_(torch.from_numpy(head.intercept_) + 5)  # a threshold that is wrong
    save_model(root / "run" / "best", model, config)
    return root


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_from_images_to_decisions(folder, tmp_path, capsys):
    (folder / "real" / "broken.png").write_bytes(b"no picture")
    (folder / "real" / "twin.png").write_bytes((folder / "real" / "000.png").read_bytes())
    command = ["calibrate", "--model", str(folder / "run"), "--reals", str(folder / "real"), "--workers", "0"]
    main([*command, "--generated", str(folder / "fake"), "--fpr", "0.05", "--views", "2"])
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "above" in printed and "temperature" in printed

    detector = Detector.load(folder / "run", device="cpu")
    c = detector.calibration
    assert (c.n_reals, c.n_generated, c.views, detector.views) == (110, 110, 2, 2)
    assert c.fpr_upper <= 0.05 and c.tpr_observed > 0.5

    (folder / "real" / "broken.png").unlink()
    reals = detector.predict(sorted((folder / "real").iterdir()), workers=0)
    fakes = detector.predict(sorted((folder / "fake").iterdir()), workers=0)
    calls = detector.decide(reals)
    assert calls.count("generated") == round(c.fpr_observed * 110) <= 1
    assert detector.decide(fakes).count("generated") == round(c.tpr_observed * 110)
    # At 0.5 the same model calls far more real images generated.
    plain = Detector.load(folder / "run", device="cpu", calibrated=False)
    assert plain.decide(plain.predict(sorted((folder / "real").iterdir()), workers=0)).count("generated") > 10

    with pytest.raises(UserError, match=r"calibrated for views=2.*views=3"):
        Detector.load(folder / "run", device="cpu", views=3)
    # Calibrating again starts from the model, not from the calibration.
    main([*command, "--generated", str(folder / "fake"), "--fpr", "0.05", "--views", "2", "--replace"])
    assert load_calibration(folder / "run") == c


def test_reals_alone_suffice_for_a_threshold(folder, capsys):
    main(
        [
            "calibrate",
            "--model",
            str(folder / "run"),
            "--reals",
            str(folder / "real"),
            "--fpr",
            "0.1",
            "--workers",
            "0",
            "--replace",
        ]
    )
    printed = capsys.readouterr().out
    assert "not calibrated" in printed
    c = load_calibration(folder / "run" / "best")
    assert c.temperature == 1 and c.n_generated == 0 and c.miss_rate is None
    assert c.low <= c.threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fpr", "0.01"], "are too few for fpr=0.01 with 95% confidence: at least 299"),
        (["--reals", "nowhere"], "nowhere: no such file or folder"),
        (["--views", "0"], "views is 0"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(folder, capsys, options, message):
    command = ["calibrate", "--model", str(folder / "run"), "--reals", str(folder / "real"), "--fpr", "0.1"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--replace", *options])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dgsnet:")]
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-10], "damaged"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"low"', '"lower"'), "field low"),
        (lambda text: text.replace('"sources": []', '"sources": [{"name": "a"}]'), "sources are not"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "views"}), "field views"),
        (lambda text: json.dumps(json.loads(text) | {"temperature": 0}), "temperature=0"),
        (lambda text: json.dumps(json.loads(text) | {"low": 0.99, "threshold": 0.5}), "threshold=0.5"),
        (lambda text: json.dumps(json.loads(text) | {"threshold": "high"}), "'high' is no number"),
        (lambda text: json.dumps(json.loads(text) | {"threshold": None}), "None is no number"),
    ],
)
def test_a_damaged_calibration_is_refused(folder, tmp_path, change, message):
    result = calibrate(np.random.default_rng(0).normal(size=400), fpr=0.05)
    path = save_calibration(folder / "run", result)
    assert load_calibration(folder / "run") == result == Calibration.from_json(result.to_json())
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as error:
        Detector.load(folder / "run", device="cpu")
    assert "\n" not in str(error.value) and "calibrate with --replace" in str(error.value)


def test_a_model_saved_again_is_not_calibrated(folder, tmp_path):
    detector = Detector.load(folder / "run", device="cpu", calibrated=False)
    save_model(tmp_path / "m", detector.model, detector.config)
    save_calibration(tmp_path / "m", calibrate(np.random.default_rng(0).normal(size=400), fpr=0.05))
    assert Detector.load(tmp_path / "m", device="cpu").calibration
    save_model(tmp_path / "m", detector.model, detector.config)
    assert Detector.load(tmp_path / "m", device="cpu").calibration is None


def test_as_many_generated_images_are_called_real_as_the_bound_allows():
    rng = np.random.default_rng(5)
    reals, generated = rng.normal(-1, 1, 500), rng.normal(1, 1, 500)
    c = calibrate(reals, generated, fpr=0.05)
    assert c.low < c.threshold
    scores = np.round(1 / (1 + np.exp(-generated / c.temperature)), 6)
    assert decide(scores, c).count("real") == stats.binom.ppf(0.05, 500, 0.05) - 1


def labelled(folder, root, splits=("",)):
    """The same images as a labelled dataset."""
    for split in splits:
        for kind, name in (("real", "0_real"), ("fake", "1_fake")):
            shutil.copytree(folder / kind, root / split / "mine" / name)
    return root


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
def test_of_a_labelled_dataset_each_option_takes_its_class(folder, tmp_path, capsys, splits):
    root = labelled(folder, tmp_path / "root", splits)
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "best" / "calibration.json").unlink(missing_ok=True)
    command = ["calibrate", "--model", str(run), "--fpr", "0.1", "--workers", "0"]
    main([*command, "--reals", str(root), "--generated", str(root)])
    found = load_calibration(run)
    said = capsys.readouterr().out
    main([*command, "--replace", "--reals", str(folder / "real"), "--generated", str(folder / "fake")])
    assert load_calibration(run) == found
    count = len(list((folder / "real").iterdir())) * len(splits)
    assert f"its {count} real images are taken, its {110 * len(splits)} generated ones are not" in said

    listed, shard = str(tmp_path / "list.csv"), str(tmp_path / "shard.tar")
    with open(listed, "w") as file, tarfile.open(shard, "w") as tar:
        file.write("path,label\n")
        for label, kind in enumerate(("real", "fake")):
            for path in sorted((folder / kind).iterdir()):
                file.write(f"{path},{label}\n")
                tar.add(path, f"{kind}{path.name}")
                text = tarfile.TarInfo(f"{kind}{path.stem}.cls")
                text.size = 1
                tar.addfile(text, io.BytesIO(str(label).encode()))
    for source in (listed, shard):
        main([*command, "--replace", "--reals", source, "--generated", source])
        assert load_calibration(run) == found


def test_every_reals_option_is_a_source(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "best" / "calibration.json").unlink(missing_ok=True)
    files = [str(path) for path in sorted((folder / "real").iterdir())]
    command = ["calibrate", "--model", str(run), "--fpr", "0.1", "--workers", "0", "--reals"]
    main([*command, *files[:50], "--reals", *files[50:]])
    first, second = load_calibration(run).sources
    assert (first.n, second.n) == (50, len(files) - 50)
    assert first.name == " ".join(files[:50]) and f"{second.name}: at most" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, files[0], "--reals", files[0], "--replace"])
    assert "--reals names a source twice" in capsys.readouterr().err


def test_options_given_twice_add_up(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "best" / "calibration.json").unlink(missing_ok=True)
    files = [str(path) for path in sorted((folder / "fake").iterdir())]
    command = [
        "calibrate",
        "--model",
        str(run),
        "--fpr",
        "0.1",
        "--workers",
        "0",
        "--reals",
        str(folder / "real"),
    ]
    main([*command, "--generated", *files[:50], "--generated", *files[50:]])
    assert load_calibration(run).n_generated == len(files)


def test_a_calibration_is_not_replaced_unasked(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    save_calibration(run, calibrate(np.random.default_rng(0).normal(size=400), fpr=0.05))
    before = (run / "best" / "calibration.json").read_bytes()
    command = ["calibrate", "--model", str(run), "--reals", str(folder / "real"), "--fpr", "0.1"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "--replace" in capsys.readouterr().err
    assert (run / "best" / "calibration.json").read_bytes() == before
    (run / "best" / "calibration.json").write_text("{")  # a damaged one too, and --replace mends it
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--replace", "--workers", "0"])
    assert load_calibration(run).fpr == 0.1


def test_images_of_the_training_are_told(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    files = sorted((folder / "real").iterdir())
    command = [
        "calibrate",
        "--model",
        str(run),
        "--reals",
        *map(str, files),
        "--fpr",
        "0.1",
        "--workers",
        "0",
    ]
    (run / "best" / "calibration.json").unlink(missing_ok=True)
    main(command)
    assert "warning" not in capsys.readouterr().err  # the model does not say what it was trained on
    np.save(run / "best" / "training_images.npy", np.unique([file_hash(p.read_bytes()) for p in files[3:5]]))
    main([*command, "--replace"])
    said = capsys.readouterr().err
    assert f"warning: 2 of {len(files)} images were in this model's training, such as {files[3]}" in said
