"""An .onnx is a model that predict, evaluate, calibrate and monitor take; a stranger's is checked first."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from dgsnet.cli import main
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.detection.batches import best_size
from dgsnet.detection.decisions import calibrate, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.heatmaps import heatmap
from dgsnet.evaluation.evaluate import evaluate, find_models, find_suites
from dgsnet.model.checkpoint import build_model, save_model
from onnx import TensorProto, helper
from PIL import Image

FILES = ["mine.onnx", "mine.onnx.detector.json", "mine.onnx.md"]


def call(words, code=0):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
        sys.exit(0)
    assert (stop.value.code or 0) == code, words


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of two classes, a model whose adapters matter, calibrated in fp32, and its export."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name in ("0_real", "1_fake"):
        (place / "data" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 40 if name == "0_real" else 256, (40 + number, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "data" / name / f"{number}.png")
    config = Config(
        model=ModelConfig("dgsnet-tiny", "builtin", lora_rank=3),
        preprocess=PreprocessConfig(mode="crop", image_size=32, normalization="clip"),
    )
    model = build_model(config, with_text=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    save_model(place / "run", model, config)
    reals, generated = rng.normal(-3, 2, 900), rng.normal(3, 2, 900)
    save_calibration(place / "run", calibrate(reals, generated, fpr=0.05, views=2, batch=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        call("export --model run --format onnx --out mine.onnx")
    return place


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def test_it_scores_and_decides_as_the_model_that_it_is_of(here):
    call("predict data --model run --out theirs.csv --workers 0 --consistency")
    call("predict data --model mine.onnx --out ours.csv --workers 0 --consistency")
    theirs, ours = rows(here / "theirs.csv"), rows(here / "ours.csv")
    probabilities = [np.array([float(row["probability"]) for row in table]) for table in (theirs, ours)]
    np.testing.assert_allclose(*probabilities, atol=1e-4)
    assert np.ptp(probabilities[0]) > 0.01
    assert [row["decision"] for row in ours] == [row["decision"] for row in theirs]
    image = read_image(here / "data" / "0_real" / "0.png")
    maps = [heatmap(Detector.load(model), image).contributions for model in ("run", "mine.onnx")]
    np.testing.assert_allclose(*maps, atol=1e-3)


def test_it_is_evaluated_beside_its_model(here, capsys):
    suites = find_suites(["data"])
    theirs, ours = (
        evaluate(Detector.load(model), suites, journal=here / f"{name}.jsonl", workers=0).plain
        for name, model in find_models(["run", "mine.onnx"]).items()
    )
    for one, other in zip(theirs, ours, strict=True):
        assert abs(one.probability - other.probability) <= 1e-4
    call("evaluate --model mine.onnx --data data --out new --frozen", 2)
    assert "--frozen needs the model folder" in capsys.readouterr().err


def test_it_is_calibrated_watched_and_gone_on_with(here, monkeypatch, capsys):
    words = "calibrate --model mine.onnx --reals data/0_real --generated data/1_fake --fpr 0.5 --workers 0"
    call(words, 2)
    assert "is calibrated already" in capsys.readouterr().err
    call(f"{words} --replace")
    found = load_calibration("mine.onnx")
    assert (here / "mine.onnx.calibration.json").is_file()
    assert (found.n_reals, found.precision, found.batch, found.views) == (6, "fp32", 1, 1)

    predict = "predict data --model mine.onnx --out out.csv --workers 0"
    call(predict)
    called = [row for row in rows(here / "out.csv") if row["decision"] == "generated"]
    assert called and all(float(row["probability"]) > found.threshold for row in called)
    whole = (here / "out.csv").read_bytes()

    made, once = Detector.logits, iter(range(9))

    def killed(self, pixels):
        if next(once) == 8:
            raise KeyboardInterrupt
        return made(self, pixels)

    with monkeypatch.context() as stop:
        stop.setattr(Detector, "logits", killed)
        call(predict, 130)
    left = (here / "out.csv.partial").read_text().count("\n")
    assert left > 1
    call(f"{predict} --resume")
    assert (here / "out.csv").read_bytes() == whole

    lines = "".join(f"{number}.png,generated,real\n" for number in range(60))
    (here / "reviewed.csv").write_text(f"path,decision,truth\n{lines}")
    call("monitor --model mine.onnx --reviewed reviewed.csv", 3)
    assert (here / "mine.onnx.monitor.json").is_file()
    call(predict)
    assert not [row for row in rows(here / "out.csv") if row["decision"] == "generated"]

    # Another export of this name takes their place; a calibration of another precision is not in it.
    rule = load_calibration("run")
    save_calibration("run", replace(rule, precision="bf16"))
    call("export --model run --format onnx --out mine.onnx")
    assert sorted(path.name for path in here.glob("mine.onnx*")) == FILES
    detector = Detector.load("mine.onnx")
    assert (detector.temperature, detector.threshold) == (rule.temperature, rule.threshold)


def test_bits_are_an_images_own(here):
    rule = Detector.load("mine.onnx").calibration
    assert rule == replace(load_calibration("run"), batch=1)
    (here / "mine.onnx.calibration.json").unlink()
    with pytest.warns(UserWarning, match="scored one by one"):
        detector = Detector.load("mine.onnx", batch=4)
        pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        together = detector.logits(pixels)
    alone = torch.cat([detector.logits(one[None]) for one in pixels])
    assert torch.equal(together, alone) and len(together.unique()) == 5
    assert detector.settings()["batch"] == 1 and best_size(detector.model)[0] == 1


def network(nodes=None, *, sides=("batch", 3, 32, 32), outputs=("logits",), more=(), kind=TensorProto.FLOAT):
    """A network whose logit is the mean of the pixels, or what else the nodes make of them."""
    nodes = nodes or [helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[1, 2, 3], keepdims=0)]
    graph = helper.make_graph(
        nodes,
        "strange",
        [helper.make_tensor_value_info("pixels", kind, sides)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        list(more),
    )
    domains = {"": 17} | {node.domain: 1 for node in nodes if node.domain}
    opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def outside():
    """A weight in a further file."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[1])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weight.bin")
    return weight


