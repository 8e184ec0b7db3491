"""What the headers of an encoded image ask of its reader, looked through before anything is decoded."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator, Set

from PIL import JpegImagePlugin, TiffImagePlugin

MAX_PIXELS = 2**27
# A JPEG is gone through once per scan: encoders write about ten, an attacker thousands in few bytes.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# A profile or EXIF data of 64 KiB takes one; an empty one costs Pillow a microsecond for four bytes.
MAX_SEGMENTS = 10_000
# Of JPEG 2000: bytes before it proper, and parts of 128 x 128 pixels are small ones for those who write them.
MAX_BOXES = 2**16
MAX_PRECINCTS = 2**17
# Pillow makes Python objects, dozens of bytes each, of every value of these; encoders need some kilobytes.
MAX_EXIF_BYTES = 2**22
MAX_TIFF_VALUES = 2**20
MAX_DIRECTORY_BYTES = 2**26
# Raw files have three or four.
MAX_SUB_DIRECTORIES = 16
# Encoders cut a PNG into chunks of 8 KiB or more; one costs Pillow as much as thousands of pixels.
MAX_PNG_CHUNKS = 10_000
# In bytes. A PNG with more chunks has at least so many in each on average.
MIN_PNG_CHUNK = 512
# Pillow fills up a run-length encoded BMP in Python, a pixel at a time.
MAX_RUN_PIXELS = 2**24
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
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    elif data[4:8] == b"ftyp":
        # Where it is cut off, the decoder says so.
        with contextlib.suppress(struct.error, IndexError):
            _check_grid(data)
    elif (start := data.find(b"\xff\x4f\xff\x51", 0, MAX_BOXES)) >= 0:
        # Here JPEG 2000 proper begins; where it is cut off, OpenJPEG says so.
        with contextlib.suppress(struct.error, IndexError):
            _check_jpeg2000(data, start + 2)


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
_REDUCED, _OLD_KIND, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _SUB_DIRECTORIES, _EXIF, _GPS, _DNG = (
    *(254, 255, 262, 322, 323, 330, 34665, 34853, 50706),
)
_SENSORS = (32803, 34892)
# Of one value of each type.
TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# A marker, and neither a stuffed 0xff, a restart nor a filling byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# libjpeg gives up at a second start of image.
_ENDS, _NO_ENDS = frozenset({0xD8, 0xD9}), frozenset[int]()
_LIBJPEGS_BARE = frozenset({0x01})
_PILLOWS_BARE = frozenset(
    marker & 0xFF for marker, (_, _, handler) in JpegImagePlugin.MARKER.items() if handler is None
)


def _check_jpeg(data: bytes) -> None:
    """Refuse JPEGs that are gone through many times over, or whose EXIF data is no camera's.

    Pillow reads the segments before the first scan, and libjpeg all again: they differ in what has no length.
    """
    # What Pillow puts together, and the last directory of several pictures.
    exif, pictures = bytearray(), b""
    for number, (kind, segment) in enumerate(_segments(data, _PILLOWS_BARE, _NO_ENDS)):
        if kind == 0xDA:
            break
        if number >= MAX_SEGMENTS:
            raise ImageError(f"a JPEG of more than {MAX_SEGMENTS:,} segments")
        if kind == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif += segment[6:]
        elif kind == 0xE2 and segment.startswith(b"MPF\0"):
            pictures = segment[4:]
        if len(exif) > MAX_EXIF_BYTES:
            raise ImageError(f"its EXIF data is larger than {MAX_EXIF_BYTES:,} bytes")
    check_exif(exif)
    check_exif(pictures)
    scans = pixels = 0
    for kind, segment in _segments(data, _LIBJPEGS_BARE, _ENDS):
        # It is the start of a frame.
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(segment[at : at + 2], "big") for at in (1, 3))
            pixels = max(pixels, height * width)
        scans += kind == 0xDA
        if scans > MAX_SCANS or (scans > 1 and scans * pixels > MAX_SCANNED_PIXELS):
            raise ImageError(f"a JPEG of more scans ({scans} and more) than an image of its size can need")


def _segments(data: bytes, bare: Set[int], ends: Set[int]) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each segment of a JPEG, up to one of the `ends`; those `bare` have no content."""
    place = 2
    while found := _MARKER.search(data, place):
        kind, place = data[found.end() - 1], found.end()
        if kind in ends:
            return
        if kind in bare:
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        yield kind, data[place + 2 : place + length]
        place += max(length, 2)


