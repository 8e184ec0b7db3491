"""Batches of one shape: an image's bits are its own, adapters merge exactly, and the size is chosen."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from dgsnet.config import Config, ModelConfig, PreprocessConfig
from dgsnet.detection.batches import Batches, best_size, fast_precision, ready
from dgsnet.detection.detector import Detector
from dgsnet.model.dgsnet import DGSNet

from tests.support import towers

PRECISIONS = ("fp32", "bf16")


def build(name: str) -> DGSNet:
    """A model with random weights whose adapters and heads are not at their initial zeros."""
    torch.manual_seed(0)
    model = DGSNet(ModelConfig(name=name, pretrained="", lora_rank=3), with_text=False).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.2)
    return model


def images(model: DGSNet, count: int, seed: int = 1) -> torch.Tensor:
    size = model.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["dgsnet-tiny", "ViT-B-32", *towers.NAMES])
def model(request, tmp_path_factory):
    towers.register(tmp_path_factory.mktemp("towers"))
    model = build(request.param)
    if request.param == "ViT-B-32":
        # Two of the twelve blocks are enough, of full width.
        model.visual.transformer.resblocks = model.visual.transformer.resblocks[:2]
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_are_the_images_own(model, precision):
    """Among any others, in any place of a batch, alone in one and across several."""
    size = 8
    score = Batches(ready(model, precision), size)
    assert score.size == size
    image, company = images(model, 1), images(model, 19, seed=2)
    (alone,) = score(image)
    for place in (0, 1, 6, 7, 8, 18, 19):
        among = torch.cat([company[:place], image, company[place:]])
        assert score(among)[place] == alone
    assert len(set(score(company).tolist())) == 19


def test_adapters_are_merged_in_the_widest_type_and_rounded_once(model):
    pixels = images(model, 3)
    with torch.inference_mode():
        want = model.double().logits(pixels.double())
        merged = model.merged(torch.float64).logits(pixels.double())
        model.float()
        torch.testing.assert_close(merged, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            Batches(ready(model, "fp32"), 2)(pixels).double(), want, rtol=1e-4, atol=1e-4
        )


def test_a_copy_leaves_the_model_as_it_is_and_shares_what_it_can(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert before.keys() == model.state_dict().keys() and any("lora_A" in name for name in before)
    copies = ready(model, "fp32"), ready(model, "bf16")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    own = {tensor.data_ptr() for tensor in model.parameters()}
    shared = [p.data_ptr() in own for p in copies[0].visual.parameters()]
    assert sum(shared) > len(shared) / 2
    assert all(p.dtype == torch.bfloat16 for p in copies[1].visual.parameters())
    assert copies[1].head.image_head.weight.dtype == torch.float32


def test_the_teacher_is_the_tower_without_adapters(model):
    pixels = images(model, 3)
    with torch.inference_mode():
        want = model.teacher_logits(pixels)
        torch.testing.assert_close(model.merged(torch.float32, teacher=True).logits(pixels), want)


class Mixing(DGSNet):
    """A model that tells images of a batch from each other."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(ModelConfig(name="dgsnet-tiny", pretrained=""), with_text=False)
        embed = self.backbone.embed

        def mixed(pixels):
            tokens, contexts = embed(pixels)
            return tokens + 1e-3 * tokens.mean(dim=0), contexts

        self.backbone.embed = mixed


def test_where_company_shows_images_are_scored_alone():
    model = Mixing().eval()
    score = Batches(model, 4)
    pixels = images(model, 3)
    assert score.size == 1 and torch.equal(score(pixels)[1:2], score(pixels[1:2]))
    assert best_size(model)[0] == 1
    detector = Detector(model, Config(), batch=4)
    with pytest.warns(UserWarning, match="in batches of 4 .* on cpu: images are scored one by one"):
        assert torch.equal(detector.logits(pixels), score(pixels))


