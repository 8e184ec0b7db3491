"""What an encoded image says beside its pixels: the texts of its metadata, each with where it stands.

Only what a container holds as metadata is looked at, never its pixels: EXIF, XMP and the texts of PNG. What
is longer than MAX_TEXT is left out, and so is what is damaged.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from xml.parsers import expat

from PIL import Image

from dgsnet.data.headers import TIFF_BYTES, ImageError, entries

# Of one text once it is decompressed: ComfyUI's workflows take some megabytes. And of all of an image.
MAX_TEXT = 2**22
MAX_TEXTS = 2**24
# Of a PNG, compressed texts: each may take as long as MAX_TEXT.
MAX_COMPRESSED = 16
# Elements of XMP within each other: rdf and its lists take eight.
MAX_DEPTH = 64
# Parts of a GIF, of 255 bytes each.
MAX_GIF_PARTS = 2**17

EXIF_TAGS = {
    270: "ImageDescription",
    271: "Make",
    272: "Model",
    305: "Software",
    315: "Artist",
    37510: "UserComment",
}
_INNER, _XMP = 34665, 700
_PNG_XMP = b"XML:com.adobe.xmp"
_PROFILE = b"Raw profile type "
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


class Text(NamedTuple):
    """One text of an image's metadata.

    Attributes:
        where: "EXIF", "XMP" or "PNG".
        key: the name of EXIF's tag, or PNG's keyword; XMP's as "NAMESPACE NAME".
        words: what it says.
    """

    where: str
    key: str
    words: str


def texts(data: bytes, image: Image.Image) -> Iterator[Text]:
    """The texts of an image's file; `image` is what Pillow has opened of it."""
    left = MAX_TEXTS
    for text in _texts(data, image):
        left -= len(text.words)
        if left < 0:
            return
        yield text


def _texts(data: bytes, image: Image.Image) -> Iterator[Text]:
    # Pillow would decode the pixels to reach what follows them.
    if image.format == "PNG":
        yield from _png(data)
    elif image.format == "TIFF":
        yield from _exif(data)
    elif image.format == "GIF":
        yield from _gif(data)
    else:
        # Pillow's readers of JPEG, WebP, HEIF and AVIF have it once they know the size.
        for name, read in (("exif", _exif), ("xmp", _xmp)):
            if isinstance(found := image.info.get(name), bytes):
                yield from read(found)


def _png(data: bytes) -> Iterator[Text]:
    place, left, compressed = 8, MAX_TEXTS, 0
    while place + 12 <= len(data):
        size, kind = struct.unpack_from(">L4s", data, place)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            left -= size
            compressed += kind in (b"zTXt", b"iTXt")
            if left < 0 or compressed > MAX_COMPRESSED:
                return
            yield from _png_chunk(kind, data[place + 8 : place + 8 + size])
        elif kind == b"IEND":
            return
        place += 12 + size


def _png_chunk(kind: bytes, content: bytes) -> Iterator[Text]:
    if kind == b"eXIf":
        yield from _exif(content)
        return
    key, _, words = content.partition(b"\0")
    if kind == b"zTXt":
        words = _inflated(words[1:])
    elif kind == b"iTXt":
        # Two flags, a language, the keyword in it, and the text.
        compressed, (*_, words) = words[:1] == b"\1", words[2:].split(b"\0", 2)
        words = _inflated(words) if compressed else words
    if len(words) > MAX_TEXT:
        return
    if key == _PNG_XMP:
        yield from _xmp(words)
    elif key.startswith(_PROFILE):
        # ImageMagick writes name, size and hexadecimal digits.
        with contextlib.suppress(ValueError):
            _, _, digits = words.split(None, 2)
            profile = bytes.fromhex(digits.decode("ascii"))
            xmp = key.endswith(b"xmp") or profile.startswith(b"http")
            yield from _xmp(profile.rpartition(b"\0")[2]) if xmp else _exif(profile)
    else:
        yield Text("PNG", key.decode("latin-1"), _decoded(words))


def _inflated(data: bytes) -> bytes:
    """What was compressed; none of what is damaged or too long."""
    with contextlib.suppress(zlib.error):
        reader = zlib.decompressobj()
        found = reader.decompress(data, MAX_TEXT)
        return found if reader.eof else b""
    return b""