def inside(weight):
    """The same in a graph within a graph."""
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["found"], value=weight)],
        "then",
        [],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, [1])],
    )
    yes = helper.make_node(
        "Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [1])
    )
    return [yes, helper.make_node("If", ["yes"], ["logits"], then_branch=then, else_branch=then)]


MEAN = {"axes": [1, 2, 3], "keepdims": 0}
ADDED = [
    helper.make_node("ReduceMean", ["pixels"], ["mean"], **MEAN),
    helper.make_node("Add", ["mean", "weight"], ["logits"]),
]
STRANGE = {
    "damaged": (b"\x08\x07" + b"x" * 99, "damaged or no ONNX network"),
    "empty": (b"", "damaged or no ONNX network"),
    "outside": (network(ADDED, more=[outside()]), "further files"),
    "outside, inside": (network(inside(outside())), "further files"),
    "foreign operator": (
        network([helper.make_node("Own", ["pixels"], ["logits"], domain="com.stranger")]),
        "operator Own of com.stranger",
    ),
    "another size": (network(sides=("batch", 3, 48, 48)), "3, 32, 32]"),
    "another batch": (network(sides=(2, 3, 32, 32)), "'batch' or 1"),
    "double": (network(kind=TensorProto.DOUBLE), "its input is tensor(double)"),
    "many": (
        network([helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=[2, 3], keepdims=0)]),
        "one float32 logit is needed",
    ),
    "two outputs": (
        network(
            [
                helper.make_node("ReduceMean", ["pixels"], ["a"], **MEAN),
                helper.make_node("ReduceMax", ["pixels"], ["b"], **MEAN),
            ],
            outputs=("a", "b"),
        ),
        "none is named logits",
    ),
}


def refused(words, said, capsys):
    capsys.readouterr()
    call(words, 2)
    error = capsys.readouterr().err
    assert error.startswith("dgsnet: ") and error.count("\n") == 1 and said in error, error


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_network_is_one_line(name, here, capfd):
    content, said = STRANGE[name]
    np.zeros(1, np.float32).tofile("weight.bin")
    (here / "mine.onnx").write_bytes(content)
    refused("predict data --model mine.onnx --out out.csv --workers 0", said, capfd)
    assert not (here / "out.csv").exists()


@pytest.mark.parametrize("sides", [("batch", 3, 32, 32), (1, 3, 32, 32), (None, None, "h", "w")])
def test_a_strangers_network_is_scored(sides, here):
    (here / "strange.onnx").write_bytes(network(sides=sides))
    said = {"model": {"name": "theirs"}, "preprocess": {"mode": "crop", "image_size": 32}, "threshold": 0.4}
    (here / "strange.onnx.detector.json").write_text(json.dumps(said))
    detector = Detector.load("strange.onnx")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(detector.logits(pixels), pixels.mean(dim=(1, 2, 3)))
    assert detector.threshold == 0.4


def test_what_an_onnx_cannot_do_is_one_line(here, capsys, monkeypatch):
    predict = "predict data --model mine.onnx --out out.csv"
    refused(f"{predict} --device cuda", "scored on the CPU", capsys)
    refused(f"{predict} --pretrained x.pt", "leave --pretrained out", capsys)
    refused("average mine.onnx run --out new", "is a network alone", capsys)
    refused("export --model mine.onnx --format onnx --out new.onnx", "is a network alone", capsys)
    refused("predict data --model none.onnx --out out.csv", "no model at none.onnx", capsys)
    (here / "mine.onnx.calibration.json").unlink()
    refused(f"{predict} --precision bf16", "computed in fp32", capsys)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        refused(predict, "pip install 'dgs-kernels[export]'", capsys)
    with monkeypatch.context() as small:
        small.setattr("dgsnet.model.onnx_network.MOST_BYTES", 99)
        refused(predict, "at most 99", capsys)
    (here / "mine.onnx.detector.json").write_text('{"model": {}, "preprocess": {"image_size": "big"}}')
    refused(predict, "mine.onnx.detector.json is damaged", capsys)
    (here / "mine.onnx.detector.json").unlink()
    refused(predict, "mine.onnx.detector.json is missing", capsys)
