"""Decoding: any image file to 8-bit RGB, or one line that says why not; files are taken to be hostile.

They are decoded in processes of their own (apart.py), whatever process asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from dgsnet.apart import Apart, Gone
from dgsnet.data.headers import MAX_EXIF_BYTES, MAX_PIXELS, ImageError, check_exif, check_headers, webp_frame
from dgsnet.files import one_line

# What one image may cost, beside MAX_PIXELS. Sizes are known before anything is decoded.
MAX_SIDE = 2**17
# In pixels. Of so many, no decoder needs more memory than there is.
LARGE = 2**25
MAX_BYTES = 2**29

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
# By EXIF orientation, what makes an image upright; rows of the upright one are columns of it from 5 on.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FROM_THE_END = (3, 4, 7, 8)
_Box = tuple[int, int, int, int]


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
            return np.concatenate(list(_decode(source)[1]))
        if isinstance(source, np.ndarray):
            return np.concatenate(list(_decode(Image.fromarray(source))[1]))
        data = source if isinstance(source, bytes) else read_file(source)
    (height, width), pixels = read_apart("dgsnet.data.images:decode", data, name)
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def read_apart(function: str, data: bytes, name: str) -> tuple[Any, bytearray]:
    """Call "module:function" with an encoded image and its name, in a process of its own.

    Args:
        function: what `answering` has made of one that gives a JSON value and bytes.

    Raises:
        ImageError: that the function raises; or the process died, or was stopped at a limit.
    """
    try:
        if len(data) > MAX_BYTES:
            raise Gone(f"larger than {MAX_BYTES:,} bytes")
        answer, content = _apart(function, data, name)
    except Gone as gone:
        raise ImageError(f"{name}: {gone}") from None
    if "error" in answer:
        raise ImageError(answer["error"])
    return answer["value"], content


_Content = tuple[Any, int, Iterable[Any]]


def answering(read: Callable[[bytes], _Content]) -> Callable[[bytes, str], _Content]:
    """A function on an encoded image that `read_apart` can call, made of one that raises what it likes."""

    @functools.wraps(read)
    def answer(data: bytes, name: str) -> _Content:
        try:
            with one_line_errors(name):
                value, size, parts = read(data)
        except ImageError as error:
            # Its process says so.
            if isinstance(error.__context__, MemoryError):
                raise error.__context__ from None
            return {"error": str(error)}, 0, ()
        return {"value": value}, size, parts

    return answer


@answering
def decode(data: bytes) -> _Content:
    """The part of `read_image` that its process does: height and width, and the pixels."""
    with opened(data) as image:
        (height, width), bands = _decode(image, webp_frame(data))
    return (height, width), height * width * 3, bands


def prepare() -> None:
    """What such a process does first: it decodes in one thread, since as many work as there are images."""
    pillow_heif.options.DECODE_THREADS = 1
    # A Pillow may lack it.
    with contextlib.suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1


_apart = Apart("dgsnet.data.images:prepare", library="Pillow")


@contextlib.contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Whatever reading an image raises, as an ImageError of one line that begins with `name`."""
    try:
        yield
    except (ImageError, UnidentifiedImageError) as error:
        raise ImageError(f"{name}: {error}") from None
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
    except (OSError, ValueError) as error:
        # ValueError comes of a zero byte in the name.
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
    check_headers(data)
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of sizes that it calls suspicious; the limits here are its own.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(_what_it_is(data)) from None
        with image:
            yield image


def _what_it_is(data: bytes) -> str:
    """Why Pillow knows no image in an encoded one; it tells of none of its readers what they met."""
    for name in FORMATS:
        reader, begins = Image.OPEN[name]
        if begins and begins(data[:16]) is True:
            try:
                # Image.open calls it so.
                reader(io.BytesIO(data), "")
            except Exception as error:
                # Errors are as various as the damage.
                return f"a {name} that is damaged, or of a kind that cannot be read: {_one_line(error)}"
    return f"not an image of a kind that can be read ({', '.join(FORMATS)})"


def _too_large() -> str:
    return f"larger than {MAX_PIXELS:,} pixels; scale it down first"


