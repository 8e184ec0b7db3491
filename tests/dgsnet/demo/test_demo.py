"""The demo's comparison on a few images and a CLIP with random weights: fair, complete, told as it is."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig
from dgsnet.data.samples import find_samples
from dgsnet.demo import command, report
from dgsnet.demo import compare as demo
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.results import Evaluation, Score
from dgsnet.files import locked
from PIL import Image

SPLITS = {"train": ["nearest"], "val": ["bicubic"], "test": ["shuffle", "unpool"]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Six small models, trained for real: (folder, runs)."""
    folder = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    for split, decoders in SPLITS.items():
        captions = {}
        for decoder in decoders:
            for label in ("0_real", "1_fake"):
                (folder / "data" / split / decoder / label).mkdir(parents=True)
                for i in range(6):
                    name = f"{decoder}/{label}/{i}.png"
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                        folder / "data" / split / name
                    )
                    captions[name] = "a picture"
        (folder / "data" / split / "captions.json").write_text(json.dumps(captions))
    config = Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2),
        preprocess=PreprocessConfig(mode="crop", image_size=32),
        data=DataConfig(train=[str(folder / "data")], val=[str(folder / "data")], workers=0),
        optim=OptimConfig(batch_size=6, head_epochs=1, epochs=2),
        log_every=1,
    )
    return folder, demo.compare(folder / "data", config, folder / "runs", seeds=(3, 4))


def made_up(auc):
    """Runs whose AUC on one decoder is as given: method to one value per seed, in steps of 0.1."""
    runs = []
    for method, values in auc.items():
        for seed, value in enumerate(values):
            above = round(10 * value)
            scores = [Score("r", "d", 0, 0.5)] + [
                Score("g", "d", 1, 0.9 if i < above else 0.1) for i in range(10)
            ]
            runs.append(demo.Run(method, seed, None, {}, Evaluation(scores), 1.0))
    return runs


def test_methods_differ_in_nothing_but_the_method():
    config = Config(seed=7)
    made = demo.configurations(config, seed=1)
    changes = {
        method: {
            f"{section}.{name}"
            for section, values in made[method].to_dict().items()
            if isinstance(values, dict)
            for name, value in values.items()
            if value != config.to_dict()[section][name]
        }
        for method in made
    }
    assert changes == {
        demo.PROBE: {"model.lora_rank", "surgery.mode"},
        demo.LORA: {"surgery.mode"},
        demo.DGSNET: set(),
        demo.LAYERWISE: {"surgery.mode"},
    }
    assert {c.seed for c in made.values()} == {1}


def test_every_method_and_seed_is_trained_and_measured(compared):
    _, runs = compared
    assert [(r.method, r.seed) for r in runs] == [(m, s) for m in demo.METHODS for s in (3, 4)]
    for run in runs:
        assert sorted(run.evaluation.by_generator()) == SPLITS["test"]
        assert len(run.evaluation.scores) == 24
        assert run.curves["step"][0] == 1 and np.isfinite(run.curves["val_auc"]).sum() == 2
        assert np.isfinite(run.curves["image_loss"]).sum() == 4
        assert (run.folder / "test/metrics.json").is_file()
    paths = [s.path for s in runs[0].evaluation.scores]
    score = Detector.load(runs[-1].folder, device="cpu").predict(paths)
    np.testing.assert_allclose(score, [s.probability for s in runs[-1].evaluation.scores], atol=1e-6)


def test_report_is_complete_and_self_contained(compared):
    folder, runs = compared
    samples = {split: find_samples(folder / "data", split) for split in SPLITS}
    maps, labels = command.feature_maps(runs, samples["test"])
    assert [points.shape for points in maps.values()] == [(24, 2)] * 3 and labels.sum() == 12
    page = folder / "report.html"
    report.write(page, runs, samples=samples, maps=maps, map_labels=labels, seconds=90)
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page refers to another file"
    assert "{{" not in text and "{%" not in text
    assert text.count("<svg ") == 3 and "1.5 minutes" in text

    class Balance(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    Balance().feed(text)
    assert Balance.open_tags == []
    for method in demo.METHODS:
        mean, spread = demo.mean_and_spread(demo.by_seed(runs, method, "auc"))
        assert f"{100 * mean:.1f} ± {100 * spread:.1f}" in text


def test_table_has_mean_and_spread_over_seeds():
    runs = made_up({demo.PROBE: [0.5, 0.5], demo.LORA: [0.6, 0.8], demo.DGSNET: [0.7, 0.9]})
    lines = demo.table(runs).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == list(demo.METHODS)
    assert "70.0 ± 14.1" in lines[3] and "80.0 ± 14.1" in lines[4] and "50.0 ± 0.0" in lines[2]


@pytest.mark.parametrize(
    ("surgery", "says"),
    [([0.8, 0.9], "better than LoRA"), ([0.5, 0.6], "did not help"), ([0.5, 0.9], "does not tell")],
)
def test_the_verdict_follows_the_numbers(surgery, says):
    sentences = report.verdict(made_up({demo.PROBE: [0.5] * 2, demo.LORA: [0.7, 0.8], demo.DGSNET: surgery}))
    assert says in sentences[2]
    best = demo.DGSNET if np.mean(surgery) > 0.75 else demo.LORA
    assert sentences[0].startswith(f"By AUC, averaged over test decoders: {best}")


def test_the_verdict_admits_guessing():
    near = report.verdict(made_up({demo.PROBE: [0.5] * 2, demo.LORA: [0.4, 0.5], demo.DGSNET: [0.5, 0.5]}))
    far = report.verdict(made_up({demo.PROBE: [0.5] * 2, demo.LORA: [0.7, 0.8], demo.DGSNET: [0.8, 0.9]}))
    assert "far from guessing" in near[2] and "far from guessing" not in far[2]


def test_only_a_former_demo_is_overwritten(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose")
    with pytest.raises(UserError, match="not a demo's"):
        command.demo_command(str(mine))
    assert (mine / "thesis.txt").read_text() == "do not lose"

    former = tmp_path / "former"
    former.mkdir()
    command._prepare(former)
    (former / "runs").mkdir()
    (former / "report.html").touch()
    with locked(former), pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        command.demo_command(str(former))
    assert (former / "report.html").exists()
    assert [entry.name for entry in command._prepare(former).iterdir()] == [command.MARKER]
