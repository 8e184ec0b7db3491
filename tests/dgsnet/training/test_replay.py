"""Replayed images: which a step draws, and what its gradient is under each rule."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import Config
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import ImageDataset
from dgsnet.data.preprocess import Preprocessor
from dgsnet.model import checkpoint
from dgsnet.training.replay import WEIGHTINGS, Update
from dgsnet.training.step import named_parameters
from dgsnet.training.update import update

from tests.support.runs import STATE_FILE, interrupted_after


def naive_gem(g, others):
    """The vector nearest to g without a negative product with any of the others: the best active set."""
    best = None
    for count in range(len(others) + 1):
        for active in itertools.combinations(others, count):
            d = g
            if active:
                a = torch.stack(active)
                d = g - a.T @ torch.linalg.solve(a @ a.T, a @ g)
            allowed = all(d @ other > -1e-12 * g.norm() * other.norm() for other in others)
            if allowed and (best is None or (d - g).norm() < (best - g).norm()):
                best = d
    return best


def naive(rule, g, others):
    if rule == "gem":
        return naive_gem(g, others)
    if rule == "none":
        return g
    (o,) = others
    if rule == "replay":
        return (g + o) / 2
    c = min(g @ o, 0)
    return g - c / (o @ o) * o + o - c / (g @ g) * g


@pytest.mark.parametrize("rule", [*WEIGHTINGS, "none"])
def test_a_step_has_the_rules_gradient(rule, options, tmp_path):
    """Adam's first moment after one step is a tenth of its gradient; the formulas are redone in float64."""
    out = tmp_path / "run"
    with interrupted_after(1):
        update(out=out, rule=rule, test=[], **options | {"steps": 2, "replay_share": 0.4})
    state = checkpoint.load_state(out / STATE_FILE)
    found = state["optimizer"]
    moments = [entry["exp_avg"] for entry in found["state"].values()]

    config = Config.load(out / "config.json")
    new, old = (find_samples(root, "train") for root in (options["data"][0], options["replay"][0]))
    network = checkpoint.load_model(options["model"])[0].double()
    images = ImageDataset([*new, *old], Preprocessor(config.preprocess), train=True, seed=config.seed)
    epoch = config.optim.head_epochs  # stage 2 counts from there
    images.set_epoch(epoch)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name or "image_head" in name)
    names, trained = zip(*named_parameters(network))
    assert found["param_groups"][0]["param_names"] == list(names)

    def gradient(places):
        items = [images[i] for i in places]
        labels = torch.tensor([item["label"] for item in items], dtype=torch.float64)
        logits = network.logits(torch.stack([item["pixels"] for item in items]).double())
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)]), loss.item()

    order = np.random.default_rng((config.seed, epoch)).permutation(len(new))[: config.optim.batch_size]
    drawn = Update({}, np.empty(0), old, rule, 0.4 / 0.6, config.seed, {}).draw(0, len(order))
    assert sum(map(len, drawn.values())) == 5
    g, loss = gradient(order)
    others = [gradient([len(new) + i for i in places])[0] for places in drawn.values()]
    logged = state["sums"]
    assert (logged[0].item(), logged[-1].item()) == (pytest.approx(loss, rel=1e-5), 1)  # of new images alone
    assert len(others) == (2 if rule == "gem" else 1)
    assert min(g @ o for o in others) < 0  # else nothing is tested
    if rule == "none":
        others = []
    expected = naive(rule, g, others)
    actual = torch.cat([moment.flatten() for moment in moments]).double() / (1 - config.optim.betas[0])
    assert (actual - expected).norm() < 5e-5 * g.norm()
    if rule != "none":
        assert (expected - g).norm() > 1e-2 * g.norm()


def replayed(generators, rule):
    """An update with more images of each generator than of the one before, and more generated than real."""
    samples = [
        Item(f"{generator}-{label}-{i}", label, f"g{generator:02d}")
        for generator in range(generators)
        for label in (0, 1)
        for i in range(3 + generator + label)
    ]
    return Update({}, np.empty(0), samples, rule, 2.0, 5, {})


def test_draws_are_balanced_functions_of_seed_and_step():
    one = replayed(3, "replay")
    (drawn,) = one.draw(7, 6).values()
    assert len(drawn) == 12 and drawn == replayed(3, "conflict").draw(7, 6)["replayed"]
    cells = [(one.samples[i].generator, one.samples[i].label) for i in drawn]
    assert all(cells.count(cell) == 2 for cell in cells)
    assert {i for step in range(40) for i in one.draw(step, 6)["replayed"]} == set(range(len(one.samples)))
    draws = {
        tuple(dataclasses.replace(one, seed=seed).draw(step, 6)["replayed"])
        for seed in range(4)
        for step in range(4)
    }
    assert len(draws) == 16  # (seed, step) of neighbours do not meet


def test_gem_has_a_constraint_for_each_old_generator_as_far_as_there_may_be():
    three = replayed(3, "gem")
    drawn = three.draw(0, 6)
    assert sorted(drawn) == ["replayed/g00", "replayed/g01", "replayed/g02"]
    for name, places in drawn.items():
        assert {three.samples[i].generator for i in places} == {name[-3:]}
    assert sorted(i for places in drawn.values() for i in places) == sorted(
        replayed(3, "replay").draw(0, 6)["replayed"]
    )
    many = replayed(32, "gem").draw(0, 32)
    assert len(many) == 15 and "replayed/g00, g15, g30" in many
