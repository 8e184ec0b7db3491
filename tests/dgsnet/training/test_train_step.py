"""The yardstick of the training step: its official algorithm is the one the tests trust, and it runs."""

import copy
import json
import math
import sys
from dataclasses import replace
from multiprocessing import Pipe

import numpy as np
import open_clip
import pytest
import torch
from dgsnet.config import PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.data.preprocess import Preprocessor
from PIL import Image

from benchmarks import train_step, training_run
from benchmarks.__main__ import main as benchmarks
from tests.support import official
from tests.support.fresh import forked


@pytest.fixture
def settings(tmp_path):
    return train_step.Settings("dgsnet-tiny", 4, "cpu", 1, 64, str(tmp_path), 0)


def test_the_benchmarks_official_step_is_the_trusted_one(settings):
    torch.manual_seed(0)
    timed = train_step.Official(settings, dropout=0.0)
    adapters = {}
    for i, block in enumerate(timed.clip.visual.transformer.resblocks):
        for letter, a, b in zip("qkv", block.attn.lora_a, block.attn.lora_b):
            b.data.normal_(std=0.05)
            name = f"transformer.resblocks.{i}.attn.{letter}_proj.lora"
            adapters |= {f"{name}_A.weight": a, f"{name}_B.weight": b}
    lora = {name: p.detach().clone().requires_grad_() for name, p in adapters.items()}
    heads = copy.deepcopy(timed.heads)
    train_step.write_images(settings)
    paths, captions, labels = train_step.batch_of(settings, 0)
    pixels = timed.load(paths)
    timed.load = lambda _: pixels
    timed.step(paths, captions, labels)

    clips = [open_clip.create_model("dgsnet-tiny").requires_grad_(False) for _ in range(2)]
    for clip in clips:
        clip.load_state_dict(timed.frozen.state_dict())
    scaling = train_step.ALPHA / math.sqrt(train_step.RANK)
    tokens = timed.tokenizer(captions)
    official.step(*clips, lora, scaling, dict(heads), pixels, tokens, labels, order="align_first")
    for name, tensor in lora.items():
        torch.testing.assert_close(adapters[name].grad, tensor.grad, rtol=1e-3, atol=1e-6)
    for name in ("image", "text"):
        torch.testing.assert_close(timed.heads[name].weight.grad, heads[name].weight.grad)
    assert timed.heads["teacher"].weight.grad is None


def test_the_mosaic_in_numpy_holds_the_patches_that_ours_does(settings):
    train_step.write_images(settings)
    path = train_step.batch_of(settings, 0)[0][0]
    image = read_image(path)
    assert (np.asarray(Image.open(path)) == image).all()
    config = PreprocessConfig(image_size=32, num_patches=1, flip=False)
    ours = Preprocessor(config)(image).numpy()
    draws = [train_step.numpy_mosaic(image, 32, np.random.default_rng(i)) for i in range(8)]
    # Half of the draws are mirrored.
    assert any(abs(mosaic - ours).max() < 1e-5 for mosaic in draws)


def test_it_counts_the_work_of_a_step(settings):
    torch.manual_seed(0)
    train_step.write_images(settings)
    made = train_step.Ours(settings, precision="fp32")
    flop = train_step.answer(made, settings, "flop", 0)
    width, tokens, layers = 96, 65, 4
    forward = layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    # Student, teacher and the gradient of activations; adapters, patches and projection are small beside.
    assert flop == pytest.approx(3 * forward, rel=0.12)


@pytest.mark.slow
def test_the_command_times_variants_in_turns(tmp_path, monkeypatch, capsys):
    forked(train_step, monkeypatch)
    out, names = tmp_path / "result.json", [train_step.PUBLISHED, train_step.STORED]
    options = ["--model", "dgsnet-tiny", "--batch", "2", "--image", "64", "--seconds", "0", "--threads", "1"]
    words = ["benchmarks", "train_step", *options, "--device", "cpu", "--out", str(out), "--variants", *names]
    monkeypatch.setattr(sys, "argv", words)
    benchmarks()
    (result,) = json.loads(out.read_text())["results"]
    assert list(result["variants"]) == names
    for variant in result["variants"].values():
        assert variant["rounds"] >= train_step.MIN_ROUNDS and variant["images_per_second"] > 0
        assert variant["parts_s"]["student"] > 0 and variant["peak_bytes"] > 2**20
    assert train_step.table(result) in capsys.readouterr().out


@pytest.mark.parametrize("name", [training_run.IN_STEPS, training_run.ONCE, training_run.PLAIN])
def test_a_whole_run_is_timed(tmp_path, name):
    training_run.write_images(tmp_path, 4)
    config = training_run.configurations(tmp_path, "dgsnet-tiny", 2, 0)[name]
    config = replace(config, preprocess=PreprocessConfig(mode="crop", image_size=32))
    ours, theirs = Pipe()
    training_run.time_of(config, torch.get_num_threads(), theirs)
    taken = ours.recv()
    assert taken["s"] > 0 and taken["cpu_s"] > 0
