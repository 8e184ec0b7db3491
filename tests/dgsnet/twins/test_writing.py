"""Every kind of file is written again as it was: format, tables, sampling, mode, size; and nothing beside."""

import io

import numpy as np
import pytest
from dgsnet.builtin.photographs import PHOTOGRAPHS
from dgsnet.data.images import ImageError, read_image
from dgsnet.twins.writing import style_of, write
from PIL import Image, JpegImagePlugin

# No sides that are multiples of 8, and no square.
PICTURE = Image.fromarray(PHOTOGRAPHS["train"][0].pixels()[100:251, 30:233])
OTHER = PHOTOGRAPHS["train"][0].pixels()[150:301, 200:403]
GREY = PICTURE.convert("L")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep(samples, kind):
    return Image.fromarray(np.asarray(GREY).astype(samples), kind)


def transparent():
    image = PICTURE.quantize(17)
    image.info["transparency"] = 3
    return image


def animated(kind, **options):
    second = Image.fromarray(OTHER)
    return encoded(PICTURE, kind, save_all=True, append_images=[second], duration=40, **options)


# Files, and the format and the mode of what is written in their style; those that lose nothing by it.
EXACT = {
    "png": (encoded(PICTURE, "PNG"), "PNG", "RGB"),
    "png of few colours": (encoded(PICTURE.quantize(37), "PNG"), "PNG", "P"),
    "png with a transparent colour": (encoded(transparent(), "PNG"), "PNG", "P"),
    "png, black and white": (encoded(PICTURE.convert("1"), "PNG"), "PNG", "P"),
    "png, grey": (encoded(GREY, "PNG"), "PNG", "L"),
    "png, alpha": (encoded(PICTURE.convert("RGBA"), "PNG"), "PNG", "RGB"),
    "png of 16 bits": (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 201), "PNG"), "PNG", "L"),
    "gif": (encoded(PICTURE, "GIF"), "GIF", "P"),
    "gif, animated": (animated("GIF"), "GIF", "P"),
    "webp without loss": (encoded(PICTURE, "WEBP", lossless=True), "WEBP", "RGB"),
    "bmp": (encoded(PICTURE, "BMP"), "BMP", "RGB"),
    "ppm": (encoded(PICTURE, "PPM"), "PPM", "RGB"),
    "pbm": (encoded(PICTURE.convert("1"), "PPM"), "PPM", "L"),
    "tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), "TIFF", "RGB"),
    "tiff of a fax": (encoded(PICTURE.convert("1"), "TIFF", compression="group4"), "TIFF", "P"),
    "tiff of floats": (encoded(deep(np.float32, "F"), "TIFF"), "TIFF", "L"),
    "jpeg 2000 without loss": (encoded(PICTURE, "JPEG2000"), "JPEG2000", "RGB"),
}
JPEGS = {
    "of quality 30": encoded(PICTURE, "JPEG", quality=30),
    "4:4:4": encoded(PICTURE, "JPEG", quality=91, subsampling=0),
    "4:2:2, progressive": encoded(PICTURE, "JPEG", quality=80, subsampling=1, progressive=True),
    "grey": encoded(GREY, "JPEG", quality=64),
    "of four colours": encoded(PICTURE.convert("CMYK"), "JPEG", quality=73),
    "with tables of its own": encoded(PICTURE, "JPEG", qtables=[[7 + i // 3 for i in range(64)], [9] * 64]),
    "with another picture": animated("MPO", quality=77),
}
OF_A_SIZE = {
    "webp": encoded(PICTURE, "WEBP", quality=40),
    "webp, finer": encoded(PICTURE, "WEBP", quality=88),
    "avif": encoded(PICTURE, "AVIF", quality=55),
    "heic": encoded(PICTURE, "HEIF", quality=45),
    "jpeg 2000": encoded(PICTURE, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[23]),
    "tiff": encoded(PICTURE, "TIFF", compression="jpeg", quality=62),
}


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("name", EXACT)
def test_what_loses_nothing_is_written_with_the_same_pixels(name):
    data, kind, mode = EXACT[name]
    pixels = read_image(data)
    style = style_of(data, pixels)
    again = write(pixels, style)
    assert np.array_equal(read_image(again), pixels)
    for content in (pixels, OTHER):
        found = opened(write(content, style))
        assert (found.format, found.mode, found.size) == (kind, mode, PICTURE.size)
        assert not getattr(found, "is_animated", False)
    # A twin has no colours that its original could not have.
    twin = read_image(write(OTHER, style))
    if mode == "P" or name == "pbm":
        assert {*map(tuple, twin.reshape(-1, 3))} <= {*map(tuple, pixels.reshape(-1, 3))}
    assert (twin == twin[..., :1]).all() == (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_have_the_tables_and_the_sampling_of_their_original(name):
    original = opened(JPEGS[name])
    pixels = read_image(JPEGS[name])
    style = style_of(JPEGS[name], pixels)
    for content in (pixels, OTHER):
        found = opened(write(content, style))
        assert found.format == "JPEG" and found.mode == ("L" if name == "grey" else "RGB")
        assert found.quantization == original.quantization
        # Such a file has all four colours at full size.
        of_four = name == "of four colours"
        assert JpegImagePlugin.get_sampling(found) == (
            0 if of_four else JpegImagePlugin.get_sampling(original)
        )
        assert found.info.get("progressive") == original.info.get("progressive")
    # Nothing is lost again but by rounding.
    change = np.abs(read_image(write(pixels, style)).astype(int) - pixels).mean()
    assert change < (2.5 if of_four else 0.3)


@pytest.mark.parametrize("name", OF_A_SIZE)
def test_where_no_quality_is_told_the_file_is_as_long(name):
    data = OF_A_SIZE[name]
    pixels = read_image(data)
    again = write(pixels, style_of(data, pixels))
    assert opened(again).format == opened(data).format
    assert len(again) == pytest.approx(len(data), rel=0.06)
    assert np.abs(read_image(again).astype(int) - pixels).mean() < 2.5


def test_nothing_beside_the_pixels_is_written():
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6
    extras = {"exif": exif, "dpi": (300, 300), "comment": b"words", "icc_profile": b"profile" * 20}
    data = encoded(PICTURE, "JPEG", quality=83, **extras)
    pixels = read_image(data)
    # The picture is turned upright.
    assert pixels.shape[:2] == PICTURE.size
    found = opened(write(pixels, style_of(data, pixels)))
    assert found.size == PICTURE.size[::-1] and not found.getexif()
    assert not {"exif", "comment", "icc_profile", "xmp"} & found.info.keys()
    assert found.info.get("dpi") != (300, 300)


def test_a_grey_original_of_three_channels_has_a_grey_twin():
    data = encoded(GREY.convert("RGB"), "PNG")
    style = style_of(data, read_image(data))
    twin = opened(write(OTHER, style))
    assert twin.mode == "RGB" and np.array_equal(twin.getchannel(0), twin.getchannel(2))


def test_what_cannot_be_written_is_told_by_name():
    style = style_of(encoded(PICTURE, "WEBP", lossless=True), np.asarray(PICTURE))
    with pytest.raises(ImageError, match=r"long\.webp: cannot be written as WEBP"):
        write(np.zeros((1, 16400, 3), np.uint8), style, name="long.webp")
    with pytest.raises(ImageError, match="not an image"):
        style_of(b"words", np.asarray(PICTURE))
