"""The demo's comparison with a few steps and a CLIP with random weights: fair, complete, told as it is."""

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from dgsnet import builtin
from dgsnet.config import Config, DataConfig, ModelConfig, OptimConfig, PreprocessConfig
from dgsnet.data.items import find_samples
from dgsnet.demo import command, measure, report
from dgsnet.demo import compare as demo
from dgsnet.detection.detector import Detector
from dgsnet.errors import UserError
from dgsnet.evaluation.results import Evaluation, Score
from dgsnet.files import locked
from dgsnet.model.dgsnet import DGSNet
from sklearn.metrics import roc_auc_score

from tests.support.fresh import forked


def configure(root):
    return Config(
        model=ModelConfig(name="dgsnet-tiny", pretrained="builtin", lora_rank=2),
        preprocess=PreprocessConfig(mode="crop", image_size=32, crops=5),
        data=DataConfig(train=[str(root / "train")], workers=0),
        optim=OptimConfig(batch_size=5, head_epochs=0, epochs=1, max_steps=2),
        log_every=1,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """All methods on the task with the shortcut, trained for real: (folder, runs)."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "COUNTS", {"test": 6})
        builtin.write_dataset(folder / "data", splits=("test",), compressed=(0.5, 0.5))
        forked(demo, patch)
        runs = demo.compare(folder / "data", configure, folder / "runs", seeds=(3,), tasks=(demo.BIASED,))
    return folder, runs


def made_up(task=demo.BIASED, **measures):
    """Runs with these measures, each method to one value per seed; what is not given is 0.5."""
    names = dict(zip(("probe", "lora", "dgsnet", "expert", "twins"), demo.METHODS))
    seeds = len(next(iter(next(iter(measures.values())).values())))
    return [
        demo.Run(
            *(task, method, seed, None, {}, Evaluation([])),
            **{key: measures.get(key, {}).get(name, [0.5] * seeds)[seed] for key in demo.MEASURES},
            seconds=1.0,
        )
        for name, method in names.items()
        for seed in range(seeds)
    ]


def test_methods_differ_in_nothing_but_the_method():
    config = Config(seed=7, data=DataConfig(train=["data/jpeg-1/train"]))
    made = demo.configurations(config, seed=1)
    changes = {
        method: {name for name, value in made[method].flat().items() if value != config.flat()[name]}
        for method in made
    }
    expert = {"surgery.text", "surgery.distillation"}
    expert |= {
        f"data.{k}" for k, v in demo.EXPERTS[demo.CHOSEN_EXPERT].items() if v != config.flat()[f"data.{k}"]
    }
    assert changes == {
        demo.PROBE: {"model.lora_rank", "surgery.mode", "seed"},
        demo.LORA: {"surgery.mode", "seed"},
        demo.DGSNET: {"seed"},
        demo.EXPERT: expert | {"seed"},
        demo.LAYERWISE: {"surgery.mode", "seed"},
        demo.TWINS: {
            "data.train",
            "data.pairs",
            "data.captions",
            "optim.head_epochs",
            "surgery.alignment",
            "seed",
        }
        | {"surgery.distillation"},
    }
    assert made[demo.TWINS].data.train == ["data/jpeg-1-twins/train"]
    assert {c.seed for c in made.values()} == {1}


def test_every_method_and_seed_is_trained_and_measured(compared):
    folder, runs = compared
    assert [(r.method, r.seed) for r in runs] == [(m, 3) for m in demo.METHODS]
    for run in runs:
        assert sorted(run.evaluation.by_generator()) == sorted(builtin.FAMILIES["test"])
        assert len(run.evaluation.scores) == 60 and run.auc == run.evaluation.mean()["auc"]
        assert run.curves["step"].tolist() == [1, 2] and np.isfinite(run.curves["image_loss"]).all()
        images = "jpeg-3-twins" if run.method == demo.TWINS else "jpeg-3"
        assert Config.load(run.folder / "config.json").data.train == [str(folder / f"data/{images}/train")]
    paths = [s.path for s in runs[-1].evaluation.scores]
    score = Detector.load(runs[-1].folder, device="cpu").predict(paths)
    np.testing.assert_allclose(score, [s.probability for s in runs[-1].evaluation.scores], atol=1e-6)
    assert demo.of(runs, demo.BIASED, demo.PROBE)[0].cka == pytest.approx(1)
    rows = json.loads(json.dumps(demo.results(runs)))
    assert {"task", "method", "seed", "auc", "auc_conflicting", "zero_shot", "cka"} <= rows[0].keys()


def test_the_shortcut_is_in_the_training_images_and_differs_from_seed_to_seed(compared):
    folder, _ = compared
    demo._write(folder / "data", demo.BIASED, 4)
    shares = []
    for seed in (3, 4):
        samples = find_samples(demo.training_set(folder / "data", demo.BIASED, seed))
        jpeg = np.array([sample.path.endswith(".jpg") for sample in samples])
        labels = np.array([sample.label for sample in samples])
        shares.append((jpeg[labels == 0].mean(), jpeg[labels == 1].mean()))
    assert shares[0] != shares[1]
    np.testing.assert_allclose(shares, [demo.TASKS[demo.BIASED]] * 2, atol=0.1)


def test_conflicting_images_are_generated_jpegs_and_real_pngs():
    expected = {("a.jpg", 1): True, ("a.png", 0): True, ("a.jpg", 0): False, ("a.png", 1): False}
    assert {key: measure.conflicting(Score(key[0], "d", key[1], 0.5)) for key in expected} == expected


def test_measures_are_those_of_the_features(compared):
    folder, _ = compared
    config = configure(folder)
    exam = measure.prepare(folder / "data", "test", config)
    # Its adapters change nothing yet.
    model = DGSNet(config.model).eval()
    with torch.no_grad():
        model.head.image_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = measure.measure(model, exam)
    assert found.cka == pytest.approx(1, abs=1e-6)
    # The model was pretrained on these photographs.
    assert found.zero_shot > 0.6
    assert measure.zero_shot(exam.crops.flatten(1)[:, : model.dim], exam) < 0.2
    scores = found.evaluation.scores
    aucs = []
    for decoder in builtin.FAMILIES["test"]:
        chosen = [s for s in scores if s.generator == decoder and s.path.endswith(".jpg") == (s.label == 1)]
        aucs.append(roc_auc_score([s.label for s in chosen], [s.probability for s in chosen]))
    assert found.conflicting == pytest.approx(np.mean(aucs))
    with torch.no_grad():
        for name, tensor in model.adapter_state().items():
            if "lora_B" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(0))
    moved = measure.measure(model, exam)
    assert moved.cka < 0.9 and moved.zero_shot < found.zero_shot


def test_report_is_complete_and_self_contained(compared):
    folder, runs = compared
    test = find_samples(folder / "data/test")
    maps, labels = command.feature_maps(runs, test)
    assert [points.shape for points in maps.values()] == [(60, 2)] * 5 and labels.sum() == 30
    page = folder / "report.html"
    both = [*(replace(run, task=demo.BALANCED) for run in runs), *runs]
    report.write(page, both, samples={"test": test}, maps=maps, map_labels=labels, seconds=90)
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page refers to another file"
    assert "{{" not in text and "{%" not in text
    assert text.count("<svg ") == 4 and "1.5 minutes" in text
    jpeg = sum(sample.path.endswith(".jpg") for sample in test if sample.label == 0)
    assert f"<td>30 ({jpeg})</td>" in text
    assert text.count("data:image/jpeg;base64,/9j/") == 10 == text.count("data:image/png;base64,iVBOR")

    class Balance(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    Balance().feed(text)
    assert Balance.open_tags == []
    for method in demo.METHODS:
        for key in demo.MEASURES:
            assert demo.mean_and_spread(demo.values(runs, demo.BIASED, method, key)) in text


def test_gains_are_paired():
    runs = made_up(auc={"lora": [0.5, 0.7, 0.6], "expert": [0.6, 0.7, 0.9]})
    gain = demo.gain(runs[::-1], demo.BIASED, demo.EXPERT, "auc")
    differences = np.array([0.1, 0.0, 0.3])
    assert (gain.mean, gain.won, gain.seeds) == (pytest.approx(differences.mean()), 2, 3)
    assert gain.error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert str(gain) == "+13.3 ± 8.8 (2/3)"
    lines = demo.table(runs).splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == list(demo.METHODS)
    assert "73.3 ± 15.3" in lines[5] and lines[-2].startswith("DGS-Net with expert − LoRA  +13.3 ± 8.8 (2/3)")


@pytest.mark.parametrize(
    ("expert", "says"),
    [
        ([0.70, 0.81, 0.75], "+15.3 ± 0.3 (3/3): more"),
        ([0.50, 0.61, 0.55], "−4.7 ± 0.3 (0/3): less"),
        ([0.50, 0.81, 0.60], "+3.7 ± 6.3 (1/3): not told apart"),
    ],
)
def test_the_verdict_follows_the_numbers(expert, says):
    runs = made_up(auc={"lora": [0.55, 0.65, 0.60], "expert": expert})
    sentences = report.verdict([*made_up(demo.BALANCED, auc={"lora": [0.9] * 3}), *runs])
    assert len(sentences) == 7
    published, ours = sentences[3:5]
    assert f"DGS-Net with expert against plain LoRA: AUC {says}, AUC on conflicting images" in ours
    assert "DGS-Net against plain LoRA: AUC −10.0 ± 2.9 (0/3): not told apart, AUC on" in published


def test_the_verdict_admits_guessing():
    near, far = (
        [*made_up(demo.BALANCED, auc={"lora": [v] * 2}), *made_up(auc={"lora": [v] * 2})] for v in (0.5, 0.6)
    )
    assert "far from guessing" in report.verdict(near)[3]
    assert not any("guessing" in sentence for sentence in report.verdict(far))


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
