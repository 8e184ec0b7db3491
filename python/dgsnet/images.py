"""Decoding: any image file to 8-bit RGB, or one line that says why not."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 2**27

_JPEG = (".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
_NETPBM = (".pbm", ".pgm", ".pnm", ".ppm")
EXTENSIONS = frozenset({".avif", ".bmp", ".gif", ".png", ".tif", ".tiff", ".webp", *_JPEG, *_NETPBM})

# Only these decoders: others that Pillow knows start programs (EPS) or make pictures of other data.
Image.init()
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]


class ImageError(Exception):
    """An image that cannot be read; str(error) is one line that names the image and the reason."""


def read_image(source: str | os.PathLike | bytes | np.ndarray | Image.Image) -> np.ndarray:
    """Decode an image to RGB.

    EXIF orientation is applied, transparency composited on white, 16-bit samples scaled to 8 bits and the
    first frame of an animation taken; docs/data.md lists every case.

    Args:
        source: path, encoded bytes, uint8 array [H, W], [H, W, 3] or [H, W, 4], or PIL image (left as it is).

    Returns:
        uint8 [H, W, 3], its own memory.

    Raises:
        ImageError: missing, damaged, truncated, empty, larger than MAX_PIXELS or not an image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from dgsnet.images import read_image
        >>> file = io.BytesIO()
        >>> Image.new("CMYK", (4, 2)).save(file, "tiff")
        >>> read_image(file.getvalue()).shape
        (2, 4, 3)
    """
    in_memory = isinstance(source, bytes | np.ndarray | Image.Image)
    name = "image" if in_memory else os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, np.ndarray):
            return _to_rgb(Image.fromarray(source))
        if not (len(source) if in_memory else os.path.getsize(name)):
            raise ImageError("empty file")
        with warnings.catch_warnings():
            # Pillow warns of sizes that it calls suspicious; the limit here is MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if in_memory else name, formats=FORMATS)
        with image:
            return _to_rgb(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of a kind that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: {_too_large()}") from None
    # Pillow's decoders raise whatever the damage makes them raise (OSError, SyntaxError, ValueError,
    # struct.error, IndexError, ...): one bad file must not end a run over millions.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded: {reason}") from error


def _too_large() -> str:
    return f"larger than {MAX_PIXELS:,} pixels; scale it down first"


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(_too_large())
    if not image.width * image.height:
        raise ImageError("has no pixels")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _grey(np.asarray(image), 65535)
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        image = _grey(values, _full_scale(values, image.mode))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _full_scale(values: np.ndarray, mode: str) -> int:
    """White of wide samples, which their files do not state: the smallest usual one that holds them all."""
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise ImageError(f"its {values.dtype} samples are not all finite and between 0 and 65535")
    if mode == "I":
        return 65535
    return next(white for white in (1, 255, 65535) if values.max() <= white)


def _grey(values: np.ndarray, white: int) -> Image.Image:
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
