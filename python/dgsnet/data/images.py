"""Decoding: any image file to 8-bit RGB, or one line that says why not; files are taken to be hostile."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import pillow_heif
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

# What one image may cost. Sizes are known before anything is decoded.
MAX_PIXELS = 2**27
MAX_SIDE = 2**17
MAX_BYTES = 2**29
# A JPEG is gone through once per scan: encoders write about ten, an attacker thousands in few bytes.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# Pillow makes Python objects, dozens of bytes each, of every value of these; encoders need some kilobytes.
MAX_EXIF_BYTES = 2**22
MAX_TIFF_VALUES = 2**20
MAX_DIRECTORY_BYTES = 2**26
# Pillow reads the text of these, and leaves out their comments, in Python.
MAX_PNM_HEADER = 2**16
MAX_PNM_TEXT = 2**24
MAX_PNM_COMMENTS = 100

_JPEG = (".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
_NETPBM = (".pbm", ".pgm", ".pnm", ".ppm")
_HEIF = (".heic", ".heif", ".hif")
# Images that nothing here decodes; their files are rows with an error rather than missing without a word.
_UNREADABLE = (".arw", ".cr2", ".cr3", ".dng", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2")
# What counts as an image in a folder.
EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".png", ".tif", ".tiff", ".webp", *_JPEG, *_NETPBM, *_HEIF, *_UNREADABLE}
)

# Only these decoders: others that Pillow knows start programs (EPS) or make pictures of other data.
Image.init()
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
FORMATS: list[str] = [
    name
    for name in ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """An image that cannot be read; str(error) is one line that names the image and the reason."""


def read_image(
    source: str | os.PathLike | bytes | np.ndarray | Image.Image, *, name: str | None = None
) -> np.ndarray:
    """Decode an image to RGB.

    EXIF orientation is applied, transparency composited on white, 16-bit samples scaled to 8 bits and the
    first frame of an animation taken; docs/data.md lists every case.

    Args:
        source: path, encoded bytes, uint8 array [H, W], [H, W, 3] or [H, W, 4], or PIL image (left as it is).
        name: what errors call the image; its path, or "image", if not given.

    Returns:
        uint8 [H, W, 3], its own memory.

    Raises:
        ImageError: missing, no regular file, damaged, truncated, empty, not an image, or larger than
            MAX_PIXELS, MAX_SIDE or MAX_BYTES, or made to exhaust its reader.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from dgsnet.data.images import read_image
        >>> file = io.BytesIO()
        >>> Image.new("CMYK", (4, 2)).save(file, "tiff")
        >>> read_image(file.getvalue()).shape
        (2, 4, 3)
    """
    if name is None:
        name = "image" if isinstance(source, bytes | np.ndarray | Image.Image) else os.fsdecode(source)
    with one_line_errors(name):
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, np.ndarray):
            return _to_rgb(Image.fromarray(source))
        with opened(source if isinstance(source, bytes) else read_file(source)) as image:
            return _to_rgb(image)


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Whatever reading an image raises, as an ImageError of one line that begins with `name`."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of a kind that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: {_too_large()}") from None
    except MemoryError:
        raise ImageError(f"{name}: not enough memory to decode it") from None
    # Pillow's decoders raise whatever the damage makes them raise (OSError, SyntaxError, ValueError,
    # struct.error, IndexError, ...): one bad file must not end a run over millions.
    except Exception as error:
        raise ImageError(f"{name}: cannot be decoded: {_one_line(error)}") from error


def read_file(
    path: str | os.PathLike, *, folder: str = "", offset: int = 0, size: int | None = None
) -> bytes:
    """The bytes of a regular file, or of a part of one; never waits for a pipe or a device.

    Args:
        path: the file.
        folder: a folder that the file, with all links followed, must lie in; "": anywhere.
        offset: first byte of the part.
        size: bytes of the part; None: up to the end.

    Raises:
        ImageError: the reason, without the path.
    """
    try:
        real = os.path.realpath(path)
        if folder and not is_inside(real, folder):
            raise ImageError(f"a link out of {folder}, not followed")
        check_regular(real)
        # Not to be held up by what takes the file's place after the check.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(real, flags), "rb") as file:
            wanted = os.fstat(file.fileno()).st_size - offset if size is None else size
            if wanted > MAX_BYTES:
                raise ImageError(f"larger than {MAX_BYTES:,} bytes")
            file.seek(offset)
            data = file.read(wanted)
    except FileNotFoundError:
        raise ImageError("a link to nothing" if os.path.islink(path) else "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ImageError(f"cannot be opened: {_one_line(error)}") from None
    if len(data) < wanted:
        raise ImageError("cut off by the end of its file")
    return data


def is_inside(path: str, folder: str) -> bool:
    """Whether a path, with all links followed, lies in a folder."""
    path, folder = (os.path.join(os.path.realpath(p), "") for p in (path, folder))
    return path.startswith(folder)


def file_hash(data: bytes) -> int:
    """Eight bytes of a hash of an encoded image, as a signed number: the same file, the same number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def check_regular(path: str | os.PathLike) -> None:
    """Raise ImageError where opening or reading might wait for ever: pipes, devices; and for folders."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ImageError("is a directory" if stat.S_ISDIR(mode) else "not a regular file")


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An encoded image with its header read and nothing decoded; one made to exhaust its reader is refused.

    Raises:
        ImageError: the reason; Pillow's own errors pass as they are (see `one_line_errors`).
    """
    if not data:
        raise ImageError("empty file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES:,} bytes")
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        _check_tiff(data)
    elif re.match(rb"P[0-6fy]", data):
        _check_pnm(data)
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of sizes that it calls suspicious; the limits here are its own.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image


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
    _check_exif(exif)
    _check_exif(pictures)


