"""The page under several clients at a time, by real HTTP: a batch for many images, to each its own score."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from dgsnet.config import Config, PreprocessConfig
from dgsnet.data.images import read_image
from dgsnet.detection.detector import Detector, Prepared
from dgsnet.detection.heatmaps import heatmap
from dgsnet.detection.scoring import predict_command
from dgsnet.detection.serve import create_app

from benchmarks.page import head, serving
from tests.support.tables import read_csv

BATCH = 4
# In which company changes what is seen in six decimals, where batches are not of one shape.
HOW = {"batch": BATCH, "precision": "bf16"}


@pytest.fixture(scope="module")
def detector(run):
    return Detector.load(run, device="cpu", **HOW)


@pytest.fixture(scope="module")
def expected(run, images, tmp_path_factory):
    """Probabilities by file name, as predict writes them."""
    out = tmp_path_factory.mktemp("predict") / "scores.csv"
    predict_command([f"{images}/[0-3]*.png"], run, str(out), workers=0, **HOW)
    return {row["path"].rpartition("/")[2]: float(row["probability"]) for row in read_csv(out)}


class Held:
    """Notes how many images the model is given at a time, and keeps it until it is let go.

    Args:
        monkeypatch: takes the watching away again.

    Attributes:
        sizes: images of each call of the model.
        prepared: how many images are prepared; most_at_a_time: how many of them at the same time.
        failing: the views of an image at which the model fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.prepared, self.most_at_a_time, self._at_a_time = 0, 0, 0
        self.go, self.failing = threading.Event(), None
        counting = threading.Lock()
        mean_logits, prepare = Detector.mean_logits, Prepared.part

        def scored(detector, views):
            self.sizes.append(len(views))
            assert self.go.wait(20)
            if any(self.failing is not None and np.array_equal(one, self.failing) for one in views):
                raise RuntimeError("planted")
            return mean_logits(detector, views)

        def prepared(dataset, image):
            with counting:
                self._at_a_time += 1
                self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
            try:
                return prepare(dataset, image)
            finally:
                with counting:
                    self._at_a_time -= 1
                    self.prepared += 1

        monkeypatch.setattr(Detector, "mean_logits", scored)
        monkeypatch.setattr(Prepared, "part", prepared)

    def wait(self, prepared: int) -> None:
        """Until so many images are prepared, and one of them is at the model."""
        until = time.monotonic() + 10
        while self.prepared < prepared or not self.sizes:
            assert time.monotonic() < until
            time.sleep(0.002)


def ask(port: int, data: bytes, kind: str = "score") -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{port}/api/{kind}", content=data, timeout=60)


def test_what_comes_while_the_model_works_is_scored_together(detector, images, expected, monkeypatch):
    """Beside one that cannot be read, one at which the model fails and one whose client has gone."""
    names = sorted(expected)[:10]
    held = Held(monkeypatch)
    held.failing = Prepared(detector.preprocess, 1).part(read_image(images / names[6]))[0][0]
    held.prepared = 0
    with serving(create_app(detector)) as port, ThreadPoolExecutor(16) as clients:
        answers = {names[0]: clients.submit(ask, port, (images / names[0]).read_bytes())}
        held.wait(1)
        # The clients come in this order.
        for count, name in enumerate(names[1:], 2):
            if name == names[3]:
                data = (images / name).read_bytes()
                with socket.create_connection(("127.0.0.1", port)) as gone:
                    gone.sendall(head(len(data)) + data)
                    held.wait(count)
            else:
                answers[name] = clients.submit(ask, port, (images / name).read_bytes())
                held.wait(count)
        broken = clients.submit(ask, port, b"no image").result()
        assert broken.status_code == 422 and held.sizes == [1]
        held.go.set()
        found = {name: answer.result() for name, answer in answers.items()}
    assert {name: answer.status_code for name, answer in found.items() if answer.status_code != 200} == {
        names[6]: 500
    }
    del found[names[6]]
    assert {name: answer.json()["probability"] for name, answer in found.items()} == {
        name: expected[name] for name in found
    }
    # Where four fail, the first of them is tried by itself, and the others come next.
    assert held.sizes == [1, 4, 4, 1, 4, 1, 3]
    assert held.most_at_a_time == 1


@pytest.mark.parametrize(
    "settings", [{}, {"views": 2, "consistency": True, "crops": "tiles"}], ids=["plain", "copies"]
)
def test_scores_are_those_of_predict_in_any_company(run, images, expected, settings, tmp_path):
    """Of many clients at once, beside heatmaps, which are those of Python too."""
    consistency, how = settings.get("consistency", False), HOW | settings
    how.pop("consistency", None)
    detector = Detector.load(run, device="cpu", **how)
    names = sorted(expected)[: 24 if not settings else 8]
    if settings:
        paths = [str(images / name) for name in names]
        predict_command(paths, run, str(tmp_path / "s.csv"), workers=0, **HOW, **settings)
        expected = {
            row["path"].rpartition("/")[2]: (float(row["probability"]), float(row["spread"]))
            for row in read_csv(tmp_path / "s.csv")
        }
    app = create_app(detector, consistency=consistency, per_minute=10_000)
    image = (images / names[0]).read_bytes()
    alone = heatmap(detector, read_image(image))
    with serving(app) as port, ThreadPoolExecutor(12) as clients:
        pictures = [clients.submit(ask, port, image, "heatmap") for _ in range(2)]
        found = dict(zip(names, clients.map(lambda name: ask(port, (images / name).read_bytes()), names)))
        beside = heatmap(detector, read_image(image))
        assert len({picture.result().content for picture in pictures}) == 1
    rows = {name: answer.json() for name, answer in found.items()}
    scores = {name: row["probability"] for name, row in rows.items()}
    if consistency:
        scores = {name: (score, rows[name]["spread"]) for name, score in scores.items()}
    assert scores == {name: expected[name] for name in names}
    np.testing.assert_array_equal(beside.contributions, alone.contributions)


class Private(torch.nn.Module):
    """Stands where a network would, and fails where it is called more often at a time: logits are means."""

    image_size = 32

    def __init__(self, at_a_time: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.works = threading.Semaphore(at_a_time)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.works.acquire(blocking=False)
        time.sleep(0.002)
        found = self.scale * pixels.mean((1, 2, 3))
        self.works.release()
        return found


@pytest.mark.parametrize(("cores", "at_a_time"), [(1, 1), (2, 2)])
def test_threads_take_turns_at_the_model(monkeypatch, cores, at_a_time):
    """As its one graph on a GPU needs, which has one place for what goes in and one for what comes out."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    config = Config(preprocess=PreprocessConfig(mode="crop", image_size=32))
    detector = Detector(Private(at_a_time).eval(), config, batch=2)
    pixels = torch.randn(12, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = [detector.logits(three) for three in pixels]
    with ThreadPoolExecutor(6) as threads:
        for one, other in zip(threads.map(detector.logits, pixels), alone, strict=True):
            assert torch.equal(one, other)


def test_no_more_requests_are_kept_waiting_than_allowed(detector, images, expected, monkeypatch):
    held = Held(monkeypatch)
    name = sorted(expected)[0]
    data = (images / name).read_bytes()
    with serving(create_app(detector)) as port, ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(ask, port, data) for _ in range(33)]
        held.wait(33)
        refused = ask(port, data)
        held.go.set()
        found = [answer.result() for answer in answers]
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert "too many images are waiting" in refused.json()["detail"]
    assert [answer.json()["probability"] for answer in found] == [expected[name]] * 33
    assert held.sizes == [1, *[BATCH] * 8] and held.most_at_a_time == 1
