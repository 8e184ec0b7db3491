"""What the headers of an encoded image ask of its reader, looked through before anything is decoded."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator

from PIL import TiffImagePlugin

MAX_PIXELS = 2**27
# A JPEG is gone through once per scan: encoders write about ten, an attacker thousands in few bytes.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# Pillow makes Python objects, dozens of bytes each, of every value of these; encoders need some kilobytes.
MAX_EXIF_BYTES = 2**22
MAX_TIFF_VALUES = 2**20
MAX_DIRECTORY_BYTES = 2**26
# Raw files have three or four.
MAX_SUB_DIRECTORIES = 16
# Before the first frame of an animation stand three.
MAX_WEBP_CHUNKS = 16
# Pillow reads the text of these, and leaves out their comments, in Python.
MAX_PNM_HEADER = 2**16
MAX_PNM_TEXT = 2**24
MAX_PNM_COMMENTS = 100


class ImageError(Exception):
    """An image that cannot be read; str(error) is one line that names the image and the reason."""


def check_headers(data: bytes) -> None:
    """Refuse an encoded image that is made to exhaust its reader.

    Raises:
        ImageError: the reason, without a name.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        _check_tiff(data)
    elif re.match(rb"P[0-6fy]", data):
        _check_pnm(data)


def webp_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the first frame of an animated WebP; None of what is none."""
    place = 12
    for _ in range(MAX_WEBP_CHUNKS if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else 0):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8
        if kind == b"ANMF":
            left, top, width, height = (
                int.from_bytes(data[at : at + 3], "little") for at in range(place, place + 12, 3)
            )
            return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
        place += size + size % 2
    return None


# TIFF's tags by their numbers, and what stands for a sensor's values: those below a filter, or linear ones.
_REDUCED, _OLD_KIND, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _SUB_DIRECTORIES, _DNG = (
    *(254, 255, 262, 322, 323, 330, 50706),
)
_SENSORS = (32803, 34892)
# Of one value of each type.
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# A marker, and neither a stuffed 0xff, a restart nor a filling byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _check_jpeg(data: bytes) -> None:
    """Refuse JPEGs that are gone through many times over, or whose EXIF data is no camera's."""
    scans = pixels = 0
    exif, pictures = bytearray(), b""  # put together by Pillow, and the last directory of several pictures
    place = 2
    while found := _MARKER.search(data, place):
        kind, place = data[found.end() - 1], found.end()
        if kind == 0xD9:  # end of image
            break
        length = int.from_bytes(data[place : place + 2], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 3, place + 5))
            pixels = max(pixels, height * width)
        scans += kind == 0xDA
        if kind == 0xE1 and data.startswith(b"Exif\0\0", place + 2):
            exif += data[place + 8 : place + length]
        elif kind == 0xE2 and data.startswith(b"MPF\0", place + 2):
            pictures = data[place + 6 : place + length]
        if scans > MAX_SCANS or (scans > 1 and scans * pixels > MAX_SCANNED_PIXELS):
            raise ImageError(f"a JPEG of more scans ({scans} and more) than an image of its size can need")
        if len(exif) > MAX_EXIF_BYTES:
            raise ImageError(f"its EXIF data is larger than {MAX_EXIF_BYTES:,} bytes")
        place += length
    check_exif(exif)
    check_exif(pictures)


def _check_tiff(data: bytes) -> None:
    """Refuse TIFFs whose directory, or a tile of them that no image needs, would fill the memory."""
    order = "<" if data.startswith(b"II") else ">"
    found = dict.fromkeys((_REDUCED, _OLD_KIND, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _DNG), 0)
    values, raw = 0, data[8:10] == b"CR"  # Canon's, which begin with a preview
    try:
        for tag, kind, number, value in _entries(data, "a TIFF directory"):
            values += 1 if kind in (1, 2, 7) else number  # bytes, text and opaque data stay as they are
            if values > MAX_TIFF_VALUES:
                raise ImageError(f"a TIFF directory of more than {MAX_TIFF_VALUES:,} values")
            if tag in found:
                found[tag] = _number(order, kind, value)
            elif tag == _SUB_DIRECTORIES:
                raw |= any(_is_sensor(data, place) for place in _places(data, order, kind, number, value))
        if found[_TILE_WIDTH] * found[_TILE_HEIGHT] > MAX_PIXELS:
            raise ImageError(f"a TIFF with tiles of more than {MAX_PIXELS:,} pixels")
    except (struct.error, OverflowError):
        raise ImageError("cannot be decoded: the TIFF directory is cut off") from None
    if raw or found[_DNG] or found[_PHOTOMETRIC] in _SENSORS:
        raise ImageError("a camera's raw file, which is not an image of a kind that can be read: develop it")
    if found[_REDUCED] & 1 or found[_OLD_KIND] == 2:
        raise ImageError("a TIFF that begins with a reduced image, as raw files do: save its full one alone")


