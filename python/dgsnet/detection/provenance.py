"""Content Credentials (C2PA) in an image's file: who signed it, if anybody, and whether that holds.

The library that reads them is native code, and what it reads comes from strangers: it works in a process of
its own (apart.py), without network, and whatever becomes of that process is an answer about one image.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgsnet.apart import Apart, Gone
from dgsnet.data.images import ImageError, one_line_errors, opened
from dgsnet.data.items import Item
from dgsnet.errors import UserError
from dgsnet.files import one_line

if TYPE_CHECKING:
    from c2pa import Context

# Most processor time in seconds that one image may take.
MAX_SECONDS = 30.0
# Most characters that are shown of a name that somebody else has chosen.
MAX_WORDS = 200

# By Pillow's names; the others have no place for credentials, or none that the library knows.
FORMATS = ("AVIF", "GIF", "HEIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
# What holds credentials bears the first in a file of any format, and XMP names those elsewhere by the second:
# without either of them the library, which reads the whole file, need not be asked.
TRACES = (b"c2pa", b"dcterms:provenance")
STATES = {"Trusted": "verified", "Valid": "unverified"}
# Nothing is ever fetched: an image must not be able to call home, nor to change its answer afterwards.
SETTINGS = {
    "verify": {"verify_trust": True, "remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": [], "decode_identity_assertions": False},
}


class Provenance(NamedTuple):
    """What an image's file says of its origin; docs/provenance.md says what follows from it and what not.

    Attributes:
        provenance: "verified": signed, unchanged since, and the signer's certificate is trusted;
            "unverified": the same, by a certificate that is not trusted; "invalid": there are credentials,
            and they do not hold; "absent": there are none. "" where the image cannot be read.
        issuer: whom a verified signature's certificate names; else "", for anybody can write any name.
        source_type: how the signer says that the image was made, such as "trainedAlgorithmicMedia"; "" where
            that is not said, and for credentials that do not hold.
        provenance_note: one line on why it is not verified, else "".
    """

    provenance: str
    issuer: str = ""
    source_type: str = ""
    provenance_note: str = ""


class ProvenanceReader:
    """Reads the Content Credentials of one image after another, in a process of its own.

    An image at which that process dies, or reaches a limit, has that as its answer.

    Args:
        trust: file of the certificates, in PEM, that a signer's may descend from; None trusts nobody.

    Attributes:
        anchors: the certificates, in PEM.

    Raises:
        UserError: c2pa-python is not installed or does not work here, or the file holds no certificates.

    >>> with ProvenanceReader("anchors.pem") as read:  # doctest: +SKIP
    ...     read("photo.jpg")
    Provenance(provenance='verified', issuer='Camera Maker', source_type='digitalCapture', provenance_note='')
    """

    def __init__(self, trust: str | Path | None = None):
        if importlib.util.find_spec("c2pa") is None:
            raise UserError("Content Credentials need c2pa-python: pip install 'dgs-kernels[provenance]'")
        self.anchors = _read_anchors(Path(trust)) if trust else ""
        self._apart = Apart(
            "dgsnet.detection.provenance:prepare",
            self.anchors,
            library="c2pa-python",
            seconds=MAX_SECONDS,
        )
        self._apart.start()

    def __call__(self, image: str | Path | bytes | Item) -> Provenance:
        """Read one image: a path, an encoded image or an item."""
        if isinstance(image, bytes):
            image = Item("image", data=image)
        elif not isinstance(image, Item):
            image = Item(str(image))
        try:
            data = image.read_bytes()
        except ImageError as error:
            return Provenance("", provenance_note=str(error))
        try:
            return Provenance(*self._apart("dgsnet.detection.provenance:answer", data, image.path)[0])
        except Gone as gone:
            return Provenance("invalid", provenance_note=str(gone))

    def __enter__(self) -> ProvenanceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._apart.close()


_context: Context | None = None


def prepare(anchors: str) -> None:
    """What the other process does first."""
    from c2pa import Context

    global _context
    trust = {"trust": {"trust_anchors": anchors}} if anchors else {}
    _context = Context.from_dict(SETTINGS | trust)


def answer(data: bytes, name: str) -> tuple[Provenance, int, tuple[()]]:
    """The part of `ProvenanceReader` that the other process does."""
    assert _context
    try:
        # The limits of images hold here too.
        with one_line_errors(name), opened(data) as image:
            kind = image.format or ""
    except ImageError as error:
        return Provenance("", provenance_note=str(error)), 0, ()
    if kind not in FORMATS:
        return Provenance("absent", provenance_note=f"none is looked for in {kind} files"), 0, ()
    if not any(trace in data for trace in TRACES):
        return Provenance("absent"), 0, ()
    try:
        return _of_bytes(data, _context), 0, ()
    except Exception as error:
        # Errors are as various as the damage.
        return Provenance("invalid", provenance_note=_plain(error) or type(error).__name__), 0, ()


def _of_bytes(data: bytes, context: Context) -> Provenance:
    from c2pa import C2paError, Reader

    try:
        with Reader(None, io.BytesIO(data), context=context) as reader:
            store = json.loads(reader.json())
    except C2paError.ManifestNotFound:
        return Provenance("absent")
    except C2paError as error:
        if str(error).startswith("Remote"):
            note = "it names credentials elsewhere, which are not fetched"
            return Provenance("absent", provenance_note=note)
        raise
    manifest = store["manifests"][store["active_manifest"]]
    state = STATES.get(store["validation_state"], "invalid")
    if state == "invalid":
        return Provenance(state, provenance_note=", ".join(_failures(store)))
    signature = manifest.get("signature_info") or {}
    signer = _plain(signature.get("issuer") or signature.get("common_name") or "")
    if state == "verified":
        return Provenance(state, signer, _source_type(manifest))
    note = f"signed in the name of {signer!r} by a certificate that is not trusted"
    return Provenance(state, "", _source_type(manifest), note)


def _failures(store: dict[str, Any]) -> list[str]:
    """The codes of what does not hold, as the C2PA specification names them, each once."""
    results = store["validation_results"]
    parents = [delta["validationDeltas"] for delta in results.get("ingredientDeltas") or ()]
    parts = [results["activeManifest"], *parents]
    return list(dict.fromkeys(_plain(failure["code"]) for part in parts for failure in part["failure"]))


def _source_type(manifest: dict[str, Any]) -> str:
    """The signer's own words, from IPTC's list; not those of the images that this one was made from."""
    found = [
        _plain(action.get("digitalSourceType") or "").rpartition("/")[2]
        for assertion in manifest.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in (assertion.get("data") or {}).get("actions", ())
    ]
    return ", ".join(dict.fromkeys(filter(None, found)))


def _plain(words: object) -> str:
    """Words of strangers: one line of printable characters, and no more of them than a name has."""
    return "".join(filter(str.isprintable, one_line(str(words))))[:MAX_WORDS]


def _read_anchors(path: Path) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509 import load_pem_x509_certificates

    try:
        certificates = load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise UserError(f"--trust {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"--trust {path}: no certificates in PEM (-----BEGIN CERTIFICATE-----), as trust lists hold them"
        ) from None
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)
