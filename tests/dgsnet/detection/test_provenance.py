"""Content Credentials: what is signed and unchanged, what was tampered with, stripped or a look-alike."""

import csv
import datetime
import http.server
import io
import json
import os
import threading
import time
import zlib

import numpy as np
import pytest
from dgsnet.cli import main
from dgsnet.data.images import read_image
from dgsnet.detection import provenance
from dgsnet.detection.provenance import Provenance, ProvenanceReader
from dgsnet.errors import UserError
from PIL import Image

from tests.support.credentials import Authority, picture, signed
from tests.support.pictures import encode
from tests.support.tables import interrupted

KNOWN, STRANGE = Authority(), Authority("Another Authority")
# The type of a box that holds credentials, and of one that holds a panorama's angles.
C2PA = bytes.fromhex("63327061 0011 0010 8000 00aa00389b71")
PANORAMA = bytes.fromhex("785f3822 13ac 4dd0 9abf 63f3d4bf8b3f")


@pytest.fixture(scope="module")
def trust(tmp_path_factory):
    path = tmp_path_factory.mktemp("trust") / "anchors.pem"
    path.write_text(f"What we trust.\n{Authority('A third').pem}{KNOWN.pem}")
    return path


@pytest.fixture(scope="module")
def read(trust):
    with ProvenanceReader(trust) as reader:
        yield reader


@pytest.fixture(scope="module")
def photograph():
    """A signed JPEG file."""
    return signed(picture(), KNOWN.signer())


