"""Replayed images: which a step draws, and what its gradient is under each rule."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dgsnet.config import Config
from dgsnet.data.items import Item, find_samples
from dgsnet.data.loading import EpochSampler, ImageDataset
from dgsnet.data.pairs import attach_twins, find_pairs
from dgsnet.data.preprocess import Preprocessor
from dgsnet.model import checkpoint
from dgsnet.training.replay import WEIGHTINGS, Update
from dgsnet.training.step import named_parameters
from dgsnet.training.update import update

from tests.support.runs import STATE_FILE, changed, interrupted_after


def naive_gem(g, others, margin=0.0):
    """The vector nearest to g whose products with all others are those of the margin: the best active set."""
    best = None
    for count in range(len(others) + 1):
        for active in itertools.combinations(others, count):
            d = g
            if active:
                a = torch.stack(active)
                d = g - a.T @ torch.linalg.solve(a @ a.T, a @ g - margin * g.norm() * a.norm(dim=1))
            allowed = all(d @ o > (margin - 1e-12) * g.norm() * o.norm() for o in others)
            if allowed and (best is None or (d - g).norm() < (best - g).norm()):
                best = d
    return best


def naive(rule, g, others, margin):
    if rule == "gem":
        return naive_gem(g, others, margin)
    if rule == "none":
        return g
    (o,) = others
    if rule == "replay":
        return (g + o) / 2
    c = min(g @ o, 0)
    return g - c / (o @ o) * o + o - c / (g @ g) * g


@pytest.mark.parametrize(
    "rule, paired, margin",
    [*((rule, False, 0.0) for rule in [*WEIGHTINGS, "none"]), ("gem", True, 0.0), ("gem", False, 0.4)],
)
def test_a_step_has_the_rules_gradient(rule, paired, margin, options, tmp_path):
    """Adam's first moment after one step is a tenth of its gradient; the formulas are redone in float64.

    Of a detector that learned from pairs, twins of the same names come together, replayed ones too.
    """
    out = tmp_path / "run"
    if paired:
        options = options | {"model": shutil.copytree(options["model"], tmp_path / "detector")}
        settings = options["model"] / "best" / "config.json"
        settings.write_text(changed(Config.load(settings), data_pairs=True).to_json())
    with interrupted_after(1):
        update(out=out, rule=rule, margin=margin, test=[], **options | {"steps": 2, "replay_share": 0.4})
    state = checkpoint.load_state(out / STATE_FILE)
    found = state["optimizer"]
    moments = [entry["exp_avg"] for entry in found["state"].values()]

    config = Config.load(out / "config.json")
    roots = options["data"][0], options["replay"][0]
    new, old = (attach_twins(find_samples(root, "train"), root) for root in roots)
    pairs = [find_pairs(samples) if paired else None for samples in (new, old)]
    drawn_as = np.arange(len(new) + len(old))
    for first, of in zip((0, len(new)), pairs if paired else ()):
        drawn_as[first + of[:, 1]] = first + of[:, 0]
    network = checkpoint.load_model(options["model"])[0].double()
    how = {"train": True, "seed": config.seed, "drawn_as": drawn_as}
    images = ImageDataset([*new, *old], Preprocessor(config.preprocess), **how)
    # The epochs of stage 2 count from there.
    epoch = config.optim.head_epochs
    sampler = EpochSampler(images, shuffle=True, seed=config.seed, count=len(new), pairs=pairs[0])
    sampler.set_epoch(epoch)
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

    most = config.optim.batch_size
    drawn = Update({}, np.empty(0), old, rule, 0.4 / 0.6, config.seed, {}, pairs=pairs[1]).draw(0, most)
    assert sum((units >= 0).sum() for units in drawn.values()) == (6 if paired else 5)
    units = sampler.left()
    first = units[np.cumsum((units >= 0).sum(axis=1)) <= most]
    g, loss = gradient(first[first >= 0])
    others = [gradient(len(new) + places[places >= 0])[0] for places in drawn.values()]
    logged = state["sums"]
    # The log has the loss of the new images alone.
    assert (logged[0].item(), logged[-1].item()) == (pytest.approx(loss, rel=1e-5), 1)
    assert len(others) == (2 if rule == "gem" else 1)
    # Without a conflict nothing would be tested.
    assert min(g @ o for o in others) < 0
    if rule == "none":
        others = []
    expected = naive(rule, g, others, margin)
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


def places(update, step):
    """Those that a step with six new images replays."""
    return update.draw(step, 6)["replayed"].ravel().tolist()


def test_draws_are_balanced_functions_of_seed_and_step():
    one = replayed(3, "replay")
    drawn = places(one, 7)
    assert len(drawn) == 12 and drawn == places(replayed(3, "conflict"), 7)
    cells = [(one.samples[i].generator, one.samples[i].label) for i in drawn]
    assert all(cells.count(cell) == 2 for cell in cells)
    assert {i for step in range(40) for i in places(one, step)} == set(range(len(one.samples)))
    draws = {
        tuple(places(dataclasses.replace(one, seed=seed), step)) for seed in range(4) for step in range(4)
    }
    # Neighbouring seeds and steps draw different images.
    assert len(draws) == 16


def test_gem_has_a_constraint_for_each_old_generator_as_far_as_there_may_be():
    three = replayed(3, "gem")
    drawn = three.draw(0, 6)
    assert sorted(drawn) == ["replayed/g00", "replayed/g01", "replayed/g02"]
    for name, units in drawn.items():
        assert {three.samples[i].generator for i in units.ravel()} == {name[-3:]}
    of_all = np.concatenate([units.ravel() for units in drawn.values()])
    assert sorted(of_all) == sorted(places(replayed(3, "replay"), 0))
    many = replayed(99, "gem").draw(0, 99)
    assert len(many) == 63 and "replayed/g00, g63" in many


def test_an_image_brings_its_twin_with_it():
    """Of several, one; whoever has none comes alone, and images are hardly more than without."""
    alone = replayed(2, "replay")
    real, generated = ([i for i, sample in enumerate(alone.samples) if sample.label == k] for k in (0, 1))
    pairs = np.array([(real[0], generated[0]), (real[0], generated[1]), (real[4], generated[5])])
    update = dataclasses.replace(alone, pairs=pairs)
    seen = set()
    for step in range(60):
        units = update.draw(step, 6)["replayed"]
        assert units.shape[1] == 2 and 12 <= (units >= 0).sum() <= 13
        for unit in units.tolist():
            assert unit in pairs.tolist() or (unit[1] == -1 and unit[0] not in pairs)
            seen.add(tuple(unit))
    assert seen >= {tuple(pair) for pair in pairs.tolist()}
