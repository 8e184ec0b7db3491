"""What an image file gives away before anybody looks at its pixels: how it was written, and how large it is.

In many training sets it tells the label: photographs come as JPEG from cameras, generated images as square
PNG. A detector learns that first, and fails on the first generated JPEG.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import JpegImagePlugin

from dgsnet.data.images import ImageError, answering, opened, read_apart

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF", "JPEG2000", "PPM")
# Chroma subsampling, by Pillow's numbers.
_CHROMA = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0", -1: "other"}
_MODES = {
    "grey": ("1", "L", "LA", "La", "I", "F"),
    "palette": ("P", "PA"),
    "alpha": ("LA", "La", "PA", "RGBA", "RGBa"),
    "CMYK": ("CMYK",),
    "more than 8 bits": ("I", "F"),
}
# The meaning of each number of `file_nuisances`.
NUISANCES = (
    *(f"format {name}" for name in _FORMATS),
    "JPEG quality",
    *(f"chroma {name}" for name in _CHROMA.values()),
    "log2 width",
    "log2 height",
    "log2 aspect",
    "log2 bytes per pixel",
    *(f"mode {name}" for name in _MODES),
    "EXIF",
)
# The luminance table of the JPEG standard (ITU-T T.81, table K.1), which encoders scale to a quality.
_LUMINANCE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ]
)
_QUALITIES = np.arange(1, 101)
# libjpeg's scaling, in per cent, and its tables for each quality.
_PER_CENT = np.where(_QUALITIES < 50, 5000 // _QUALITIES, 200 - 2 * _QUALITIES)
_TABLES = ((_LUMINANCE * _PER_CENT[:, None] + 50) // 100).clip(1, 255)


def file_nuisances(data: bytes, *, name: str = "image") -> np.ndarray:
    """What an encoded image gives away without being decoded.

    Yes or no (1 or 0): its format, chroma subsampling, colour mode, and whether it has EXIF data. JPEG
    quality is from 0.01 to 1 and 0 of other formats; of tables that are not the standard's it is the
    quality whose table is nearest. Width, height, the longer side over the shorter and the file's bytes per
    pixel are logarithms to base 2.

    Returns:
        float32 [len(NUISANCES)], finite.

    Raises:
        ImageError: the header cannot be read, or the image was made to exhaust its reader.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from dgsnet.data.nuisances import NUISANCES, file_nuisances
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (64, 16)).save(file, "jpeg", quality=70)
        >>> found = dict(zip(NUISANCES, file_nuisances(file.getvalue()).round(2).tolist()))
        >>> found["JPEG quality"], found["chroma 4:2:0"], found["log2 aspect"]
        (0.7, 1.0, 2.0)
    """
    return np.array(read_apart("dgsnet.data.nuisances:of_header", data, name)[0], np.float32)


@answering
def of_header(data: bytes) -> tuple[list[float], int, tuple[()]]:
    """The part of `file_nuisances` that another process does."""
    with opened(data) as image:
        width, height = image.size
        if not width * height:
            raise ImageError("has no pixels")
        # A JPEG with a second picture in it, as phones write, is told by what its reader is.
        jpeg = image if isinstance(image, JpegImagePlugin.JpegImageFile) else None
        written = "JPEG" if jpeg else image.format
        chroma = JpegImagePlugin.get_sampling(jpeg) if jpeg and jpeg.layers == 3 else None
        mode = image.mode.partition(";")[0]
        transparent = "transparency" in image.info
        values = [
            *(written == name for name in _FORMATS),
            _quality(jpeg) / 100 if jpeg else 0,
            *(chroma == number for number in _CHROMA),
            math.log2(width),
            math.log2(height),
            abs(math.log2(width / height)),
            math.log2(len(data) / (width * height)),
            *(mode in modes or (kind == "alpha" and transparent) for kind, modes in _MODES.items()),
            bool(image.info.get("exif")),
        ]
    return [float(value) for value in values], 0, ()


def _quality(image: JpegImagePlugin.JpegImageFile) -> int:
    """The quality of 1 to 100 whose standard table is nearest to that of the first component."""
    table = image.quantization.get(image.layer[0][3])
    if table is None:
        raise ImageError("a JPEG that lacks a quantization table")
    return int(_QUALITIES[np.abs(_TABLES - np.array(table)).sum(axis=1).argmin()])
