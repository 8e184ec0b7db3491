"""Images made to exhaust their reader are read or refused in little time and memory, and in one line."""

import ast
import io
import os
import resource
import struct
import time
import zlib
from functools import partial

import numpy as np
import pytest
from dgsnet.data.images import FORMATS, MAX_PIXELS, ImageError, decode, read_image
from PIL import Image, TiffImagePlugin

from tests.support.pictures import (
    chunk,
    encode,
    grey_tiff,
    grid,
    picture,
    png,
    png_with,
    raw_profile,
    tiff,
    vast_webp,
)

RGB = picture(40, 56)


@pytest.mark.parametrize("side", [12_000, 100_000])
def test_decompression_bombs_are_refused_before_decoding(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=f"larger than {MAX_PIXELS:,} pixels"):
        read_image(png(side, side, 8, 2, [b"\0" * 100]))


def test_heif_is_refused_by_its_size_before_it_is_decoded():
    data = bytearray(encode(RGB, "HEIF"))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">II", 60000, 60000)
    started = time.process_time()
    with pytest.raises(ImageError):
        read_image(bytes(data))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind, exact", [("HEIF", {"quality": -1}), ("AVIF", {"subsampling": "4:4:4"})])
def test_a_grid_of_tiles_is_read(kind, exact, wide):
    tile = encode(RGB[:32, :48].repeat(2, 0).repeat(2, 1), kind, **exact)
    expected = np.tile(read_image(tile), (2, 3, 1))[:100, :270]
    np.testing.assert_array_equal(read_image(grid(tile, 2, 3, (270, 100), wide)), expected)