def _decode(image: Image.Image, frame: _Box | None = None) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """Decode an image.

    Args:
        image: whose header alone has been read, or which is decoded already.
        frame: what of it the first of several covers, where Pillow does not say.

    Returns:
        Its height and width, and it, in bands uint8 [h, W, 3]: the memory beside the decoded image must not
        grow with its size.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large())
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"a side longer than {MAX_SIDE:,} pixels; cut it up first")
    if not width * height:
        raise ImageError("has no pixels")
    # A file not yet decoded has tiles.
    tiles = getattr(image, "tile", ())
    frame = tiles[0].extents if tiles and image.format == "GIF" else frame
    clear = _transparent_colour(image)
    with _without_xmp(image):
        try:
            image.load()
        except OSError as error:
            # Some decoders raise this if they get no memory.
            if width * height < LARGE:
                raise
            reason = f"{_one_line(error)}, or so large an image takes more memory than there is for one"
            raise ImageError(f"cannot be decoded: {reason}") from None
    width, height = image.size
    orientation = _orientation(image)
    size = (width, height) if orientation > 4 else (height, width)
    boxes = list(_boxes(width, height, orientation))
    white = _full_scale(image, boxes) if _is_wide(image) else 0

    def bands() -> Iterator[np.ndarray]:
        for box in boxes:
            band = image.crop(box) if len(boxes) > 1 or clear is not None else image
            if clear is not None:
                band.info["transparency"] = clear
            if not white:
                band = _opaque(band)
                if frame and frame != (0, 0, width, height):
                    band = _within(frame, band, box)
            if orientation in _TURNS:
                band = band.transpose(_TURNS[orientation])
            pixels = np.asarray(band)
            if white:
                scaled = np.where(pixels == clear, 255, np.rint(pixels * (255 / white)))
                pixels = np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=2)
            yield pixels

    return size, bands()


def _boxes(width: int, height: int, orientation: int) -> Iterator[_Box]:
    """What of an image as it lies in its file makes the bands of the upright one, from the top."""
    long, across = (width, height) if orientation > 4 else (height, width)
    step = max(1, 2**22 // across)
    for start in range(0, long, step):
        first, end = start, min(start + step, long)
        if orientation in _FROM_THE_END:
            first, end = long - end, long - first
        yield (first, 0, end, height) if orientation > 4 else (0, first, width, end)


def _within(frame: _Box, band: Image.Image, box: _Box) -> Image.Image:
    """A band without what is outside a frame: that has any colour in Pillow, and a page does not show it."""
    left, top, right, bottom = frame[0] - box[0], frame[1] - box[1], frame[2] - box[0], frame[3] - box[1]
    seen = (max(left, 0), max(top, 0), min(right, band.width), min(bottom, band.height))
    white = Image.new("RGB", band.size, "white")
    if seen[0] < seen[2] and seen[1] < seen[3]:
        white.paste(band.crop(seen), seen)
    return white


def _is_wide(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _transparent_colour(image: Image.Image) -> Any:
    """The value, or palette entries, that stand for nothing, as the decoded samples have it.

    Of a PNG it is the file's own number, which Pillow leaves as it is where it scales the samples.
    """
    clear = image.info.get("transparency")
    if clear is not None and image.format == "PNG" and image.tile:  # type: ignore[attr-defined]
        samples = image.tile[0].args  # type: ignore[attr-defined]
        if scale := {"1": 255, "L;2": 85, "L;4": 17}.get(samples):
            return clear * scale
        if samples == "RGB;16B":
            return tuple(value >> 8 for value in clear)
    return clear


@contextlib.contextmanager
def _without_xmp(image: Image.Image) -> Iterator[None]:
    """Hide the XMP, by which Pillow turns a TIFF in decoding it, as no browser does."""
    hidden: dict[Any, Any] = {
        key: image.info.pop(key) for key in ("xmp", "XML:com.adobe.xmp") if key in image.info
    }
    try:
        yield
    finally:
        image.info.update(hidden)


def _orientation(image: Image.Image) -> int:
    """What its EXIF data say of a decoded image; 1, which is upright, where they cannot be read."""
    try:
        # pillow-heif says None where there is none.
        exif = image.info.get("exif")
        # ImageMagick writes it so into PNGs.
        if exif is None and (text := image.info.get("Raw profile type exif")):
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        if not exif or len(exif) > MAX_EXIF_BYTES:
            return 1
        check_exif(exif)
        tags = Image.Exif()
        tags.load(exif)
        return tags[0x0112] if tags.get(0x0112) in _TURNS else 1
    except Exception:
        # Errors are as various as the damage.
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # Pillow makes RGBA of it only in two steps.
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _full_scale(image: Image.Image, boxes: list[_Box]) -> int:
    """White of wide samples, which their files do not state: the smallest usual one that holds them all."""
    bands = (np.asarray(image.crop(box)) for box in boxes)
    low, high = np.array([(band.min(), band.max()) for band in bands]).T
    # A NaN fails this too.
    if not (low.min() >= 0 and high.max() <= 65535):
        raise ImageError("its samples are not all finite and between 0 and 65535")
    if image.mode.startswith("I"):
        return 65535
    return next(white for white in (1, 255, 65535) if high.max() <= white)


def _one_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__