def _check_jpeg2000(data: bytes, place: int) -> None:
    """Refuse JPEG 2000 of more precincts than an image needs, all of which OpenJPEG has in memory at once."""
    width = height = components = end = 0
    while place + 4 <= len(data):
        kind, length = struct.unpack_from(">HH", data, place)
        content = data[place + 4 : place + 2 + length]
        # It has a style, the levels, four bytes, and where the style says so the precincts' sizes.
        coding = b""
        if kind == 0xFF51:
            right, bottom, left, top, *_, components = struct.unpack_from(">8LH", content, 2)
            width, height = right - left, bottom - top
        elif kind == 0xFF52:
            coding = content[:1] + content[5:]
        elif kind == 0xFF53:
            coding = content[1 if components < 257 else 2 :]
        elif kind == 0xFF90:
            (size,) = struct.unpack_from(">L", content, 2)
            end = place + size if size else len(data)
        elif kind == 0xFF93:
            # Here is the data of a tile, as long as its header has said.
            place = max(end, place + 2)
            continue
        elif kind == 0xFFD9:
            return
        if coding and coding[0] & 1:
            number = sum(
                -(-width >> left) * -(-height >> left) // (1 << (size & 15) + (size >> 4))
                for left, size in zip(range(coding[1], -1, -1), coding[6:])
            )
            if number * components > MAX_PRECINCTS:
                raise ImageError(f"a JPEG 2000 image of more than {MAX_PRECINCTS:,} precincts")
        place += 2 + length


def _check_tiff(data: bytes) -> None:
    """Refuse TIFFs whose directory, or a tile of them that no image needs, would fill the memory."""
    order = "<" if data.startswith(b"II") else ">"
    found = dict.fromkeys((_REDUCED, _OLD_KIND, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _DNG), 0)
    # Raw files of Canon begin with a preview.
    raw = data[8:10] == b"CR"
    # Directories that Pillow reads too, and where they are.
    inner: dict[int, int] = {}
    try:
        for tag, kind, number, value in _counted(entries(data, "a TIFF directory")):
            if tag in found:
                found[tag] = _number(order, kind, value)
            elif tag in (_EXIF, _GPS):
                inner[tag] = _number(order, kind, value)
            elif tag == _SUB_DIRECTORIES:
                raw |= any(_is_sensor(data, place) for place in _places(data, order, kind, number, value))
        if found[_TILE_WIDTH] * found[_TILE_HEIGHT] > MAX_PIXELS:
            raise ImageError(f"a TIFF with tiles of more than {MAX_PIXELS:,} pixels")
        for place in inner.values():
            with contextlib.suppress(struct.error, OverflowError):
                list(_counted(entries(data, "a TIFF directory", place)))
    except (struct.error, OverflowError):
        raise ImageError("cannot be decoded: the TIFF directory is cut off") from None
    if raw or found[_DNG] or found[_PHOTOMETRIC] in _SENSORS:
        raise ImageError("a camera's raw file, which is not an image of a kind that can be read: develop it")
    if found[_REDUCED] & 1 or found[_OLD_KIND] == 2:
        raise ImageError("a TIFF that begins with a reduced image, as raw files do: save its full one alone")


def _counted(entries: Iterator[_Entry]) -> Iterator[_Entry]:
    """The entries of a directory; refused where Pillow would make too many objects of them."""
    values = 0
    for entry in entries:
        # Bytes, text and opaque data stay as they are.
        values += 1 if entry[1] in (1, 2, 7) else entry[2]
        if values > MAX_TIFF_VALUES:
            raise ImageError(f"a TIFF directory of more than {MAX_TIFF_VALUES:,} values")
        yield entry


def _is_sensor(data: bytes, place: int) -> bool:
    """Whether a TIFF directory is of what a camera's sensor saw; what cannot be read is none."""
    order = "<" if data.startswith(b"II") else ">"
    with contextlib.suppress(struct.error, OverflowError):
        return any(
            tag == _PHOTOMETRIC and _number(order, kind, value) in _SENSORS
            for tag, kind, _, value in entries(data, "a TIFF directory", place)
        )
    return False


def _number(order: str, kind: int, value: bytes) -> int:
    """The first number of an entry that holds it itself."""
    (number,) = struct.unpack_from(order + {3: "H", 6: "b", 8: "h", 9: "l", 16: "Q"}.get(kind, "L"), value)
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
        for _ in entries(re.sub(rb"^(Exif\0\0){1,2}", b"", exif), "an EXIF directory"):
            pass


_Entry = tuple[int, int, int, bytes]


def entries(data: bytes, name: str, place: int | None = None) -> Iterator[_Entry]:
    """Tag, type, number of values and value, or its place, of a TIFF's directory; of its first if not given.

    Pillow before 13 makes a copy of what every entry stands for, though all stand for the same bytes.
    """
    order = "<" if data.startswith(b"II") else ">"
    # Where Pillow looks for it: it takes a big-endian BigTIFF, which has it a byte later, for a classic one.
    big = data[2:3] == b"+"
    offset, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xL", "H", "HHL4s")
    if place is None:
        (place,) = struct.unpack_from(order + offset, data)
    (tags,) = struct.unpack_from(order + count, data, place)
    place += struct.calcsize(order + count)
    copied = 0
    for _ in range(tags):
        tag, kind, number, value = struct.unpack_from(order + entry, data, place)
        place += struct.calcsize(order + entry)
        copied += min(number * TIFF_BYTES.get(kind, 0), len(data))
        if copied > max(len(data), MAX_DIRECTORY_BYTES):
            raise ImageError(f"{name} of more than {MAX_DIRECTORY_BYTES:,} bytes")
        yield tag, kind, number, value