@pytest.mark.parametrize("prefix", TiffImagePlugin.PREFIXES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_tiff_is_looked_through_as_pillow_reads_it(prefix):
    """A directory that the check reads otherwise than Pillow, or not at all, would be no bound."""
    grey = RGB[..., 1]
    layouts = 0
    for big in (False, True):
        try:
            with Image.open(io.BytesIO(grey_tiff(grey, prefix, big))) as image:
                np.testing.assert_array_equal(np.asarray(image), grey)
        except (OSError, SyntaxError):
            # Pillow does not read a file that begins like this.
            continue
        layouts += 1
        np.testing.assert_array_equal(read_image(grey_tiff(grey, prefix, big))[..., 0], grey)
        with pytest.raises(ImageError, match="a TIFF directory of more than 1,048,576 values"):
            read_image(grey_tiff(grey, prefix, big, strips=2**20) + bytes(2**22))
        exif = tiff([(tag, 7, 60_000, 8) for tag in range(3_000)], prefix=prefix, big=big)
        with pytest.raises(ImageError, match="an EXIF directory of more than 67,108,864 bytes"):
            read_image(jpeg_with(segments(b"\xe1", b"Exif\0\0", exif), 1))
    assert layouts == 1


def rle_bmp(width, height, data):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + data


def jpeg_of_scans(repetitions, side):
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(Image.new("RGB", (side, side)), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * repetitions + data[-2:]


def jpeg_of_hidden_scans(repetitions, side):
    """The same, each behind a marker that has no length, of which the scan's own marker would be one."""
    data = encode(Image.new("RGB", (side, side)), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (b"\xff\x01" + data[last:-2]) * repetitions + data[-2:]


def jpeg2000_of_precincts(side):
    """A small file whose header says that each pixel is a precinct."""
    data = bytearray(encode(Image.new("L", (64, 64)), "jpeg2000", no_jp2=True, num_resolutions=1))
    size, coding = data.index(b"\xff\x51"), data.index(b"\xff\x52")
    # The image has this size, and so has its only tile.
    for place in (size + 6, size + 22):
        struct.pack_into(">LL", data, place, side, side)
    data[coding + 3] += 1
    data[coding + 4] |= 1
    return bytes(data[: coding + 14] + b"\0" + data[coding + 14 :])


def jpeg2000_of_precincts_in_its_last_tile(side, of_a_component):
    """The header of a tile may name precincts too, of all components or of one, behind the data of others."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8))
    data = encode(noise, "jpeg2000", no_jp2=True, num_resolutions=1, tile_size=(32, 32), tile_offset=(0, 0))
    coding, last = data.index(b"\xff\x52"), data.rindex(b"\xff\x90")
    # The levels and four bytes of all codings, and the new precincts' sizes.
    shared = data[coding + 9 : coding + 14] + b"\0"
    style = b"\0\1" if of_a_component else b"\1" + data[coding + 5 : coding + 9]
    segment = b"\xff" + (b"\x53" if of_a_component else b"\x52")
    segment += struct.pack(">H", 2 + len(style + shared)) + style + shared
    data = bytearray(data[: last + 12] + segment + data[last + 12 :])
    struct.pack_into(">L", data, last + 6, struct.unpack_from(">L", data, last + 6)[0] + len(segment))
    size = data.index(b"\xff\x51")
    for place in (size + 6, size + 22):
        struct.pack_into(">LL", data, place, side, side)
    return bytes(data)


def jpeg_that_says(width, height):
    data = bytearray(encode(Image.new("L", (16, 16)), "jpeg"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def jpeg_with(segment, times):
    data = encode(Image.new("RGB", (32, 32)), "jpeg")
    return data[:2] + segment * times + data[2:]


def gif_larger_than_its_canvas():
    data = bytearray(encode(Image.new("P", (16, 16)), "gif"))
    place = data.rindex(b",") + 1
    data[place : place + 8] = struct.pack("<HHHH", 65535, 65535, 65535, 65535)
    return bytes(data)


def animation(format, frames):
    images = [Image.new("RGB", (16, 16), (i % 256, i // 256, 3)) for i in range(frames)]
    return encode(images[0], format, save_all=True, append_images=images[1:])


def overlapping_exif(kind=3, entries=60_000, numbers=2**19, rest=2**20):
    """Entries that all mean the same bytes: a megabyte 60 000 times over."""
    return tiff([(tag, kind, numbers, 8) for tag in range(entries)], bytes(rest))


def tiff_with_inner_values(tag, numbers):
    """A small grey image whose EXIF or GPS directory, which Pillow makes objects of, has so many numbers."""
    entries = [*STRIPS, (273, 4, 1, 0), (279, 4, 1, 1024), (tag, 4, 1, 0)]
    place = len(tiff(entries)) + 1024
    pixels = place - 1024
    entries[-3:] = [(273, 4, 1, pixels), (279, 4, 1, 1024), (tag, 4, 1, place)]
    inner = struct.pack("<H", 1) + struct.pack("<HHLL", 37500, 3, numbers, 8) + bytes(4 + 2 * numbers)
    return tiff(sorted(entries), bytes(1024) + inner)


def grid_of_megapixels(kind, size, wide):
    return grid(encode(Image.new("RGB", (1024, 1024)), kind), 16, 12, size, wide)


def segments(marker, name, data):
    """Data in as many JPEG segments as it takes."""
    parts = [name + data[at : at + 65_000] for at in range(0, len(data), 65_000)]
    return b"".join(b"\xff" + marker + struct.pack(">H", len(part) + 2) + part for part in parts)


STRIPS = [(256, 3, 1, 32), (257, 3, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
EXIF = b"\xff\xe1" + struct.pack(">H", 65_000) + b"Exif\0\0II*\0\x08\0\0\0" + bytes(65_000 - 16)
ICC = b"\xff\xe2" + struct.pack(">H", 65_000) + b"ICC_PROFILE\0\1\1" + bytes(65_000 - 16)
MADE_TO_HURT = {
    "zTXt": (lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9))), "too large"),
    "many zTXt": (
        lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 100),
        "Too much memory",
    ),
    "iCCP": (lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27), 9))), "too large"),
    "eXIf": (lambda: png_with(chunk(b"eXIf", overlapping_exif())), None),
    "opaque eXIf": (lambda: png_with(chunk(b"eXIf", overlapping_exif(7, numbers=2**20))), None),
    "raw profile": (lambda: raw_profile(overlapping_exif()), None),
    "WebP EXIF": (lambda: encode(Image.new("RGB", (32, 32)), "webp", exif=overlapping_exif()), None),
    "JPEG EXIF directory": (
        lambda: jpeg_with(segments(b"\xe1", b"Exif\0\0", overlapping_exif()), 1),
        "an EXIF directory of more than",
    ),
    "JPEG pictures": (
        lambda: jpeg_with(segments(b"\xe2", b"MPF\0", overlapping_exif(7, 5_000, 60_000, 0)), 1),
        "an EXIF directory of more than",
    ),
    "TIFF opaque": (
        lambda: tiff([*STRIPS[:-1], *((tag, 7, 2**20, 8) for tag in range(300, 60_000))], bytes(2**20)),
        "a TIFF directory of more than 67,108,864 bytes",
    ),
    "large eXIf": (lambda: png_with(chunk(b"eXIf", bytes(2**25))), None),
    "PNG header": (lambda: png(2**31 - 1, 2**31 - 1, 8, 2, []), "larger than"),
    "one row": (lambda: png(2**26, 1, 8, 0, []), "a side longer than 131,072 pixels"),
    "JPEG scans": (lambda: jpeg_of_scans(2000, 64), "a JPEG of more scans"),
    "JPEG scanned pixels": (lambda: jpeg_of_scans(90, 6000), "a JPEG of more scans"),
    "JPEG hidden scans": (lambda: jpeg_of_hidden_scans(2000, 64), "a JPEG of more scans"),
    "JPEG EXIF behind an end": (
        lambda: jpeg_with(b"\xff\xd9" + segments(b"\xe1", b"Exif\0\0", overlapping_exif()), 1),
        "an EXIF directory of more than",
    ),
    "JPEG segments": (lambda: jpeg_with(b"\xff\xe0\0\2", 50_000), "a JPEG of more than 10,000 segments"),
    "JPEG header": (lambda: jpeg_that_says(65_535, 65_535), "larger than"),
    "JPEG profile like pictures": (
        lambda: jpeg_with(segments(b"\xe2", b"ICC\0", overlapping_exif(7, 5_000, 60_000, 0)), 1),
        None,
    ),
    **{
        f"JPEG 2000 precincts of a tile{name}": (
            partial(jpeg2000_of_precincts_in_its_last_tile, 1000, of_a_component),
            "of more than 131,072 precincts",
        )
        for name, of_a_component in (("", False), ("'s component", True))
    },
    "JPEG 2000 precincts": (lambda: jpeg2000_of_precincts(1000), "of more than 131,072 precincts"),
    **{
        f"{kind} grid{', wide' * wide}": (
            partial(grid_of_megapixels, kind, size, wide),
            "tiles of more than 134,217,728 pixels together",
        )
        for kind, size in (("HEIF", (512, 512)), ("AVIF", (16384, 8192)))
        for wide in (False, True)
    },
    "PNG chunks": (lambda: png_with(chunk(b"prVt", b"") * 50_000), "a PNG of more than 10,000 small chunks"),
    "large PNG chunks": (lambda: png_with(chunk(b"prVt", bytes(600)) * 15_000), None),
    "TIFF EXIF": (lambda: tiff_with_inner_values(34665, 2**20 + 1), "a TIFF directory of more than"),
    "TIFF GPS": (lambda: tiff_with_inner_values(34853, 2**20 + 1), "a TIFF directory of more than"),
    "TIFF small GPS": (lambda: tiff_with_inner_values(34853, 2**18), None),
    "JPEG EXIF": (lambda: jpeg_with(EXIF, 200), "its EXIF data is larger than"),
    "JPEG profile": (lambda: jpeg_with(ICC, 200), None),
    "GIF frame": (gif_larger_than_its_canvas, "larger than"),
    "GIF frames": (lambda: animation("gif", 2000), None),
    "PNG frames": (lambda: animation("png", 2000), None),
    "WebP frames": (lambda: animation("webp", 2000), None),
    "TIFF strips": (
        lambda: tiff([*STRIPS, (273, 3, 2**22, 200), (279, 3, 2**22, 200)], bytes(2**23 + 200)),
        "a TIFF directory of more than",
    ),
    "TIFF tile": (
        lambda: tiff([*STRIPS, (322, 4, 1, 45_000), (323, 4, 1, 45_000), (324, 4, 1, 8), (325, 4, 1, 60)]),
        "a TIFF with tiles of more than",
    ),
    "BMP row": (lambda: rle_bmp(2**18, 1, b"\0\2\xff\xff" * 30), "a side longer than"),
    "BMP runs": (lambda: rle_bmp(2**17, 2**9, b"\1\7\0\0" * 2**9), "a run-length encoded BMP of more than"),
    "BMP jumps": (lambda: rle_bmp(2**17, 64, b"\0\2\xff\xff" * 3000), None),
    "PNM header": (lambda: b"P6\n" + b"#\n" * 2**22, "no PNM header in its first"),
    "PNM comments": (lambda: b"P3\n300 300\n255\n" + b"#\n" * 2**20, "a PNM text of more than 100 comments"),
    "PNM text": (lambda: b"P3\n3000 3000\n255\n" + b"1 " * 2**24, "a PNM text of more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", MADE_TO_HURT)
def test_files_made_to_exhaust_their_reader(kind):
    """Each is read or refused in little time and memory, in a process of its own that can tell."""
    make, reason = MADE_TO_HURT[kind]
    data = make()
    seconds, mebibytes, answer = in_a_process(data)
    assert seconds < 10 and mebibytes < 200 + 2 * len(data) / 2**20
    if reason is None:
        assert answer.startswith("(")
    else:
        assert reason in answer and "\n" not in answer


@pytest.mark.parametrize("format", ["png", "jpeg", "gif"])
def test_the_largest_image_is_read_in_bounded_memory(format):
    side = int(MAX_PIXELS**0.5)
    _, mebibytes, answer = in_a_process(encode(Image.new("L", (side, side)), format))
    assert answer == f"({side}, {side})"
    assert mebibytes < 6 * MAX_PIXELS / 2**20


def test_an_image_that_takes_more_memory_than_there_is_for_one_is_refused():
    """Nothing in its header is against it."""
    data = vast_webp()
    assert len(data) == 34
    with pytest.raises(ImageError, match=r"^a.webp: it takes more than 1.2 GiB of memory to read$"):
        read_image(data, name="a.webp")
    np.testing.assert_array_equal(read_image(encode(RGB, "png")), RGB)


def in_a_process(data):
    """Seconds, peak memory in MiB beyond what was there, and the size or error, of what decodes an image."""
    read, write = os.pipe()
    if not (child := os.fork()):
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        # The limit is one of addresses: a bomb that goes off must not take the machine with it.
        limit = 8 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            found, _, bands = decode(data, "image")
            for _ in bands:
                pass
            answer = found.get("error") or str(found["value"])
        except BaseException as error:
            answer = f"not an ImageError: {error!r}"
        seconds = time.process_time() - begin
        mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(write, repr((seconds, mebibytes, answer)).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return ast.literal_eval(said.decode())


def test_files_of_no_reasonable_size_are_not_read(tmp_path):
    path = tmp_path / "sparse.webp"
    path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(100))
    os.truncate(path, 2**40)
    with pytest.raises(ImageError, match=r"sparse.webp: larger than 536,870,912 bytes$"):
        read_image(path)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/tty"):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image(path)


def mutated(data, rng):
    """What a file becomes by some bytes changed, lost, doubled, or taken for the largest numbers."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 10)):
        # Half of the damage goes to the header, where it does most.
        place = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 200)))
        match rng.integers(4):
            case 0:
                data[place] = rng.integers(256)
            case 1:
                data[place : place + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")[
                    rng.integers(3)
                ]
            case 2:
                del data[place : place + int(rng.integers(1, 50))]
            case 3:
                data[place:place] = data[place : place + int(rng.integers(1, 200))]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.parametrize(
    "format, options",
    [
        ("avif", {}),
        ("bmp", {}),
        ("gif", {"save_all": True}),
        ("jpeg", {"exif": True}),
        ("jpeg", {"progressive": True}),
        ("jpeg2000", {}),
        ("png", {"exif": True}),
        ("png", {"save_all": True}),
        ("ppm", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("tiff", {"compression": "jpeg"}),
        ("tiff", {"exif": True}),
        ("webp", {"save_all": True}),
        ("webp", {"exif": True, "lossless": True}),
    ],
)
def test_mutated_files_are_read_or_refused_in_one_line(format, options):
    if format.upper() not in FORMATS:
        pytest.skip(f"this Pillow has no {format}")
    rng = np.random.default_rng(0)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x112], exif[0x10F] = 6, "camera" * 9
        options = options | {"exif": exif}
    if "save_all" in options:
        options = options | {"append_images": [Image.fromarray(255 - RGB)]}
    data = encode(RGB, format, **options)
    refused = 0
    for _ in range(150):
        try:
            result = read_image(mutated(data, rng))
        except ImageError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert result.ndim == 3 and result.shape[2] == 3 and result.dtype == np.uint8
    assert refused > 20