def test_the_smallest_size_near_the_best_rate_is_taken(monkeypatch):
    """By times that stand for a machine's: a batch of 8 is nearly as fast as one of 16 or 32."""
    from dgsnet.detection import batches

    rates = {1: 10.0, 2: 15.0, 4: 30.0, 8: 46.0, 16: 50.0, 32: 49.0, 64: 48.0}
    tried = []

    def seconds(score, pixels):
        tried.append(score.size)
        return score.size / rates[score.size]

    monkeypatch.setattr(batches, "_seconds", seconds)
    model = ready(build("dgsnet-tiny"), "fp32")
    size, found = best_size(model)
    assert size == 8 and found == pytest.approx(rates)
    # A batch of 4 is so slow that no larger one is tried.
    rates[4] = 2.0
    monkeypatch.setattr(batches, "PATIENCE", 1.5)
    tried.clear()
    assert best_size(model)[0] == 2 and set(tried) == {1, 2, 4}


class HeldUp(torch.nn.Module):
    """Works a little longer for each image, and is kept from it in large batches."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def logits(self, pixels):
        if len(pixels) > 2:
            time.sleep(0.02)
        end = time.thread_time() + 3e-3 + 1e-4 * len(pixels)
        while time.thread_time() < end:
            pass
        return pixels.mean((1, 2, 3))


def test_other_work_of_the_machine_does_not_make_batches_small():
    assert best_size(HeldUp())[0] >= 16


def test_the_precision_is_what_the_device_is_fast_in(monkeypatch):
    for units, want in (
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units, raising=False)
        assert fast_precision(torch.device("cpu")) == want
    assert fast_precision(torch.device("mps")) == "fp32"


class Noting(torch.nn.Module):
    """Does something with every batch, and notes in which thread and by how many of torch's."""

    image_size = 8

    def __init__(self, work) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.work, self.seen = work, []

    def logits(self, pixels):
        self.seen.append((threading.current_thread(), torch.get_num_threads()))
        self.work()
        return pixels.mean((1, 2, 3)) * self.weight


def noting(work=lambda: None) -> tuple[Noting, Detector]:
    model = Noting(work)
    return model, Detector(model, Config(preprocess=PreprocessConfig(mode="crop", image_size=8)))


def greys(count: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), 255 * i // count, np.uint8) for i in range(count)]


@pytest.fixture(params=[2, 4])
def few_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_two_batches_are_under_way_on_a_processor(few_threads):
    together = threading.Barrier(2, timeout=20)
    model, detector = noting(together.wait)
    scores = detector.predict(greys(6), workers=0)
    assert len(model.seen) == 6 and not together.broken
    assert [*scores] == sorted(scores) and len({*scores}) == 6
    # By as many threads as the caller's, also where that changes: they decide a score's bits.
    assert {threads for _, threads in model.seen} == {few_threads}
    torch.set_num_threads(3)
    again = detector.predict(greys(6), workers=0)
    assert {threads for _, threads in model.seen[6:]} == {3} and torch.get_num_threads() == 3
    assert np.array_equal(again, scores)


@pytest.mark.parametrize("threads", [1, 5])
def test_one_batch_where_threads_are_one_or_many(few_threads, threads):
    torch.set_num_threads(threads)
    model, detector = noting()
    detector.predict(greys(3), workers=0)
    assert model.seen == [(threading.current_thread(), threads)] * 3


def test_what_a_batch_raises_reaches_the_caller(few_threads):
    def broken() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        noting(broken)[1].predict(greys(6), workers=0)


def test_who_stops_early_leaves_the_other_batches_out(few_threads):
    model, detector = noting(lambda: time.sleep(0.05))
    rows = detector.stream(greys(40), workers=0)
    next(rows)
    rows.close()
    begun = len(model.seen)
    time.sleep(0.2)
    assert len(model.seen) == begun <= 6


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_on_a_gpu_from_a_graph(precision):
    model = build("ViT-B-32").cuda()
    score = Batches(ready(model, precision), 16)
    assert score.size == 16
    pixels = images(model, 37)
    together = score(pixels)
    assert torch.equal(together.flip(0), score(pixels.flip(0)))
    assert torch.equal(together[20:21], score(pixels[20:21]))