def _check_tiff(data: bytes) -> None:
    """Refuse TIFFs whose directory, or a tile of them that no image needs, would fill the memory."""
    order = "<" if data.startswith(b"II") else ">"
    tile = {322: 0, 323: 0}  # width and height
    values = 0
    try:
        for tag, kind, number, value in _entries(data, "a TIFF directory"):
            values += 1 if kind in (1, 2, 7) else number  # bytes, text and opaque data stay as they are
            if values > MAX_TIFF_VALUES:
                raise ImageError(f"a TIFF directory of more than {MAX_TIFF_VALUES:,} values")
            if tag in tile:
                (tile[tag],) = struct.unpack_from(order + {3: "H", 16: "Q"}.get(kind, "L"), value)
        if tile[322] * tile[323] > MAX_PIXELS:
            raise ImageError(f"a TIFF with tiles of more than {MAX_PIXELS:,} pixels")
    except (struct.error, OverflowError):
        raise ImageError("cannot be decoded: the TIFF directory is cut off") from None


def _check_exif(exif: bytes | bytearray) -> None:
    """Refuse EXIF data whose directory would fill the memory; whatever else is wrong with it is no matter."""
    with contextlib.suppress(struct.error, OverflowError):
        for _ in _entries(re.sub(rb"^(Exif\0\0){1,2}", b"", exif), "an EXIF directory"):
            pass


def _entries(data: bytes, name: str) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, number of values and value, or its place, of a TIFF's first directory.

    Pillow before 13 makes a copy of what every entry stands for, though all stand for the same bytes.
    """
    order = "<" if data.startswith(b"II") else ">"
    # Where Pillow looks for it: it takes a big-endian BigTIFF, which has it a byte later, for a classic one.
    big = data[2:3] == b"+"
    offset, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xL", "H", "HHL4s")
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


def _too_large() -> str:
    return f"larger than {MAX_PIXELS:,} pixels; scale it down first"


def _to_rgb(image: Image.Image) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large())
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"a side longer than {MAX_SIDE:,} pixels; cut it up first")
    if not width * height:
        raise ImageError("has no pixels")
    image.load()
    image = _upright(image)
    width, height = image.size
    wide = np.asarray(image) if image.mode.startswith("I") or image.mode == "F" else None
    white = 0 if wide is None else _full_scale(wide, image.mode)
    # Band by band, so that the memory beside the decoded image and the result does not grow with its size.
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, 2**22 // width)
    for top in range(0, height, rows):
        end = min(top + rows, height)
        if wide is not None:
            rgb[top:end] = np.rint(wide[top:end, :, None] * (255 / white))
        else:
            rgb[top:end] = np.asarray(_opaque(image.crop((0, top, width, end))))
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF data that cannot be read says nothing."""
    try:
        exif = image.info.get("exif")  # pillow-heif says None where there is none
        if exif is None and (text := image.info.get("Raw profile type exif")):  # ImageMagick's, in PNGs
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        if exif and len(exif) > MAX_EXIF_BYTES:
            return image
        _check_exif(exif or b"")
        turn = _TRANSPOSITIONS.get(image.getexif().get(0x0112, 1))
    except Exception:  # as various as the damage
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _full_scale(values: np.ndarray, mode: str) -> int:
    """White of wide samples, which their files do not state: the smallest usual one that holds them all."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # nor a NaN, which both of them would be
        raise ImageError(f"its {values.dtype} samples are not all finite and between 0 and 65535")
    if mode.startswith("I"):
        return 65535
    return next(white for white in (1, 255, 65535) if high <= white)


def _one_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
