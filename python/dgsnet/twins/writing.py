"""How an image was written, and writing others just so: nothing but content may tell them apart."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from dgsnet.data.images import ImageError, answering, opened, read_apart

ENDINGS = {
    **{"AVIF": ".avif", "BMP": ".bmp", "GIF": ".gif", "HEIF": ".heic", "JPEG": ".jpg", "JPEG2000": ".jp2"},
    **{"PNG": ".png", "PPM": ".ppm", "TIFF": ".tif", "WEBP": ".webp"},
}
# Formats that can hold a palette.
_PALETTES = ("BMP", "GIF", "PNG", "TIFF")
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
_COLOURS = 256
# TIFF's compressions that lose nothing and go with any mode; of what was lost by another there is no account.
_LOSSLESS = ("raw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "tiff_lzw")
# Pillow's number for 4:2:0.
_HALVED = 2


@dataclass(frozen=True)
class Style:
    """How an image is written.

    Attributes:
        format: Pillow's name.
        options: of Pillow's `save`.
        mode: of the file: L, P or RGB.
        grey: whether there is no colour in the image.
        colours: uint8 [n, 3], all colours there are; None: any.
    """

    format: str
    options: dict[str, Any]
    mode: str
    grey: bool = False
    colours: np.ndarray | None = None

    @property
    def ending(self) -> str:
        """Of a file's name."""
        return ENDINGS[self.format]


def style_of(data: bytes, pixels: np.ndarray, *, name: str = "image") -> Style:
    """How an encoded image was written.

    JPEG tables, chroma subsampling and progression are the file's own. Of other lossy formats the quality is
    not in the file: it is the one at which `pixels` become a file as long as this one.

    Args:
        data: the file.
        pixels: uint8 [H, W, 3], what read_image makes of it.
        name: what errors call the image.

    Raises:
        ImageError: the header cannot be read, or an image of this size cannot be written so.

    Example:
        >>> import io
        >>> import numpy as np
        >>> from PIL import Image
        >>> from dgsnet.twins.writing import style_of, write
        >>> file, grey = io.BytesIO(), np.zeros((40, 50, 3), np.uint8)
        >>> Image.fromarray(grey).save(file, "jpeg", quality=70)
        >>> write(grey, style_of(file.getvalue(), grey)) == file.getvalue()
        True
    """
    found = read_apart("dgsnet.twins.writing:of_header", data, name)[0]
    grey = bool((pixels == pixels[..., :1]).all())
    colours = _colours(pixels) if found["palette"] else None
    mode = (
        "P" if found["palette"] and found["format"] in _PALETTES else "L" if found["grey"] and grey else "RGB"
    )
    style = Style(found["format"], found["options"], mode, grey, colours)
    if not found["quality"]:
        return style
    return _fitted(pixels, style, len(data), name)


def write(pixels: np.ndarray, style: Style, *, name: str = "image") -> bytes:
    """A file of uint8 [H, W, 3] in this style, without metadata; ImageError where there can be none."""
    if style.grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None].repeat(3, axis=2)
    if style.colours is not None:
        pixels, places = _nearest(pixels, style.colours)
    image = Image.fromarray(pixels)
    if style.mode == "P":
        assert style.colours is not None
        image = Image.fromarray(places)
        image.putpalette(style.colours.tobytes())
    elif style.mode == "L":
        image = image.convert("L")
    file = io.BytesIO()
    try:
        image.save(file, style.format, **style.options)
    # Sides beyond what the format can hold, or a Pillow that can only read it.
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ImageError(f"{name}: cannot be written as {style.format}: {reason}") from None
    return file.getvalue()


@answering
def of_header(data: bytes) -> tuple[dict[str, Any], int, tuple[()]]:
    """The part of `style_of` that another process does."""
    with opened(data) as image:
        kind, options, quality = image.format or "", {}, False
        # A JPEG with a second picture in it, as phones write, is told by what its reader is.
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            kind, sampling = "JPEG", JpegImagePlugin.get_sampling(image)
            # It is unknown of CMYK, whose chroma is whole, and of ratios that Pillow cannot write.
            if sampling < 0:
                sampling = 0 if image.mode == "CMYK" else _HALVED
            options = {
                "qtables": [list(table) for _, table in sorted(image.quantization.items())],
                "subsampling": sampling,
                "progressive": bool(image.info.get("progressive")),
            }
        elif kind == "WEBP":
            frame = re.search(rb"VP8([ L])", data)
            quality = frame is None or frame[1] == b" "
            options = {} if quality else {"lossless": True}
        elif kind == "JPEG2000":
            quality = _is_irreversible(data)
            options = {"irreversible": True, "quality_mode": "rates"} if quality else {}
        elif kind == "TIFF":
            compression = image.info.get("compression", "raw")
            quality = compression == "jpeg"
            options = {"compression": compression if quality or compression in _LOSSLESS else "tiff_lzw"}
        elif kind in ("AVIF", "HEIF"):
            quality, options = True, {"speed": 8} if kind == "AVIF" else {}
        if kind not in Image.SAVE or kind not in ENDINGS:
            kind, options, quality = "PNG", {}, False
        style = {
            "format": kind,
            "options": options,
            "quality": quality,
            "grey": image.mode in _GREY,
            "palette": image.mode in ("1", "P", "PA") or kind == "GIF",
        }
    return style, 0, ()


def _is_irreversible(data: bytes) -> bool:
    """Whether a JPEG 2000 loses something: by the wavelet that its coding style names."""
    start = data.find(b"\xff\x4f\xff\x51")
    place = data.find(b"\xff\x52", start)
    return start >= 0 and place >= 0 and data[place + 13 : place + 14] == b"\0"


def _fitted(pixels: np.ndarray, style: Style, size: int, name: str) -> Style:
    """The style with the quality at which the image takes so many bytes, or as nearly as there is one."""
    if style.format == "JPEG2000":
        rate = pixels.shape[0] * pixels.shape[1] * (1 if style.mode == "L" else 3) / size
        return replace(style, options=style.options | {"quality_layers": [max(rate, 1.0)]})

    def with_quality(quality: int) -> Style:
        return replace(style, options=style.options | {"quality": quality})

    def excess(quality: int) -> int:
        return len(write(pixels, with_quality(quality), name=name)) - size

    return with_quality(_crossing(excess, 1, 100))


def _crossing(excess: Callable[[int], int], low: int, high: int) -> int:
    """Where a rising function is nearest to zero, among whole numbers."""
    known: dict[int, int] = {}
    while low <= high:
        middle = (low + high) // 2
        known[middle] = excess(middle)
        if known[middle] < 0:
            low = middle + 1
        else:
            high = middle - 1
    return min(known, key=lambda value: abs(known[value]))


def _colours(pixels: np.ndarray) -> np.ndarray:
    """The colours of an image, of more than a palette holds those that stand for them best."""
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    if len(colours) > _COLOURS:
        palette = Image.fromarray(pixels).quantize(_COLOURS).getpalette()
        colours = np.unique(np.array(palette, np.uint8).reshape(-1, 3), axis=0)
    return colours


def _nearest(pixels: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of the colours to every pixel, uint8 [H, W, 3], and which it is, uint8 [H, W].

    Pillow's own way takes one colour for all that differ by less than four levels.
    """
    from scipy.spatial import cKDTree

    places = cKDTree(colours).query(pixels.reshape(-1, 3))[1].astype(np.uint8).reshape(pixels.shape[:2])
    return colours[places], places
