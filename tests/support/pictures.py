"""Pictures drawn from a seed, and how they are encoded."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image


def picture(height, width, seed=0):
    """Patches of every complexity: noise whose strength and coarseness vary over the image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    fine = rng.normal(size=(height, width, 3)) * (80 * x * y)[..., None]
    coarse = np.repeat(np.repeat(rng.normal(size=(height // 8 + 1, width // 8 + 1, 3)), 8, 0), 8, 1)
    smooth = 60 * np.stack([x, y, 1 - x], axis=-1) + 90
    return (smooth + fine + 25 * coarse[:height, :width]).clip(0, 255).astype(np.uint8)


def channels_first(image):
    """uint8 [H, W, 3] as a batch of one, [1, 3, H, W]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def encode(image, format, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, rows):
    """A PNG that Pillow cannot write: any bit depth, colour type, size and (uncompressed) contents."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_with(*chunks, whole=None):
    """A good PNG, of 32 x 32 pixels if none is given, with more chunks before its pixels."""
    whole = whole or png(32, 32, 8, 2, [bytes(96)] * 32)
    return whole[:33] + b"".join(chunks) + whole[33:]


def raw_profile(exif, whole=None):
    """EXIF data as ImageMagick writes it to PNGs, in hexadecimal digits."""
    text = f"\nexif\n{len(exif)}\n{exif.hex()}"
    return png_with(chunk(b"tEXt", b"Raw profile type exif\0" + text.encode()), whole=whole)


def tiff(entries, rest=b"", prefix=b"II*\0", big=False):
    """A TIFF that begins so, of these entries (tag, type, count, value); `big`: laid out as a BigTIFF."""
    order = "<" if prefix.startswith(b"II") else ">"
    start, number, entry = ("HHQ", "Q", "HHQL4x") if big else ("L", "H", "HHLL")
    first = (8, 0, 16) if big else (8,)
    packed = b"".join(struct.pack(order + entry, *values) for values in entries)
    header = prefix + struct.pack(order + start, *first) + struct.pack(order + number, len(entries))
    return header + packed + bytes(8 if big else 4) + rest


def grey_tiff(grey, prefix=b"II*\0", big=False, strips=1, more=None):
    """A TIFF of a grey image, with `more` values of tags."""
    height, width = grey.shape
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 400, 277: 1, 278: height, 279: grey.size}
    values |= more or {}
    entries = [(tag, 4, strips if tag in (273, 279) else 1, value) for tag, value in values.items()]
    return tiff(sorted(entries), prefix=prefix, big=big).ljust(400, b"\0") + grey.tobytes()


def vast_webp():
    """34 bytes of one colour and as many pixels as may be, of which WebP's reader makes copies."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "webp", lossless=True))
    place = data.index(b"VP8L") + 9
    (header,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<I", data, place, header >> 28 << 28 | 8191 << 14 | 16382)
    return bytes(data)


def boxes(data, place=0):
    """Of a HEIF's boxes by their kinds, their contents; `place`: where they begin."""
    return dict(boxes_in_order(data, place))


def boxes_in_order(data, place=0):
    while place < len(data):
        size, kind = struct.unpack_from(">L4s", data, place)
        yield kind, data[place + 8 : place + size]
        place += size


def box(kind, *parts):
    return struct.pack(">L", 8 + sum(map(len, parts))) + kind + b"".join(parts)


def grid(tile, rows, columns, size, wide=False):
    """A HEIF or AVIF that puts one tile, an image of that kind, together so many times; size as stated.

    Items and properties have numbers of twice the bytes if it is `wide`.

    A HEIF refers to one item again and again, which libavif refuses: there each place is an item of its own,
    and all lie in the same bytes.
    """
    whole = boxes(tile)
    meta = boxes(whole[b"meta"], 4)
    properties = boxes(meta[b"iprp"])
    count = len(boxes(properties[b"ipco"]))
    avif = whole[b"ftyp"].startswith(b"avif")
    tiles, last = (rows * columns, rows * columns + 1) if avif else (1, 2)
    places = range(1, tiles + 1) if avif else [1] * (rows * columns)

    def two(*numbers):
        return struct.pack(f">{len(numbers)}H", *numbers)

    def entry(number, kind):
        return box(b"infe", b"\2\0\0\0", two(number, 0), kind, b"\0")

    added = box(b"ispe", bytes(4), struct.pack(">LL", *size))
    inner, kind = properties[b"ipma"][11:], b"av01" if avif else b"hvc1"
    # The grid has what its tiles have, as libavif asks for, but for its size and how they are coded.
    kinds = [*boxes_in_order(properties[b"ipco"])]
    shared = bytes(at for at, (name, _) in enumerate(kinds, 1) if name in (b"pixi", b"colr") and avif)
    number_of = ">L" if wide else ">H"

    def associated(number, places):
        # The highest bit says that a property is essential.
        places = [(place & 0x80) << 8 | place & 0x7F for place in places] if wide else places
        packed = struct.pack(f">{len(places)}{'H' if wide else 'B'}", *places)
        return struct.pack(number_of, number) + bytes([len(places)]) + packed

    association = b"".join(associated(number, inner) for number in range(1, tiles + 1))
    association += associated(last, bytes([count + 1]) + shared)
    made_of = struct.pack(number_of, last) + two(rows * columns)
    made_of += b"".join(struct.pack(number_of, place) for place in places)
    iprp = box(
        b"iprp",
        box(b"ipco", properties[b"ipco"], added),
        box(b"ipma", bytes([wide, 0, 0, wide]), struct.pack(">L", last), association),
    )
    entries = [entry(number, kind) for number in range(1, tiles + 1)]
    parts = [
        box(b"hdlr", meta[b"hdlr"]),
        box(b"pitm", bytes(4), two(last)),
        box(b"iinf", bytes(4), two(last), *entries, entry(last, b"grid")),
        box(b"iref", bytes([wide, 0, 0, 0]), box(b"dimg", made_of)),
        iprp,
        box(b"idat", struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size)),
    ]

    def with_places(offset):
        one = (offset, len(whole[b"mdat"]))
        items = [struct.pack(">HHHHLL", number, 0, 0, 1, *one) for number in range(1, tiles + 1)]
        items.append(struct.pack(">HHHHLL", last, 1, 0, 1, 0, 8))
        iloc = box(b"iloc", b"\1\0\0\0", b"\x44\0", two(last), *items)
        return box(b"ftyp", whole[b"ftyp"]) + box(b"meta", bytes(4), *parts, iloc)

    offset = len(with_places(0)) + 8
    return with_places(offset) + box(b"mdat", whole[b"mdat"])
