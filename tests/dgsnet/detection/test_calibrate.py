"""`dgsnet calibrate`: from images to decisions, and what a model's folder keeps of it."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.images import file_hash, read_image
from dgsnet.detection.batches import SIZES
from dgsnet.detection.decisions import Calibration, calibrate, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.model.checkpoint import build_model, save_model
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.linear_model import LogisticRegression


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Smooth images and the same kind with a checkerboard, and a model whose head tells them apart."""
    root = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    for kind, strength, count in (("real", 0, 110), ("fake", 14, 90)):
        (root / kind).mkdir()
        for i in range(count):
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
    files = [*sorted((root / "real").iterdir())[:40], *sorted((root / "fake").iterdir())[:40]]
    with torch.no_grad():
        features = torch.cat(
            [model.student_features(detector.preprocess(read_image(f))[None]) for f in files]
        )
        head = LogisticRegression(C=100, max_iter=1000).fit(features.numpy(), [0] * 40 + [1] * 40)
        model.head.image_head.weight.copy_(torch.from_numpy(head.coef_))
        # The threshold becomes a wrong one.
        model.head.image_head.bias.copy_(torch.from_numpy(head.intercept_) + 5)
    save_model(root / "run" / "best", model, config)
    return root


@pytest.fixture
def folder(trained, tmp_path_factory):
    """Each test has its own: a calibration that one leaves would be in another's way."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("own"), dirs_exist_ok=True)


def test_from_images_to_decisions(folder, tmp_path, capsys):
    (folder / "real" / "broken.png").write_bytes(b"no picture")
    (folder / "real" / "twin.png").write_bytes((folder / "real" / "000.png").read_bytes())
    command = ["calibrate", "--model", str(folder / "run"), "--reals", str(folder / "real"), "--workers", "0"]
    command += ["--generated", str(folder / "fake"), "--fpr", "0.05", "--miss-rate", "0.2", "--views", "2"]
    command += ["--batch", "8", "--precision", "bf16"]
    main(command)
    printed = capsys.readouterr().out
    assert "broken.png" in printed and "above" in printed and "temperature" in printed

    detector = Detector.load(folder / "run", device="cpu")
    c = detector.calibration
    assert (c.n_reals, c.n_generated, c.views, detector.views) == (110, 90, 2, 2)
    assert (c.fpr, c.miss_rate) == (0.05, 0.2)
    assert c.fpr_upper <= 0.05 < c.miss_upper <= 0.2 and c.tpr_observed > 0.5

    (folder / "real" / "broken.png").unlink()
    reals = detector.predict(sorted((folder / "real").iterdir()), workers=0)
    fakes = detector.predict(sorted((folder / "fake").iterdir()), workers=0)
    calls = detector.decide(reals)
    assert calls.count("generated") == round(c.fpr_observed * 110) <= 1
    assert detector.decide(fakes).count("generated") == round(c.tpr_observed * 90)
    # At 0.5 the same model calls far more real images generated.
    plain = Detector.load(folder / "run", device="cpu", calibrated=False)
    assert plain.decide(plain.predict(sorted((folder / "real").iterdir()), workers=0)).count("generated") > 10

    with pytest.raises(UserError, match=r"calibrated for views=2.*views=3"):
        Detector.load(folder / "run", device="cpu", views=3)
    assert (c.batch, c.precision) == (8, "bf16")
    with pytest.raises(
        UserError, match=r"calibrated for precision=bf16.*run dgsnet calibrate --precision fp32"
    ):
        Detector.load(folder / "run", device="cpu", precision="fp32")
    # Calibrating again starts from the model, not from the calibration.
    main([*command, "--replace"])
    assert load_calibration(folder / "run") == c


def test_different_files_of_one_score_count_each_and_copies_of_a_file_once(folder, tmp_path, capsys):
    """On both sides, also where a copy is in a tar and where an image is labelled both ways."""
    run = folder / "run"
    plain = Detector.load(run, device="cpu", calibrated=False)
    paths = {kind: sorted((folder / kind).glob("[0-9]*.png")) for kind in ("real", "fake")}
    scores = plain.predict(paths["real"], workers=0)
    highest = paths["real"][int(scores.argmax())]
    for kind, (shared, same, tied) in {
        "real": (highest, 5, 37),
        "fake": (paths["fake"][3], 4, 21),
    }.items():
        shutil.copytree(folder / kind, tmp_path / kind)
        for i in range(same):
            shutil.copy(shared, tmp_path / kind / f"same{i}.png")
        for i in range(tied):
            # These files have the same pixels and so the same score, but another content.
            comment = PngInfo()
            comment.add_text("number", f"{i}")
            Image.open(shared).save(tmp_path / kind / f"tied{i}.png", pnginfo=comment)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        tar.add(paths["real"][7], "again.png")
    command = ["calibrate", "--model", str(run), "--fpr", "0.1", "--workers", "0"]
    command += ["--reals", str(tmp_path / "real"), str(tmp_path / "more.tar")]
    main([*command, "--generated", str(tmp_path / "fake"), str(paths["real"][2])])
    count = len(paths["real"])
    c, said = load_calibration(run), capsys.readouterr()
    assert (c.n_reals, c.n_generated) == (count + 37, 90 + 21 + 1)
    assert f"6 of {count + 43} real images are copies of others' files" in said.out
    assert "4 of 116 generated images are copies of others' files" in said.out
    assert "warning: 1 of 112 generated image has a file that is labelled real too, such as" in said.err
    # More of the real images have the highest score than may lie above the threshold: none does.
    found = Detector.load(run, device="cpu").predict(sorted((tmp_path / "real").glob("*.png")), workers=0)
    assert c.threshold == pytest.approx(found.max(), abs=2e-6) and c.fpr_observed == 0


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


def labelled(folder, root, splits=("",)):
    """The same images as a labelled dataset."""
    for split in splits:
        for kind, name in (("real", "0_real"), ("fake", "1_fake")):
            shutil.copytree(folder / kind, root / split / "mine" / name)
    return root


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
def test_of_a_labelled_dataset_each_option_takes_its_class(folder, tmp_path, capsys, splits):
    run = folder / "run"
    whole, folder = folder, tmp_path / "few"
    for kind, few in (("real", 41), ("fake", 36)):
        (folder / kind).mkdir(parents=True)
        for path in sorted((whole / kind).iterdir())[:few]:
            shutil.copy(path, folder / kind)
    root = labelled(folder, tmp_path / "root", splits)
    command = ["calibrate", "--model", str(run), "--fpr", "0.1", "--workers", "0"]
    command += ["--batch", "16"]
    main([*command, "--reals", str(root), "--generated", str(root)])
    found = load_calibration(run)
    said = capsys.readouterr().out
    main([*command, "--replace", "--reals", str(folder / "real"), "--generated", str(folder / "fake")])
    assert load_calibration(run) == found
    counts = [count * len(splits) for count in (41, 36)]
    assert "its {} real images are taken, its {} generated ones are not".format(*counts) in said

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
    run = folder / "run"
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
    run = folder / "run"
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
    made = load_calibration(run)
    assert made.n_generated == len(files)
    # Neither was given.
    chosen = Detector.load(run, device="cpu", calibrated=False).fastest()
    assert made.precision == chosen.precision and made.batch in SIZES


def test_a_calibration_is_not_replaced_unasked(folder, tmp_path, capsys):
    run = folder / "run"
    save_calibration(run, calibrate(np.random.default_rng(0).normal(size=400), fpr=0.05))
    before = (run / "best" / "calibration.json").read_bytes()
    command = ["calibrate", "--model", str(run), "--reals", str(folder / "real"), "--fpr", "0.1"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "--replace" in capsys.readouterr().err
    assert (run / "best" / "calibration.json").read_bytes() == before
    # A damaged calibration is refused too, and --replace mends it.
    (run / "best" / "calibration.json").write_text("{")
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--replace", "--workers", "0"])
    assert load_calibration(run).fpr == 0.1


def test_images_of_the_training_are_told(folder, tmp_path, capsys):
    run = folder / "run"
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
    main(command)
    # The model does not say what it was trained on.
    assert "warning" not in capsys.readouterr().err
    np.save(run / "best" / "training_images.npy", np.unique([file_hash(p.read_bytes()) for p in files[3:5]]))
    main([*command, "--replace"])
    said = capsys.readouterr().err
    assert f"warning: 2 of {len(files)} images were in this model's training, such as {files[3]}" in said
