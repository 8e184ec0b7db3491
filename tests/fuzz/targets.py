"""What is fuzzed: good files, how they are changed, and what reads them as the commands and the page do."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pyarrow as pa
import pyarrow.parquet as pq
from dgsnet.audit.audit import audit, document
from dgsnet.audit.audit import load_model as load_audit
from dgsnet.data.captions import CAPTIONS_FILE, attach_captions
from dgsnet.data.declared import read_declared
from dgsnet.data.images import ImageError, file_hash, read_image
from dgsnet.data.items import Item, find_items, find_samples
from dgsnet.data.nuisances import file_nuisances
from dgsnet.data.pairs import TWINS_FILE, attach_twins, find_pairs
from dgsnet.data.tables import Table
from dgsnet.detection.decisions import calibrate, decide, load_calibration, save_calibration
from dgsnet.detection.detector import Detector
from dgsnet.detection.monitor import MONITOR_FILE, alarmed, monitor
from dgsnet.detection.scoring import predict_command
from dgsnet.detection.serve import create_app
from dgsnet.errors import UserError
from dgsnet.evaluation.score_tables import ScoreTable, evaluate_table, samples_of
from dgsnet.model.checkpoint import read_extra, trained_on
from PIL import Image

from benchmarks.page import serving
from tests.fuzz.changes import changed_any, changed_bytes, changed_header, changed_numbers
from tests.fuzz.runs import runs
from tests.fuzz.target import Change, Target
from tests.support.declarations import (
    EXIF_CONTAINERS,
    XMP_CONTAINERS,
    comment,
    source_type,
    with_exif,
    with_text,
    with_xmp,
)
from tests.support.pictures import encode, grid, picture
from tests.support.tiny import CROP, save_noise, save_tiny

WEIGHTS = "adapters.safetensors"
SCORES = b"path,score,label,source,category,generator\n" + b"".join(
    f"{i}.png,{i - 9.5},{'real' if i < 12 else 1},press,night,\n".encode() for i in range(20)
)


@contextlib.contextmanager
def targets(folder: Path) -> Iterator[list[Target]]:
    """All of them; files that they need are written into a folder, and a page is served."""
    model = save_tiny(folder, CROP)
    with serving(create_app(Detector.load(model, device="cpu"), per_minute=10**9)) as port:
        yield [*images(), *containers(folder), *metadata(model), *runs(folder, model), page(port)]


def images() -> list[Target]:
    """Files of every format through the checks and the road that decodes them."""
    pixels, exif = picture(40, 56), Image.Exif()
    exif[0x112], exif[0x10F] = 6, "camera" * 9
    more = {"save_all": True, "append_images": [Image.fromarray(255 - pixels)]}
    seeds = [
        *(encode(pixels, format) for format in ("AVIF", "BMP", "HEIF", "JPEG2000", "PPM", "TIFF")),
        *(encode(pixels, format, **more) for format in ("GIF", "PNG", "WEBP", "TIFF")),
        *(encode(pixels, format, exif=exif) for format in ("JPEG", "PNG", "TIFF", "WEBP")),
        encode(pixels, "JPEG", progressive=True),
        *(encode(pixels, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")),
        *(
            grid(encode(Image.new("RGB", (64, 64), "red"), kind), 2, 3, (150, 120))
            for kind in ("HEIF", "AVIF")
        ),
    ]

    def read(data: bytes) -> None:
        found = read_image(data)
        assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8
        assert np.isfinite(file_nuisances(data)).all()

    declaring = [with_xmp(source_type("digitalCapture"), container) for container in XMP_CONTAINERS]
    declaring += [with_exif({271: "camera", "comment": comment("{}")}, kind) for kind in EXIF_CONTAINERS]
    graph = '{"3": {"type": 5}}'
    declaring += [with_text(kind, kind != "tEXt", prompt=graph) for kind in ("tEXt", "zTXt", "iTXt")]

    def read_labels(data: bytes) -> None:
        found = read_declared(data)
        assert found.declared in ("generated", "partly", "captured", "none", "")
        assert len(found.declared_by) < 2000 and "\n" not in found.declared_by

    return [
        Target("images", seeds, changed_headers, read),
        Target("declared", declaring, changed_headers, read_labels),
    ]


def changed_headers(data: bytes, rng: random.Random) -> bytes:
    """Some changes, half of them in the first 200 bytes, where they do most."""
    for _ in range(rng.randrange(1, 6)):
        cut = 200 if rng.random() < 0.5 else len(data)
        data = (changed_bytes(data[:cut], rng) + data[cut:]) or b"\0"
    return data


def containers(folder: Path) -> list[Target]:
    """Archives, tables and lists, read as `predict` and `train` read them."""
    file = encode(picture(20, 30), "PNG")
    (folder / "a.png").write_bytes(file)
    archive, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in {"a.png": file, "a.cls": b"1", "a.txt": b"a cat", "a.json": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    columns = {"image": [file] * 3, "label": [0, 1, 1], "prompt": ["a", None, "c"]}
    pq.write_table(pa.table(columns), table, compression="zstd")
    row = {"path": "a.png", "label": 1, "caption": "a cat", "twin": "a.png", "category": "night"}
    listed = ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n"

    def read(name: str) -> Callable[[bytes], None]:
        def from_file(data: bytes) -> None:
            path = folder / name
            path.write_bytes(data)
            for find in (find_items, lambda paths: find_samples(paths[0])):
                with contextlib.suppress(UserError):
                    for item in itertools.islice(find([str(path)]), 20):
                        with contextlib.suppress(ImageError):
                            item.read_bytes()

        return from_file

    def read_table(data: bytes) -> None:
        path = folder / "t.csv.partial"
        path.write_bytes(data)
        with Table(path, {"a": 1, "b": [2, None]}, ("path", "score"), resume=True) as table:
            list(table.rows())

    pairs = folder / "pairs"
    for name in ("0_real", "1_fake"):
        (pairs / name).mkdir(parents=True)
        (pairs / name / "a.png").write_bytes(file)
    samples = find_samples(pairs)

    def read_twins(data: bytes) -> None:
        (pairs / TWINS_FILE).write_bytes(data)
        find_pairs(attach_twins(samples, pairs))

    twins = [b"path,twin,by\n0_real/a.png,1_fake/a.png,x\n", b"by,twin,path\nx,1_fake/a.png,0_real/a.png\n"]
    rows = b'{"a": 1, "b": [2, null]}\n{"path": "a.png", "score": 0.25}\n{"path": "b", "score": null}\n'
    return [
        Target("tar", [archive.getvalue()], changed_headers, read("t.tar")),
        Target("parquet", [table.getvalue()], changed_headers, read("t.parquet"), seconds=2.0),
        Target("list.csv", [listed.encode()], changed_bytes, read("l.csv")),
        Target("list.json", [json.dumps([row]).encode()], changed_any, read("l.json")),
        Target("list.txt", [b"a.png\n"], changed_bytes, read("l.txt")),
        Target("twins.csv", twins, changed_bytes, read_twins),
        Target("unfinished table", [rows], changed_bytes, read_table),
    ]


def metadata(model: Path) -> list[Target]:
    """What commands find in folders: of models, audits and captions."""
    folder, rng = model / "best", np.random.default_rng(0)
    sources = {"a": rng.normal(-1, 1, 300), "b": rng.normal(-2, 1, 200)}
    save_calibration(folder, calibrate(sources, rng.normal(1, 1, 300), fpr=0.05))
    np.save(folder / "training_images.npy", np.sort([file_hash(b"a"), 5, 2**40]))
    lines = ["path,decision,truth,source", 'a.png,real,real,"a b"', "=b,generated,real,x", "c,unsure,0,x", ""]
    (folder / "reviewed.csv").write_text("\n".join(lines))
    monitor(folder, folder / "reviewed.csv")
    samples = []
    for name in ("0_real", "1_fake"):
        (model / name).mkdir()
        samples += [Item(str(path), int(name[0])) for path in sorted(save_noise(model / name, 12).iterdir())]
    audited = json.dumps(document(audit(samples))).encode()
    captions = json.dumps({"0_real/00.png": "a cat", "1_fake/00.png": "a dog"}).encode()

    config = json.loads((folder / "config.json").read_bytes())
    described = json.dumps({name: config[name] for name in ("model", "preprocess")}).encode()

    def load(folder: Path) -> None:
        Detector.load(folder, device="cpu")

    def read_calibration(folder: Path) -> None:
        load(folder)
        if found := load_calibration(folder):
            assert {*decide([0.0, 0.5, 1.0], found)} <= {"real", "unsure", "generated"}
            json.dumps(found.low, allow_nan=False)

    def read_score_table(folder: Path) -> None:
        """Whatever takes one, with a threshold of other scores."""
        table, rule = str(folder / "scores.csv"), folder / "rule"
        rule.mkdir(exist_ok=True)
        save_calibration(rule, calibrate(range(99), fpr=0.05, raw=True))
        (rule / MONITOR_FILE).unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            predict_command([table], str(rule), str(folder / "decided.csv"))
            evaluate_table(ScoreTable(table, str(rule)), {"": samples_of(table)}).mean()
            monitor(rule, scores=table)

    def read_reviewed(folder: Path) -> None:
        (folder / MONITOR_FILE).unlink(missing_ok=True)
        monitor(folder, folder / "reviewed.csv")

    def of(name: str, change: Change, read: Callable[[Path], object], seed: bytes = b"") -> Target:
        """A file that a folder has; what changes it leaves behind is put back."""
        path = folder / name
        kept = path.read_bytes() if path.exists() else b""

        def from_file(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(folder)
            finally:
                path.write_bytes(kept) if kept else path.unlink()

        return Target(name, [seed or kept], change, from_file)

    return [
        of("config.json", changed_any, load),
        of("detector.json", changed_any, load, described),
        of("calibration.json", changed_any, read_calibration),
        of("training_images.npy", changed_numbers, trained_on),
        of(WEIGHTS, changed_header, lambda folder: (read_extra(folder), load(folder))),
        of("monitor.json", changed_any, lambda _: alarmed(folder)),
        of("reviewed.csv", changed_bytes, read_reviewed),
        of("scores.csv", changed_bytes, read_score_table, SCORES),
        of("audit.json", changed_any, lambda folder: load_audit(folder / "audit.json"), audited),
        of(
            CAPTIONS_FILE,
            changed_any,
            lambda folder: attach_captions(samples, folder / CAPTIONS_FILE, model, partly=True),
            captions,
        ),
    ]


def page(port: int) -> Target:
    """Requests, as they come over the wire: an answer that is no fault of ours, or an end."""
    image = encode(picture(20, 30), "PNG")
    part = b'Content-Disposition: form-data; name="file"; filename="a.png"'
    form = b"--B\r\n%s\r\n\r\n%s\r\n--B--\r\n" % (part, image)
    where = "Host: localhost\r\nOrigin: http://localhost\r\nConnection: close\r\n"

    def request(path: str, body: bytes, kind: str = "image/png") -> bytes:
        head = f"POST {path} HTTP/1.1\r\n{where}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def ask(data: bytes) -> None:
        answer = b""
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        except OSError as error:
            # An OSError would pass for a refusal.
            raise AssertionError(f"the page is gone: {error}") from error
        assert not answer.startswith(b"HTTP/1.1 500"), answer[:300]

    seeds = [
        request("/api/score?name=a.png", image),
        request("/api/score", form, "multipart/form-data; boundary=B"),
        request("/api/thumbnail", image),
        f"GET / HTTP/1.1\r\n{where}\r\n".encode(),
    ]
    return Target("page", seeds, changed_headers, ask, seconds=5.0)


pillow_heif.register_heif_opener()