def _gif(data: bytes) -> Iterator[Text]:
    """XMP is an extension whose text reads as parts of a length each; 257 bytes end it."""
    place, left = 13 + _palette(data[10:11]), MAX_GIF_PARTS
    while left > 0 and place < len(data):
        kind, begin = data[place], place + 2
        # It is a frame.
        if kind == 0x2C:
            begin = place + 11 + _palette(data[place + 9 : place + 10])
        elif kind != 0x21:
            return
        name = data[place + 3 : place + 14] if data[place + 1 : place + 3] == b"\xff\x0b" else b""
        text = begin + 12
        place = begin
        while place < len(data) and data[place] and left > 0:
            place, left = place + 1 + data[place], left - 1
        place, left = place + 1, left - 1
        if kind == 0x21 and name == b"XMP DataXMP":
            yield from _xmp(data[text : place - 257])


def _palette(flags: bytes) -> int:
    """Bytes of the colours that these flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _exif(data: bytes) -> Iterator[Text]:
    """Texts of the first directory of a TIFF, which EXIF data is too, and of the one in it."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    inner = None
    # The file may be damaged, or made to fill the memory.
    with contextlib.suppress(struct.error, OverflowError, ImageError):
        for tag, kind, number, value in entries(data, "EXIF"):
            if tag == _INNER:
                inner = int.from_bytes(value, "little" if data.startswith(b"II") else "big")
            elif tag == _XMP:
                yield from _xmp(_value(data, kind, number, value))
            elif tag in EXIF_TAGS:
                yield _exif_text(tag, _value(data, kind, number, value))
        for tag, kind, number, value in entries(data, "EXIF", inner) if inner is not None else ():
            if tag in EXIF_TAGS:
                yield _exif_text(tag, _value(data, kind, number, value))


def _exif_text(tag: int, value: bytes) -> Text:
    return Text("EXIF", EXIF_TAGS[tag], _decoded(value, in_exif=True))


def _value(data: bytes, kind: int, number: int, value: bytes) -> bytes:
    """The bytes that a directory's entry holds, or has elsewhere; none of what is too long."""
    size = number * TIFF_BYTES.get(kind, 0)
    if size <= len(value):
        return value[:size]
    place = int.from_bytes(value, "little" if data.startswith(b"II") else "big")
    return data[place : place + size] if size <= MAX_TEXT else b""


def _decoded(words: bytes, in_exif: bool = False) -> str:
    """A text of which the encoding is not always what the standard says."""
    if in_exif and words.startswith(b"UNICODE\0"):
        words = words[8:]
        # The order is written nowhere; of the letters of most texts the higher byte is 0.
        big = words[::2].count(0) > words[1::2].count(0)
        return words.decode("utf-16-be" if big else "utf-16-le", "replace").strip("\0")
    if in_exif and words[:8] in (b"ASCII\0\0\0", bytes(8)):
        words = words[8:]
    try:
        return words.strip(b"\0").decode()
    except UnicodeDecodeError:
        return words.strip(b"\0").decode("latin-1")


class _Refused(Exception):
    """XML that no XMP has."""


def _xmp(data: bytes) -> list[Text]:
    """XMP's properties, whether they are attributes or elements; what stands before damage too.

    A document type is refused, and with it every entity.
    """
    found: list[Text] = []
    names: list[str] = []
    parts: list[list[str]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(names) >= MAX_DEPTH:
            raise _Refused
        names.append(name)
        parts.append([])
        for key, value in attributes.items():
            # An element may have its value as a resource.
            found.append(Text("XMP", name if key == f"{_RDF} resource" else key, value))

    def end(name: str) -> None:
        words = "".join(parts.pop()).strip()
        names.pop()
        if words and not name.startswith(_RDF):
            found.append(Text("XMP", name, words))
        elif words and parts:
            # A list's items are what its property says.
            parts[-1].append(f" {words}")

    def refuse(*_: object) -> None:
        raise _Refused

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda words: parts[-1].append(words)
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    with contextlib.suppress(expat.ExpatError, _Refused, ValueError, LookupError):
        if len(data) <= MAX_TEXT:
            parser.Parse(data.strip(b"\0 \r\n\t"), True)
    return found
