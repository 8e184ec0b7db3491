"""Published results: sound in themselves, and beside what was measured."""

import numpy as np
import pytest
from dgsnet.errors import UserError
from dgsnet.evaluation import published
from dgsnet.evaluation.report import published_generators, published_methods

from tests.support.tables import measure
from tests.support.tiny import save_picture


def test_published_figures_agree_with_their_published_means():
    for suite in published.SUITES:
        means = np.mean(list(suite.generators.values()), axis=0)
        assert means[:2] == pytest.approx(suite.methods["DGS-Net"], abs=0.051), suite.name
    assert [len(suite.generators) for suite in published.SUITES] == [8, 16, 25]
    assert published.find("aigibench").generator("dalle3")[0] == 41.5
    assert published.find("AIGCDetectBenchmark").name == "GenImage"
    assert published.find("mine") is None
    assert published.compare("AIGIBench", {"mine": {"accuracy": 1.0, "ap": 1.0}}) is None


def test_own_and_published_figures_stand_in_their_columns():
    own = {"ProGAN": (0.61, 0.72), "mine": (0.9, 0.8), "DALLE-3": (0.5, 0.25)}
    measured = {name: {"accuracy": accuracy, "ap": ap} for name, (accuracy, ap) in own.items()}
    comparison = published.compare("AIGIBench", measured)
    assert published_generators(comparison) == [
        ["generator", "accuracy", "published", "AP", "published"],
        ["DALLE-3", "50.0", "41.5", "25.0", "40.8"],
        ["ProGAN", "61.0", "99.7", "72.0", "100.0"],
    ]
    assert published_methods(comparison)[:4] == [
        ["method", "generators", "accuracy", "AP"],
        ["this model", "2 of 25", "55.5", "48.5"],
        ["DGS-Net, published", "the same 2", "70.6", "70.4"],
        ["DGS-Net, published", "all 25", "82.3", "87.8"],
    ]
    assert len(comparison.missing) == 23 and comparison.missing[:3] == ["BLIP", "BlendFace", "CommunityAI"]


def test_three_layouts_at_once(model, tmp_path, capsys):
    for name in ("dalle/0_real/a.png", "dalle/1_fake/b.png", "ldm_100/0_real/c.png", "ldm_100/1_fake/d.png"):
        save_picture(tmp_path / "UniversalFakeDetect" / name)
    for name in (
        "ADM/val/nature/a.png",
        "ADM/val/ai/b.png",
        "ADM/train/ai/left_out.png",
        "BigGAN/val/nature/c.png",
        "BigGAN/val/ai/d.png",
    ):
        save_picture(tmp_path / "GenImage" / name)
    for name in ("DALLE-3/0_real/a.png", "DALLE-3/1_fake/b.png", "MyOwn/0_real/c.png", "MyOwn/1_fake/d.png"):
        save_picture(tmp_path / "aigi/test" / name)
    sources = [tmp_path / "UniversalFakeDetect", tmp_path / "GenImage", f"AIGIBench={tmp_path}/aigi/test"]
    with pytest.raises(UserError, match="GenImage: holds the splits train, val; choose one"):
        measure(model, sources, tmp_path / "o")
    document = measure(model, sources, tmp_path / "o", split="val")
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
    # This is the mean of 97.5 for ADM and 84.6 for BigGAN.
    assert document["published"]["GenImage"]["percent"][1][2] == "91.0"
    printed = capsys.readouterr().out
    assert "mean of GenImage" in printed and "the same 1" in printed
    assert "## AIGIBench: published results" in (tmp_path / "o/metrics.md").read_text()
