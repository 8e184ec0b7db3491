"""Whatever a format writes transparency as, it looks as on a white page."""

import io
import struct

import numpy as np
import pytest
from dgsnet.data.images import FORMATS, read_image
from PIL import Image

from tests.support.pictures import chunk, encode, png, png_with, tiff

HEIGHT, WIDTH = 24, 40
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([4 * X, 6 * Y, 255 - 2 * (X + Y)], axis=-1).clip(0, 255).astype(np.uint8)
GREY = np.stack([(3 * (X + Y)).astype(np.uint8)] * 3, axis=-1)
# In areas, so that what loses a little does so at their edges alone.
ALPHA = np.choose((X > 12).astype(int) + (X > 26), [0, 96, 255]).astype(np.uint8)


def on_white(colour, alpha):
    share = alpha[..., None] / 255
    return share * colour + (1 - share) * 255


def with_alpha(colour, alpha=ALPHA):
    return np.concatenate([colour, alpha[..., None]], axis=-1)


def premultiplied(colour, alpha=ALPHA):
    return with_alpha(np.rint(colour * (alpha[..., None] / 255)).astype(np.uint8), alpha)


def written(colour, format, **options):
    bands = with_alpha(colour if colour is RGB else colour[..., :1])
    return encode(Image.fromarray(bands), format, **options)


def tiff_of(pixels, photometric, extra, colours=b""):
    """An uncompressed TIFF whose last sample is of the kind `extra`: 1 premultiplied, 2 not."""
    height, width, samples = pixels.shape
    values = {256: width, 257: height, 259: 1, 262: photometric, 277: samples, 278: height, 338: extra}
    values |= {273: 200 + len(colours), 279: pixels.size}
    entries = [(tag, 4, 1, value) for tag, value in values.items()]
    # Two fit into the entry itself.
    entries += [(258, 3, samples, 8 | 8 << 16 if samples == 2 else 190)]
    entries += [(320, 3, len(colours) // 2, 200)] if colours else []
    return tiff(sorted(entries)).ljust(190, b"\0") + struct.pack("<5H", *[8] * 5) + colours + pixels.tobytes()


def bmp(pixels):
    """A BMP whose header, of the fourth version, has a mask for alpha."""
    height, width, _ = pixels.shape
    masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, pixels.size, 0, 0, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 108) + header.ljust(108, b"\0") + pixels.tobytes()


TRANSLUCENT = {
    "PNG": (lambda: written(RGB, "png"), RGB, 1),
    "PNG, grey": (lambda: written(GREY, "png"), GREY, 1),
    "TIFF": (lambda: tiff_of(with_alpha(RGB), 2, 2), RGB, 1),
    "TIFF, premultiplied": (lambda: tiff_of(premultiplied(RGB), 2, 1), RGB, 2),
    "TIFF, grey": (lambda: tiff_of(with_alpha(GREY[..., :1]), 1, 2), GREY, 1),
    "TIFF, grey and premultiplied": (lambda: tiff_of(premultiplied(GREY[..., :1]), 1, 1), GREY, 2),
    "WebP": (lambda: written(RGB, "webp", lossless=True), RGB, 1),
    "WebP, lossy": (lambda: written(RGB, "webp", quality=95), RGB, 12),
    "JPEG2000": (lambda: written(RGB, "jpeg2000"), RGB, 1),
    "JPEG2000, grey": (lambda: written(GREY, "jpeg2000"), GREY, 1),
    "BMP": (lambda: bmp(with_alpha(RGB)), RGB, 1),
    "AVIF": (lambda: written(RGB, "avif", quality=100), RGB, 12),
    "HEIF": (lambda: written(RGB, "heif", quality=100), RGB, 12),
}


@pytest.mark.parametrize("kind", TRANSLUCENT)
def test_alpha_is_composited_on_white(kind):
    make, colour, tolerance = TRANSLUCENT[kind]
    if kind.partition(",")[0].upper() not in FORMATS:
        pytest.skip(f"this Pillow reads no {kind}")
    error = np.abs(read_image(make()) - on_white(colour, ALPHA))
    assert error.mean() <= tolerance / 2 and np.quantile(error, 0.98) <= tolerance
    # What lies below full transparency does not matter.
    assert (error[:, :8] <= tolerance / 6).all()


def grey_png(depth):
    """A ramp whose second third is the transparent grey, and what a page shows of it."""
    white = 2**depth - 1
    clear = white // 3
    values = np.repeat([0, clear, white], 8)
    if depth < 8:
        bits = "".join(format(value, f"0{depth}b") for value in values)
        row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    else:
        row = values.astype(f">u{depth // 8}").tobytes()
    return png_with(chunk(b"tRNS", struct.pack(">H", clear)), whole=png(24, 1, depth, 0, [row])), (
        np.where(values == clear, 255, values * 255 // white)
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_counts_at_every_depth(depth):
    data, expected = grey_png(depth)
    np.testing.assert_array_equal(read_image(data), np.stack([expected] * 3, -1)[None])
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(read_image(image)[0, :, 0], expected)


def test_a_transparent_colour_counts():
    match = (RGB[3, 4] == RGB).all(-1, keepdims=True)
    expected = np.where(match, 255, RGB)
    plain = encode(RGB, "png", transparency=tuple(map(int, RGB[3, 4])))
    np.testing.assert_array_equal(read_image(plain), expected)
    wide = RGB.astype(np.uint16) * 256 + 7
    clear = chunk(b"tRNS", wide[3, 4].astype(">u2").tobytes())
    rows = [row.tobytes() for row in wide.astype(">u2")]
    np.testing.assert_array_equal(
        read_image(png_with(clear, whole=png(WIDTH, HEIGHT, 16, 2, rows))), expected
    )


@pytest.mark.parametrize("format", ["png", "gif", "tiff"])
def test_transparent_palette_entries_count(format):
    palette = Image.fromarray(RGB).quantize(16)
    indices, seen = np.asarray(palette), np.asarray(palette.convert("RGB"))
    clear = int(indices[0, 0])
    if format == "tiff":
        # A TIFF has an alpha channel beside the indices.
        colours = np.array(palette.getpalette()).reshape(-1, 3)
        table = np.zeros((3, 256), "<u2")
        table[:, : len(colours)] = colours.T * 257
        alpha = np.where(indices == clear, 0, 255).astype(np.uint8)
        data = tiff_of(with_alpha(indices[..., None], alpha), 3, 2, table.tobytes())
    else:
        data = encode(palette, format, transparency=clear)
    np.testing.assert_array_equal(read_image(data), np.where((indices == clear)[..., None], 255, seen))
