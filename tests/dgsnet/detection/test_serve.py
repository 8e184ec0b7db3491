"""The page in a real browser and its API under a real server: predict's scores, and no more than allowed."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys

import httpx
import numpy as np
import psutil
import pytest
from dgsnet.cli import main
from dgsnet.data.declared import Declared
from dgsnet.data.images import read_image
from dgsnet.detection.decisions import save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.heatmaps import draw, heatmap
from dgsnet.detection.provenance import Provenance, ProvenanceReader
from dgsnet.detection.serve import RateLimit, create_app
from fastapi.testclient import TestClient
from PIL import Image

from tests.support.credentials import Authority, signed
from tests.support.tiny import save_tiny

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LIMIT = 2**16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    maker = Authority().signer("<b>Maker</b>")
    (folder / "2.png").write_bytes(signed((folder / "2.png").read_bytes(), maker))
    return folder


@pytest.fixture(scope="module")
def detector(run):
    return Detector.load(run, device="cpu")


@pytest.fixture
def client(detector):
    return TestClient(
        create_app(detector, max_bytes=LIMIT), base_url="http://localhost", raise_server_exceptions=True
    )


@pytest.fixture(scope="module")
def url(run):
    """The command itself, on a free port."""
    command = [sys.executable, "-m", "dgsnet", "serve", "--model", run, "--port", "0", "--device", "cpu"]
    command.append("--provenance")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


def test_scores_are_those_of_predict(url, images, detector):
    for path in sorted(images.glob("*.png")):
        answer = httpx.post(f"{url}/api/score", params={"name": "a b.png"}, content=path.read_bytes())
        assert answer.status_code == 200, answer.text
        row = answer.json()
        expected = round(float(detector.predict(path)[0]), 6)
        assert row["probability"] == pytest.approx(expected, abs=2e-6)
        assert row["decision"] == detector.decide(row["probability"])[0]
        assert (row["name"], row["height"]) == ("a b.png", 40)
    assert httpx.get(f"{url}/api/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/api/model").json()["calibrated"] is False
    assert "/api/heatmap" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_heatmaps_are_those_of_predict(client, images, detector):
    data = (images / "0.png").read_bytes()
    answer = client.post("/api/heatmap", content=data)
    assert answer.headers["content-type"] == "image/png"
    expected = io.BytesIO()
    image = read_image(data)
    draw(heatmap(detector, image), image).savefig(expected, format="png")
    np.testing.assert_array_equal(Image.open(io.BytesIO(answer.content)), Image.open(expected))


def test_a_calibrated_model_decides_by_its_calibration(run, images, tmp_path):
    from dgsnet.detection.decisions import calibrate

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rng = np.random.default_rng(0)
    calibration = calibrate(rng.normal(40, 3, 500), rng.normal(44, 3, 300), fpr=0.05, miss_rate=0.1)
    save_calibration(copy, calibration)
    client = TestClient(create_app(Detector.load(copy, device="cpu")), base_url="http://localhost")
    row = client.post("/api/score", content=(images / "0.png").read_bytes()).json()
    assert row["decision"] == "real"
    facts = client.get("/api/model").json()
    shown = ("threshold", "low", "fpr", "fpr_upper", "confidence", "n_reals", "n_generated")
    values = {name: getattr(calibration, name) for name in shown}
    assert facts["calibrated"] and {name: facts[name] for name in shown} == values
    # None of the values could stand for another.
    assert len({*values.values()}) == len(shown)
    page = client.get("/").text
    assert "not calibrated" not in page and "500 it was" in page
    assert f"at most {100 * calibration.fpr_upper:.2g}% are called so" in page


def test_copies_and_credentials_where_they_are_asked_for(detector, images, client):
    data = (images / "2.png").read_bytes()
    plain = client.post("/api/score?name=2.png", content=data).json()
    assert plain.keys() == {"name", "probability", "decision", "width", "height"}
    with ProvenanceReader() as read:
        app = create_app(detector, consistency=True, provenance=read, declared=True)
        row = TestClient(app, base_url="http://localhost").post("/api/score?name=2.png", content=data).json()
        facts = TestClient(app, base_url="http://localhost").get("/api/model").json()
        assert {key: row.pop(key) for key in Provenance._fields} == read(data)._asdict()
    assert facts["consistency"] and facts["provenance"] and facts["declared"]
    assert {key: row.pop(key) for key in Declared._fields} == {"declared": "none", "declared_by": ""}
    assert "everybody\n  can write or remove it" in TestClient(app, base_url="http://localhost").get("/").text
    probabilities = detector.predict(images / "2.png", consistency=True)
    assert row.pop("spread") == pytest.approx(np.ptp(probabilities), abs=2e-6)
    assert row == plain | {"decision": detector.decide(probabilities)[0]}


@pytest.mark.parametrize("path", ["/api/score", "/api/heatmap"])
def test_what_is_no_image_is_an_error_in_one_line(client, images, path):
    for data in (b"", b"text", (images / "broken.jpg").read_bytes(), (images / "0.png").read_bytes()[:300]):
        answer = client.post(path, params={"name": "x.jpg"}, content=data)
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("x.jpg: ") and "\n" not in answer.json()["detail"]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(client):
    bomb = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(bomb, "png")
    assert (
        len(bomb.getvalue()) > LIMIT or client.post("/api/score", content=bomb.getvalue()).status_code == 422
    )
    small = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(small, "tiff", compression="group4")
    assert len(small.getvalue()) < LIMIT
    answer = client.post("/api/score", content=small.getvalue())
    assert answer.status_code == 422 and "pixels" in answer.json()["detail"]


def test_no_more_is_read_than_allowed(detector):
    """Neither of a body that says its length nor of one that does not."""
    import asyncio

    app = create_app(detector, max_bytes=LIMIT)
    sent = 0

    async def ask(headers):
        nonlocal sent
        sent, answers = 0, []

        async def receive():
            nonlocal sent
            sent += 1024
            return {"type": "http.request", "body": bytes(1024), "more_body": sent < 2**30}

        async def send(message):
            answers.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/api/score", "raw_path": b"/api/score", "query_string": b"",
            "headers": [(b"host", b"localhost"), *headers],
            "client": ("1.2.3.4", 1), "server": ("localhost", 80),
        }  # fmt: skip
        await app(scope, receive, send)
        return answers[0]["status"]

    assert asyncio.run(ask([])) == 413 and sent <= LIMIT + 2048
    assert asyncio.run(ask([(b"content-length", b"1073741824")])) == 413 and sent <= 2048


def test_other_sites_cannot_use_it(client, images):
    data = (images / "0.png").read_bytes()
    assert client.post("/api/score", content=data, headers={"Origin": "http://localhost"}).status_code == 200
    assert (
        client.post("/api/score", content=data, headers={"Origin": "http://evil.example"}).status_code == 403
    )
    assert client.post("/api/score", content=data, headers={"Origin": "null"}).status_code == 403
    # A name that somebody else's server resolves to this machine.
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    headers = client.get("/").headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_a_client_that_asks_too_often_waits(detector, images):
    client = TestClient(create_app(detector, per_minute=2), base_url="http://localhost")
    data = (images / "0.png").read_bytes()
    codes = [client.post("/api/score", content=data).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    answer = client.post("/api/score", content=data)
    assert (
        1 <= int(answer.headers["Retry-After"]) <= 30 and "2 requests per minute" in answer.json()["detail"]
    )
    assert client.get("/api/health").status_code == 200


def test_rates_are_of_each_client_and_recover():
    now = 0.0
    limit = RateLimit(60, clock=lambda: now)
    assert [limit("a") for _ in range(61)] == [0.0] * 60 + [1.0]
    assert limit("b") == 0
    now = 0.5
    assert limit("a") == pytest.approx(0.5)
    now = 1.5
    assert limit("a") == 0 and limit("a") > 0
    now = 1e6
    assert [limit("a") for _ in range(61)].count(0.0) == 60


def test_mistakes_are_told_in_one_line(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        before = psutil.Process().children()
        with pytest.raises(SystemExit) as exit:
            main(["serve", "--model", str(run), "--port", port, "--device", "cpu", "--provenance"])
        assert psutil.Process().children() == before
    error = capsys.readouterr().err
    assert exit.value.code == 2 and port in error and "--port" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["serve", "--model", str(run), "--per-minute", "0"])
    assert "--per-minute" in capsys.readouterr().err


def test_the_page_in_a_browser(url, images, detector, tmp_path):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect, sync_playwright

    axe = Axe()
    paths = [images / "0.png", images / "broken.jpg", images / "2.png"]
    # Browsers do not show TIFF.
    scan = tmp_path / "scan.tiff"
    Image.open(images / "1.png").save(scan)
    quiet = ("background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{x}" for x in quiet)]
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = own if os.path.exists(own) else next(filter(None, map(shutil.which, CHROMIUM)), None)
        if program is None:
            pytest.skip("no Chromium: python -m playwright install chromium, or Debian's package chromium")
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        assert axe.run(page).response["violations"] == []
        expect(page.get_by_text("This model is not calibrated")).to_be_visible()

        page.set_input_files("#files", paths[:2])
        # Dropped, not chosen: the same bytes in a DataTransfer.
        transfer = page.evaluate_handle(
            """bytes => { const data = new DataTransfer();
                 data.items.add(new File([new Uint8Array(bytes)], "2.png", {type: "image/png"}));
                 return data; }""",
            list(paths[2].read_bytes()),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})

        expect(page.locator("#status")).to_have_text("3 of 3 scored")
        items = page.locator("#results li")
        assert items.count() == 3
        for item, path in ((items.nth(0), paths[0]), (items.nth(2), paths[2])):
            probability = float(detector.predict(path)[0])
            decision = detector.decide(probability)[0]
            expect(item.locator(".name")).to_have_text(path.name)
            assert item.locator(".result").inner_text().startswith(f"{decision}, probability ")
            shown = float(item.locator(".result span").inner_text().removeprefix("probability "))
            assert shown == pytest.approx(probability, abs=2e-6)
            heat = item.locator("img.heat")
            expect(heat).to_be_visible()
            page.wait_for_function(
                "image => image.complete && image.naturalWidth > 300", arg=heat.element_handle()
            )
        # A stranger's words, shown as they are.
        unsigned, stranger = (items.nth(i).locator(".provenance").inner_text() for i in (0, 2))
        assert unsigned == "Content Credentials: absent"
        assert stranger.startswith("Content Credentials: unverified; said to be trainedAlgorithmicMedia; ")
        assert "<b>Maker</b>" in stranger
        assert "broken.jpg: " in items.nth(1).locator(".result").inner_text()
        assert items.nth(1).locator("img.heat").count() == 0

        # The server makes the thumbnail of what the browser cannot show.
        page.set_input_files("#files", scan)
        wide = "image => image.complete && image.naturalWidth == 51 && image.naturalHeight == 40"
        page.wait_for_function(wide, arg=items.nth(3).locator("img.thumb").element_handle())
        expect(items.nth(3).locator("img.heat")).to_be_visible()
        for colors in ("dark", "light"):
            page.emulate_media(color_scheme=colors)
            assert axe.run(page).response["violations"] == []

        # A refresh keeps all of it in the tab, and in no other one.
        page.wait_for_function("() => Object.values(sessionStorage)[0].split('\"heat\"').length == 4")
        shown = items.all_inner_texts()
        page.reload()
        assert items.all_inner_texts() == shown and len(shown) == 4
        expect(page.locator("#status")).to_have_text("4 of 4 scored")
        for picture in (items.nth(3).locator("img.thumb"), items.nth(0).locator("img.heat")):
            page.wait_for_function("image => image.naturalWidth > 50", arg=picture.element_handle())
        assert page.locator("img.heat").count() == 3 and items.nth(1).locator(".thumb").count() == 1
        other = browser.new_page()
        other.goto(url)
        assert other.locator("#results li").count() == 0

        page.get_by_role("button", name="Clear").click()
        page.reload()
        assert items.count() == 0
        # What the browser itself says of the answer 422 to the broken image, and nothing else.
        assert [text for text in problems if "422" not in text] == []
        browser.close()


def test_a_form_is_read_as_the_body_is(client, url, images):
    """As curl -F and browsers send it."""
    data = (images / "0.png").read_bytes()
    expected = client.post("/api/score?name=0.png", content=data).json()
    assert client.post("/api/score", files={"file": ("0.png", data)}).json() == expected
    named = client.post("/api/score?name=mine", files={"file": ("0.png", data)}, data={"more": "words"})
    assert named.json() == expected | {"name": "mine"}
    done = subprocess.run(
        ["curl", "-sS", "-F", f"file=@{images / '0.png'}", f"{url}/api/score"], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == expected | Provenance("absent")._asdict()


def test_a_form_that_is_none_is_refused_in_one_line(client, images):
    data = (images / "0.png").read_bytes()
    two = [("file", ("a.png", data)), ("file", ("b.png", data))]
    assert client.post("/api/score", files=two).json() == {"detail": "expected one file in the form, got 2"}
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content in (
        b"",
        data,
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data,
    ):
        answer = client.post("/api/score", content=content, headers=kind)
        assert answer.status_code == 400 and "form" in answer.json()["detail"]
    answer = client.post("/api/score", content=data, headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400 and "form" in answer.json()["detail"]
    assert client.post("/api/score", files={"file": bytes(LIMIT + 1)}).status_code == 413


def test_another_name_of_this_machine_is_refused_in_json(client):
    answer = client.get("/api/health", headers={"host": "evil.example:80"})
    assert answer.status_code == 400
    assert answer.json() == {"detail": "this page is not served as 'evil.example:80'"}
    assert client.get("/api/health", headers={"host": "[::1]:8000"}).status_code == 200