def _is_sensor(data: bytes, place: int) -> bool:
    """Whether a TIFF directory is of what a camera's sensor saw; what cannot be read is none."""
    order = "<" if data.startswith(b"II") else ">"
    with contextlib.suppress(struct.error, OverflowError):
        return any(
            tag == _PHOTOMETRIC and _number(order, kind, value) in _SENSORS
            for tag, kind, _, value in _entries(data, "a TIFF directory", place)
        )
    return False


def _number(order: str, kind: int, value: bytes) -> int:
    """The first number of an entry that holds it itself."""
    (number,) = struct.unpack_from(order + {3: "H", 16: "Q"}.get(kind, "L"), value)
    return number


def _places(data: bytes, order: str, kind: int, number: int, value: bytes) -> Iterator[int]:
    """Where the first of the directories lie that an entry names."""
    size = {4: 4, 13: 4, 16: 8, 18: 8}.get(kind, 0)
    if number * size > len(value):
        (place,) = struct.unpack_from(order + {4: "L", 8: "Q"}[len(value)], value)
        value = data[place : place + MAX_SUB_DIRECTORIES * size]
    for i in range(min(number, MAX_SUB_DIRECTORIES, len(value) // size) if size else 0):
        yield _number(order, 16 if size == 8 else 4, value[i * size :])


def check_exif(exif: bytes | bytearray) -> None:
    """Refuse EXIF data whose directory would fill the memory; whatever else is wrong with it is no matter."""
    with contextlib.suppress(struct.error, OverflowError):
        for _ in _entries(re.sub(rb"^(Exif\0\0){1,2}", b"", exif), "an EXIF directory"):
            pass


def _entries(data: bytes, name: str, place: int = 0) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, number of values and value, or its place, of a TIFF's directory; at 0, of its first.

    Pillow before 13 makes a copy of what every entry stands for, though all stand for the same bytes.
    """
    order = "<" if data.startswith(b"II") else ">"
    # Where Pillow looks for it: it takes a big-endian BigTIFF, which has it a byte later, for a classic one.
    big = data[2:3] == b"+"
    offset, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xL", "H", "HHL4s")
    if not place:
        (place,) = struct.unpack_from(order + offset, data)
    (tags,) = struct.unpack_from(order + count, data, place)
    place += struct.calcsize(order + count)
    copied = 0
    for _ in range(tags):
        tag, kind, number, value = struct.unpack_from(order + entry, data, place)
        place += struct.calcsize(order + entry)
        copied += min(number * _TIFF_BYTES.get(kind, 0), len(data))
        if copied > max(len(data), MAX_DIRECTORY_BYTES):
            raise ImageError(f"{name} of more than {MAX_DIRECTORY_BYTES:,} bytes")
        yield tag, kind, number, value


def _check_pnm(data: bytes) -> None:
    """Refuse PNM files whose text would keep Pillow busy for minutes: endless headers, texts and comments."""
    numbers = 2 if data[1:2] in b"14" else 3  # width, height and, but for bitmaps, white
    header = rb"P\w+(?:(?:\s|#[^\r\n]*[\r\n])+[0-9.+-]+){%d}" % numbers
    if not re.match(header, data[:MAX_PNM_HEADER]):
        raise ImageError(f"cannot be decoded: no PNM header in its first {MAX_PNM_HEADER:,} bytes")
    if data[1:2] in b"123":
        if len(data) > MAX_PNM_TEXT:
            raise ImageError(f"a PNM text of more than {MAX_PNM_TEXT:,} bytes; make it a binary one")
        if data.count(b"#") > MAX_PNM_COMMENTS:
            raise ImageError(f"a PNM text of more than {MAX_PNM_COMMENTS} comments")