def flipped(data, at):
    """With one bit changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF", "HEIF"])
def test_who_signed_and_whether_we_trust_them(read, kind):
    data = picture(kind)
    assert read(data) == Provenance("absent")
    assert read(signed(data, KNOWN.signer())) == Provenance(
        "verified", "Camera Maker", "trainedAlgorithmicMedia"
    )
    # Anybody can make certificates in any name: it is no issuer, and the note says whose it would be.
    assert read(signed(data, STRANGE.signer())) == Provenance(
        "unverified",
        "",
        "trainedAlgorithmicMedia",
        "signed in the name of 'Camera Maker' by a certificate that is not trusted",
    )


def test_without_anchors_nobody_is_trusted(photograph):
    with ProvenanceReader() as read:
        assert read(photograph).provenance == "unverified"


def test_a_source_type_is_the_signers_own_word(read, photograph):
    capture = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    assert read(signed(picture(), KNOWN.signer(), source_type=capture)).source_type == "digitalCapture"
    # Nobody vouches for what an edited image says of itself, not even for its being unchanged.
    at = photograph.index(b"trainedAlgorithmicMedia")
    # The library may report the two in either order.
    for parent in (photograph, flipped(photograph, at)) * 8:
        edited = signed(parent, KNOWN.signer("Editor"), edited=True)
        assert b"AlgorithmicMedia" in edited
        assert read(edited) == Provenance("verified", "Editor")


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("pixels", "assertion.dataHash.mismatch"),
        ("claim", "claimSignature.mismatch"),
        ("assertion", "assertion.hashedURI.mismatch"),
        ("certificate", "claimSignature.mismatch"),
        ("end", "assertion.dataHash.mismatch"),
    ],
)
def test_what_was_tampered_with_is_invalid(read, photograph, what, code):
    tampered = {
        "pixels": lambda: flipped(photograph, len(photograph) - 100),
        "claim": lambda: flipped(photograph, photograph.index(b"maker of tests")),
        "assertion": lambda: flipped(photograph, photograph.index(b"trainedAlgorithmicMedia")),
        "certificate": lambda: flipped(photograph, photograph.index(b"Camera Maker")),
        "end": lambda: photograph + b"more",
    }[what]()
    found = read(tampered)
    assert (found.provenance, found.issuer, found.source_type) == ("invalid", "", "")
    assert code in found.provenance_note.split(", ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_change_of_the_pixels_goes_unnoticed(read, kind):
    """Whatever byte is changed: what stays verified shows the same, as the padding of a signature does."""
    data = signed(picture(kind), KNOWN.signer())
    pixels = read_image(data)
    found = []
    for at in range(0, len(data), len(data) // 90):
        changed = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        found.append(read(changed).provenance)
        if found[-1] == "verified":
            np.testing.assert_array_equal(read_image(changed), pixels)
    assert {"invalid"} < {*found} <= {"verified", "invalid", "absent", ""}
    assert found.count("invalid") > 45


def test_a_file_that_the_library_cannot_search_is_absent(read):
    """It is an image to everybody else, and nothing in it looks like credentials."""
    data = picture("PNG")
    cut = data[: data.index(b"IEND") - 4]
    assert read_image(cut).shape == (40, 48, 3)
    assert read(cut) == Provenance("absent")


def test_credentials_of_another_image_are_invalid(read, photograph):
    def segments(data):
        """The segments of a JPEG file before its scan, by marker."""
        at = 2
        while data[at + 1] != 0xDA:
            length = int.from_bytes(data[at + 2 : at + 4], "big") + 2
            yield data[at + 1], data[at : at + length]
            at += length

    credentials = b"".join(segment for marker, segment in segments(photograph) if marker == 0xEB)
    assert b"c2pa" in credentials
    other = picture(seed=1)
    found = read(other[:2] + credentials + other[2:])
    assert found.provenance == "invalid" and "dataHash.mismatch" in found.provenance_note


def test_what_was_stripped_is_absent(read, photograph):
    file = io.BytesIO()
    with Image.open(io.BytesIO(photograph)) as image:
        image.save(file, "JPEG", quality=95)
    assert read(file.getvalue()) == Provenance("absent")


def box(kind, content):
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def superbox(kind, label, content=b""):
    """What holds credentials, and other things, in JPEG and PNG files."""
    return box(b"jumb", box(b"jumd", kind + b"\x03" + label + b"\0") + content)


def in_jpeg(content, marker=0xEB):
    data = picture()
    if marker == 0xEB:
        content = b"JP\x00\x01\x00\x00\x00\x01" + content
    return data[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def in_png(content, kind=b"caBX"):
    data = picture("PNG")
    chunk = len(content).to_bytes(4, "big") + kind + content
    return data[:33] + chunk + zlib.crc32(kind + content).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize(
    ("state", "data"),
    {
        "nothing in it": ("invalid", in_jpeg(superbox(C2PA, b"c2pa"))),
        "noise in it": ("invalid", in_jpeg(superbox(C2PA, b"c2pa", bytes(range(200))))),
        "nothing in a PNG's": ("invalid", in_png(superbox(C2PA, b"c2pa"))),
        "noise in a PNG's": ("invalid", in_png(b"c2pa" * 9)),
        "a panorama": ("absent", in_jpeg(superbox(PANORAMA, b"jp360", box(b"xml ", b"<a/>")))),
        "a label alone": ("absent", in_jpeg(superbox(PANORAMA, b"c2pa"))),
        "a comment": ("absent", in_jpeg(superbox(C2PA, b"c2pa"), marker=0xFE)),
        "text in a PNG": ("absent", in_png(b"c2pa\0verified", kind=b"tEXt")),
        "after the image": ("absent", picture() + signed(picture(), KNOWN.signer())),
    }.values(),
)
def test_what_only_looks_like_credentials(read, state, data):
    found = read(data)
    assert (found.provenance, found.issuer, found.source_type) == (state, "", "")
    assert bool(found.provenance_note) == (state == "invalid") and "\n" not in found.provenance_note


@pytest.fixture
def server():
    """URL of a server on this machine, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_nothing_is_fetched(server, tmp_path):
    """Neither credentials that lie elsewhere nor whether a certificate was revoked."""
    import c2pa

    url, asked = server
    authority = Authority(responder=url)
    elsewhere = signed(picture(), authority.signer(), elsewhere=f"{url}/credentials")
    within = signed(picture(), authority.signer())
    (tmp_path / "anchors.pem").write_text(authority.pem)
    with ProvenanceReader(tmp_path / "anchors.pem") as read:
        assert read(elsewhere) == Provenance(
            "absent", provenance_note="it names credentials elsewhere, which are not fetched"
        )
        assert read(within).provenance == "verified"
    assert asked == []

    # Nor does the test prove nothing: with other settings, the library asks for both.
    eager = {"verify": {"ocsp_fetch": True, "remote_manifest_fetch": True}}
    with pytest.raises(c2pa.C2paError, match="could not fetch"):
        c2pa.Reader("image/jpeg", io.BytesIO(elsewhere), context=c2pa.Context.from_dict(eager))
    trusting = c2pa.Context.from_dict(eager | {"trust": {"trust_anchors": authority.pem}})
    c2pa.Reader("image/jpeg", io.BytesIO(within), context=trusting)
    assert "/credentials" in asked and len({*asked}) == 2


def test_what_cannot_be_read_or_has_no_place_for_credentials(read, tmp_path):
    assert read(picture("BMP")) == Provenance("absent", provenance_note="none is looked for in BMP files")
    huge = tmp_path / "huge.jpg"
    huge.touch()
    os.truncate(huge, 2**29 + 1)
    for image, reason in {
        str(tmp_path / "none.jpg"): "none.jpg: no such file",
        b"": "image: empty file",
        b"words": "image: not an image of a kind",
        huge: "larger than 536,870,912 bytes",
    }.items():
        state, issuer, source_type, note = read(image)
        assert (state, issuer, source_type) == ("", "", "") and reason in note


