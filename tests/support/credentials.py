"""Images with Content Credentials, signed by certificates made for the occasion."""

from __future__ import annotations

import datetime
import io
import json

import c2pa
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from PIL import Image

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


class Authority:
    """One who certifies signers; `pem` is its own certificate.

    Args:
        name: of its organisation.
        responder: URL at which the certificates that it issues can be asked about (OCSP).
    """

    def __init__(self, name: str = "Test Authority", responder: str = ""):
        self.responder = responder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.certificate = self._certificate(self.name, self.key, authority=True)
        self.pem = self.certificate.public_bytes(Encoding.PEM).decode()

    def signer(self, name: str = "Camera Maker", **validity: datetime.timedelta) -> c2pa.Signer:
        """One who signs images in the name of an organisation."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(_name(name), key, authority=False, **validity)
        chain = certificate.public_bytes(Encoding.PEM) + self.certificate.public_bytes(Encoding.PEM)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", chain, secret, None))

    def _certificate(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        authority: bool,
        lasts: datetime.timedelta = datetime.timedelta(days=30),
    ) -> x509.Certificate:
        """As the C2PA specification asks for: a signer's is for signing, and for e-mail among others."""
        now = datetime.datetime.now(datetime.timezone.utc)
        uses = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ) | {"encipher_only": False, "decipher_only": False}
        usage = x509.KeyUsage(
            digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **uses
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .add_extension(usage, critical=True)
        )
        if not authority:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        if self.responder and not authority:
            where = x509.UniformResourceIdentifier(self.responder)
            access = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, where)
            builder = builder.add_extension(x509.AuthorityInformationAccess([access]), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def picture(kind: str = "JPEG", seed: int = 0) -> bytes:
    """An image file of Pillow's format of this name, 48 x 40."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def signed(
    data: bytes,
    signer: c2pa.Signer,
    *,
    source_type: str = GENERATED,
    edited: bool = False,
    elsewhere: str = "",
) -> bytes:
    """The file with credentials.

    Args:
        data: the image file.
        signer: who signs.
        source_type: how the signer says that it was made.
        edited: the signer says nothing of that, but to have edited an image that has credentials.
        elsewhere: URL of the credentials, which are then not in the file.
    """
    created = {"action": "c2pa.created", "digitalSourceType": source_type}
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
    manifest = {
        "claim_generator_info": [{"name": "maker of tests", "version": "1"}],
        "assertions": [] if edited else [actions],
    }
    # Thumbnails, which are made if not declined, would be a hundred times the image.
    context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
    builder = c2pa.Builder(json.dumps(manifest), context=context)
    if elsewhere:
        builder.set_no_embed()
        builder.set_remote_url(elsewhere)
    if edited:
        builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
    with Image.open(io.BytesIO(data)) as image:
        mime = image.get_format_mimetype()
    file = io.BytesIO()
    builder.sign(signer, mime, io.BytesIO(data), file)
    return file.getvalue()


def _name(organisation: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{organisation}, signing"),
        ]
    )
