"""The page under clients that mean no good: slow, silent, many, gone, or with requests that are none."""

import contextlib
import io
import logging
import select
import socket
import tempfile
import time

import httpx
import pytest
from dgsnet.detection import connections, uploads
from dgsnet.detection.detector import Detector
from dgsnet.detection.serve import create_app
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks.page import head, measure, serving
from tests.support.pictures import encode, picture

IMAGE = encode(picture(40, 50), "PNG")
LIMIT = 2**22


@pytest.fixture(scope="module")
def detector(run):
    return Detector.load(run, device="cpu")


@pytest.fixture
def client(detector):
    return TestClient(create_app(detector, max_bytes=LIMIT), base_url="http://localhost")


@pytest.mark.parametrize("name", ["[::1", "a[b", "\u2100".encode().decode("latin-1"), ""])
def test_a_host_or_origin_that_is_none_is_a_bad_request(client, name):
    answer = client.get("/api/health", headers={"host": name.encode("latin-1")})
    assert answer.status_code == 400 and "\n" not in answer.json()["detail"]
    origin = f"http://{name}".encode("latin-1")
    answer = client.post("/api/score", content=IMAGE, headers={"origin": origin})
    assert answer.status_code in (400, 403) and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert (answer.status_code == 400) == ("[" in name)


@pytest.mark.parametrize("kind", ["multipart/form-data", "Multipart/Form-Data", "MULTIPART/FORM-DATA"])
def test_media_types_are_the_same_in_capitals_and_names_need_not_be_text(client, kind):
    expected = client.post("/api/score?name=\ufffd.png", content=IMAGE).json()
    form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="\xff.png"\r\n\r\n%s\r\n--B--\r\n'
    answer = client.post("/api/score", content=form % IMAGE, headers={"content-type": f"{kind}; boundary=B"})
    assert answer.status_code == 200 and answer.json() == expected


def test_a_form_of_very_many_parts_is_left_at_the_first(client):
    part = b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n'
    kind = {"content-type": "multipart/form-data; boundary=B"}
    for name in (b"a", b'f"; filename="a'):
        begin = time.monotonic()
        answer = client.post("/api/score", content=part % name * 60_000 + b"--B--\r\n", headers=kind)
        assert answer.status_code == 400 and "more than 10 parts" in answer.json()["detail"]
        assert time.monotonic() - begin < 1


def test_without_room_for_a_body_the_answer_says_so(client, monkeypatch):
    large = encode(picture(300, 200), "BMP")
    assert client.post("/api/score", content=large).status_code == 200
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    answer = client.post("/api/score", content=large)
    assert answer.status_code == 503 and "no room for the image: No such file" in answer.json()["detail"]
    # A small image is not written.
    assert client.post("/api/score", content=IMAGE).status_code == 200


@pytest.mark.parametrize("kind", ["HEIF", "TIFF"])
def test_the_server_makes_thumbnails_of_what_browsers_do_not_show(client, kind):
    answer = client.post("/api/thumbnail?name=a", content=encode(picture(300, 400), kind))
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (224, 168)
    assert client.post("/api/thumbnail", content=b"none").status_code == 422


def test_whom_a_request_was_forwarded_for_does_not_pass_the_rate_limit(detector):
    with serving(create_app(detector, per_minute=2)) as port:
        codes = [
            httpx.post(
                f"http://127.0.0.1:{port}/api/score", content=IMAGE, headers={"X-Forwarded-For": f"1.2.3.{i}"}
            ).status_code
            for i in range(3)
        ]
    assert codes == [200, 200, 429]


def test_a_client_that_hangs_up_is_one_line(detector, caplog):
    """Within its body, and while it waits for its answer."""
    caplog.set_level(logging.INFO)
    with serving(create_app(detector)) as port:
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(head(1000) + bytes(10))
        for _ in range(500):
            if said := [record for record in caplog.records if record.levelno >= logging.WARNING]:
                break
            time.sleep(0.01)
        assert httpx.get(f"http://127.0.0.1:{port}/api/health").status_code == 200
    (line,) = said
    assert line.getMessage() == "127.0.0.1 hung up" and not line.exc_info


def test_a_body_that_comes_in_drops_is_given_up(detector, monkeypatch):
    """Drops do not put off the end: only so many bytes as a slow line has do."""
    monkeypatch.setattr(uploads, "RATE_SECONDS", 0.5)
    monkeypatch.setattr(uploads, "RATE_BYTES", 100)
    with serving(create_app(detector)) as port:
        with socket.create_connection(("127.0.0.1", port)) as drops:
            drops.sendall(head(10_000))
            begin = time.monotonic()
            while time.monotonic() - begin < 5 and not select.select([drops], [], [], 0.05)[0]:
                drops.sendall(b"x")
            answer = drops.recv(100)
        assert b"408" in answer and time.monotonic() - begin < 3
        with socket.create_connection(("127.0.0.1", port)) as steady:
            steady.sendall(head(len(IMAGE) + 2000))
            for _ in range(20):
                # The client sends as many bytes in each interval, for longer than one.
                steady.sendall(bytes(100))
                time.sleep(0.05)
            steady.sendall(IMAGE)
            # These bytes are no image.
            assert b"422" in steady.recv(100)


def test_the_latest_of_too_many_connections_are_served(detector):
    with contextlib.ExitStack() as stack, serving(create_app(detector)) as port:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(420)
        ]
        assert httpx.get(f"http://127.0.0.1:{port}/api/health").status_code == 200
        # These connections were waited for longest.
        for connection in idle[:36]:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        idle[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            idle[-1].recv(1)


def test_slow_clients_cost_ordinary_ones_little_and_no_memory(detector, monkeypatch):
    """200 of them; what they send would be 480 MiB, and none waits for its end, which comes sooner here."""
    assert connections.WAIT_SECONDS == uploads.RATE_SECONDS == 10.0
    monkeypatch.setattr(connections, "WAIT_SECONDS", 3.0)
    monkeypatch.setattr(uploads, "RATE_SECONDS", 3.0)
    monkeypatch.setattr(uploads, "RATE_BYTES", uploads.RATE_BYTES * 3 // 10)
    found = measure(detector, IMAGE, LIMIT, (120, 50, 30), rounds=2)
    assert found["ratio"] < 4 and found["more_mib"] < 300, found
    assert found["ended"] == found["slow"] == 200 and found["longest_s"] < 15, found