def test_an_image_that_stops_the_library_costs_one_answer(monkeypatch):
    """As one at which it dies does: tests/dgsnet/test_apart.py."""
    data = signed(encode(np.zeros((2000, 2000, 3), np.uint8), "png", compress_level=0), KNOWN.signer())
    monkeypatch.setattr(provenance, "MAX_SECONDS", 0.002)
    with ProvenanceReader() as read:
        note = "not read within 0.002 seconds of processor time"
        assert read(data) == Provenance("invalid", "", "", note)
        assert read(picture("BMP")).provenance == "absent"


def test_a_certificate_that_has_run_out_is_invalid(read):
    data = signed(picture(), KNOWN.signer(lasts=datetime.timedelta(seconds=1)))
    assert read(data).provenance == "verified"
    # Whole seconds are compared.
    time.sleep(2.2)
    state, issuer, _, note = read(data)
    assert (state, issuer) == ("invalid", "") and "signingCredential.expired" in note


def test_names_of_strangers_are_one_plain_line():
    assert provenance._plain("Camera\n\x1b[31mMaker\u202e  &\x00 Sons") == "Camera [31mMaker & Sons"
    assert len(provenance._plain("x" * 10_000)) == 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # Not at the top: this file is imported where its items are read, and torch takes seconds.
    from tests.support.tiny import save_tiny

    return str(save_tiny(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.jpg").write_bytes(photograph)
    (folder / "b.jpg").write_bytes(picture())
    (folder / "c.png").write_bytes(b"no image")
    (folder / "d.jpg").write_bytes(flipped(photograph, len(photograph) - 100))
    (folder / "e.png").write_bytes(signed(picture("PNG"), STRANGE.signer()))
    return folder


def rows_of(table):
    return list(csv.reader(table.read_text().splitlines()))


def test_predict_has_columns_of_their_own(run, folder, trust, tmp_path, capsys):
    words = ["predict", str(folder), "--model", run, "--device", "cpu"]
    main([*words, "--out", str(tmp_path / "plain.csv")])
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        main([*words, "--out", str(tmp_path / name), "--provenance", "--trust", str(trust)])
    plain, table = (rows_of(tmp_path / name) for name in ("plain.csv", "t.csv"))
    assert [row[:4] for row in table] == plain
    mismatch = "assertion.dataHash.mismatch"
    stranger = "signed in the name of 'Camera Maker' by a certificate that is not trusted"
    assert [row[4:] for row in table] == [
        ["provenance", "issuer", "source_type", "provenance_note"],
        ["verified", "Camera Maker", "trainedAlgorithmicMedia", ""],
        ["absent", "", "", ""],
        ["", "", "", ""],
        ["invalid", "", "", mismatch],
        ["unverified", "", "trainedAlgorithmicMedia", stranger],
    ]
    import pyarrow.parquet

    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [list(row.values())[4:] for row in rows] == [[v or None for v in row[4:]] for row in table[1:]]
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist() == rows


def refused(words, capsys):
    """The one line of a command that ends with 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_mistakes_are_told_in_one_line(run, folder, trust, tmp_path, capsys, monkeypatch):
    words = ["predict", str(folder), "--model", run, "--out", str(tmp_path / "t.csv")]
    assert "--trust goes with --provenance" in refused([*words, "--trust", str(trust)], capsys)
    assert "--trust goes with --provenance" in refused(["serve", "--model", run, "--trust", "x"], capsys)
    words.append("--provenance")
    assert "--engine local" in refused([*words, "--engine", "ray"], capsys)
    assert "none.pem: No such file" in refused([*words, "--trust", str(tmp_path / "none.pem")], capsys)
    for content in ("", "words", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        (tmp_path / "bad.pem").write_text(content)
        assert "no certificates in PEM" in refused([*words, "--trust", str(tmp_path / "bad.pem")], capsys)
    monkeypatch.setattr(provenance.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dgs-kernels[provenance]'" in refused(words, capsys)
    assert not (tmp_path / "t.csv").exists()


def test_other_anchors_are_other_settings(run, folder, trust, tmp_path):
    """Rows of a stopped call must not be completed by what other certificates say."""
    from dgsnet.detection.scoring import predict_command

    arguments = ([str(folder)], run, str(tmp_path / "t.csv"))
    interrupted(predict_command, *arguments, rows=2, provenance=True, trust=str(trust))
    for other in ({}, {"provenance": True}):
        with pytest.raises(UserError, match=r"other settings \(provenance\)"):
            predict_command(*arguments, **other, resume=True)
    predict_command(*arguments, provenance=True, trust=str(trust), resume=True)
    states = [row[4] for row in rows_of(tmp_path / "t.csv")[1:]]
    assert states == ["verified", "absent", "", "invalid", "unverified"]