def _check_pnm(data: bytes) -> None:
    """Refuse PNM files whose text would keep Pillow busy for minutes: endless headers, texts and comments."""
    # They are width, height and, but for bitmaps, white.
    numbers = 2 if data[1:2] in b"14" else 3
    header = rb"P\w+(?:(?:\s|#[^\r\n]*[\r\n])+[0-9.+-]+){%d}" % numbers
    if not re.match(header, data[:MAX_PNM_HEADER]):
        raise ImageError(f"cannot be decoded: no PNM header in its first {MAX_PNM_HEADER:,} bytes")
    if data[1:2] in b"123":
        if len(data) > MAX_PNM_TEXT:
            raise ImageError(f"a PNM text of more than {MAX_PNM_TEXT:,} bytes; make it a binary one")
        if data.count(b"#") > MAX_PNM_COMMENTS:
            raise ImageError(f"a PNM text of more than {MAX_PNM_COMMENTS} comments")


def _check_png(data: bytes) -> None:
    """Refuse PNGs of so many small chunks that going through them takes longer than decoding."""
    place = count = 0
    while place < len(data):
        place += 12 + int.from_bytes(data[place + 8 : place + 12], "big")
        count += 1
        if count > MAX_PNG_CHUNKS and place < count * MIN_PNG_CHUNK:
            raise ImageError(f"a PNG of more than {MAX_PNG_CHUNKS:,} small chunks")


def _check_bmp(data: bytes) -> None:
    """Refuse large run-length encoded BMPs."""
    if len(data) >= 34 and int.from_bytes(data[30:34], "little") in (1, 2):
        width, height = struct.unpack_from("<Ll", data, 18)
        if width * abs(height) > MAX_RUN_PIXELS:
            raise ImageError(f"a run-length encoded BMP of more than {MAX_RUN_PIXELS:,} pixels")


def _check_grid(data: bytes) -> None:
    """Refuse HEIF and AVIF whose tiles are more than an image: a tile is decoded as often as it is named."""
    # How many pixels each property states.
    sizes: list[int] = []
    # From item to its properties' numbers, which count from 1.
    properties: dict[int, list[int]] = {}
    # From item to the items that it is put together of.
    made_of: dict[int, list[int]] = {}
    for kind, version, place, end in _boxes(data, 0, len(data)):
        if kind == b"ipco":
            for inner, _, start, _ in _boxes(data, place, end):
                width, height = struct.unpack_from(">LL", data, start + 4) if inner == b"ispe" else (0, 0)
                sizes.append(width * height)
        elif kind == b"ipma":
            large = data[place - 1] & 1
            (items,) = struct.unpack_from(">L", data, place)
            place += 4
            for _ in range(items):
                number, count = struct.unpack_from(">LB" if version else ">HB", data, place)
                place += 5 if version else 3
                found = struct.unpack_from(f">{count}{'H' if large else 'B'}", data, place)
                place += count * (1 + large)
                properties[number] = [one & (0x7FFF if large else 0x7F) for one in found]
        elif kind == b"iref":
            for inner, _, start, _ in _boxes(data, place, end):
                if inner == b"dimg":
                    number, count = struct.unpack_from(">LH" if version else ">HH", data, start)
                    start += 6 if version else 4
                    made_of[number] = [*struct.unpack_from(f">{count}{'L' if version else 'H'}", data, start)]
    pixels: dict[int, int] = {}

    def of(item: int) -> int:
        """Pixels that are decoded for an item."""
        if item not in pixels:
            # Decoders refuse an item that is made of itself.
            pixels[item] = 0
            stated = sum(sizes[one - 1] for one in properties.get(item, ()) if 0 < one <= len(sizes))
            pixels[item] = sum(map(of, made_of[item])) if item in made_of else stated
        return pixels[item]

    for item in made_of:
        if of(item) > MAX_PIXELS:
            raise ImageError(f"tiles of more than {MAX_PIXELS:,} pixels together")


def _boxes(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Kind, version, begin and end of the boxes in a part of a HEIF; in place of some, those in them."""
    while place + 8 <= end:
        size, kind = struct.unpack_from(">L4s", data, place)
        start = place + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        # The last box may reach to the end of the file.
        size = size or end - place
        if size < start - place:
            return
        version, stop = data[start] if start < end else 0, min(place + size, end)
        # These boxes begin with a version and flags.
        start += 4 * (kind in (b"meta", b"iref", b"ipma"))
        if kind in (b"meta", b"iprp"):
            yield from _boxes(data, start, stop)
        else:
            yield kind, version, start, stop
        place += size
