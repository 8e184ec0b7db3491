"""benchmarks/prior.py: its rule "positive" is training's own step, and what it measures moves."""

from dataclasses import replace

import pytest
import torch
from dgsnet import builtin
from dgsnet.config import ModelConfig, SurgeryConfig
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training.plan import BRANCHES
from dgsnet.training.step import Step

from benchmarks import prior


@pytest.mark.parametrize("order", ["align_first", "project_first"])
@pytest.mark.parametrize("reference", [None, 3])
def test_the_positive_rule_is_trainings_own_step(order, reference):
    torch.manual_seed(0)
    model = DGSNet(ModelConfig(name="dgsnet-tiny", pretrained="", lora_rank=2, lora_dropout=0.0)).double()
    surgery = SurgeryConfig(order=order, reference_batch_size=reference, alignment=3.0)
    batch = (torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 1, 0, 1, 0]), *torch.randn(2, 6, model.dim))
    batch = tuple(x.double() for x in batch)
    step = Step(model, BRANCHES, surgery)
    found = []
    for loss in (
        lambda: step(*batch[:3], None, batch[3])[0],
        lambda: prior.ruled_loss(model, surgery, "positive", *batch),
        lambda: prior.ruled_loss(model, surgery, "full", *batch),
    ):
        model.zero_grad()
        value = loss()
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.trainable_parameters())])
    ours, positive, full = found
    for a, b in zip(ours, positive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
    assert max((a - b).abs().max() for a, b in zip(ours[1:], full[1:])) > 1e-6


def test_every_method_is_measured_from_the_frozen_features_on(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "COUNTS", {"train": 4, "val": 1})
    monkeypatch.setattr(prior, "STEPS", (0, 2))
    monkeypatch.setattr(prior, "HEAD_STEPS", 1)
    data = builtin.write_dataset(tmp_path, splits=("train", "val"), compressed=(0.5, 0.5))
    config = builtin.demo_config(data)
    config = replace(config, optim=replace(config.optim, lr=2e-2))
    images, exam = prior.Images(config), prior.prepare(data, "val", config)
    ends = set()
    for method in prior.METHODS:
        found = prior.run(method, config, images, exam)
        assert found["drift"][0] == 0 and found["cka"][0] == pytest.approx(1) and found["zero_shot"][0] > 0.6
        assert found["drift"][1] > 1e-3 and found["cka"][1] < 0.999
        ends.add(round(found["drift"][1], 6))
    assert len(ends) == len(prior.METHODS)
