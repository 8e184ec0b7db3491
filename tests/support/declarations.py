"""Files that declare where they are from, in every container that can: real encoders, and chunks by hand."""

import struct
import zlib

from PIL import Image, PngImagePlugin, TiffImagePlugin

from tests.support.pictures import chunk, encode, picture

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
PIXELS = picture(48, 80)
XMP_CONTAINERS = ("JPEG", "PNG", "PNG, after its pixels", "WEBP", "HEIF", "AVIF", "TIFF", "GIF")
EXIF_CONTAINERS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF")


def packet(attributes="", elements="", before=""):
    """XMP, as programs write it."""
    return (
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{before}'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF {RDF}><rdf:Description rdf:about="" {attributes}>{elements}</rdf:Description></rdf:RDF>'
        '</x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode()


def source_type(term, element=False, prefix="Iptc4xmpExt"):
    """XMP of a digital source type; the prefix is anybody's choice."""
    name, value = f"{prefix}:DigitalSourceType", TERMS + term
    space = f'xmlns:{prefix}="{IPTC}"'
    return packet(space, f"<{name}>{value}</{name}>") if element else packet(f'{space} {name}="{value}"')


def with_xmp(xmp, container):
    if container == "GIF":
        whole = encode(Image.fromarray(PIXELS).quantize(64), "GIF")
        trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
        return whole[:-1] + b"\x21\xff\x0bXMP DataXMP" + xmp + trailer + whole[-1:]
    if container == "PNG, after its pixels":
        whole = encode(PIXELS, "PNG")
        text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)
        return whole[:-12] + chunk(b"iTXt", text) + whole[-12:]
    if container == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return encode(PIXELS, "PNG", pnginfo=text)
    return encode(PIXELS, container, **({"tiffinfo": {700: xmp}} if container == "TIFF" else {"xmp": xmp}))


def with_exif(tags, container):
    """`tags` by number; those of the inner directory as `comment`."""
    if container == "TIFF":
        # Pillow leaves the inner directory out, unless it is given as one.
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in tags.items():
            info[34665 if tag == "comment" else tag] = {0x9286: value} if tag == "comment" else value
            info.tagtype |= {34665: 4} if tag == "comment" else {}
        return encode(PIXELS, "TIFF", tiffinfo=info)
    exif = Image.Exif()
    for tag, value in tags.items():
        if tag == "comment":
            exif.get_ifd(0x8769)[0x9286] = value
        else:
            exif[tag] = value
    return encode(PIXELS, container, exif=exif)


def with_text(kind="tEXt", last=False, **texts):
    """A PNG with texts by their keywords."""
    whole, chunks = encode(PIXELS, "PNG"), b""
    for key, words in texts.items():
        name = key.replace("__", "-").encode() + b"\0"
        if kind == "iTXt":
            chunks += chunk(b"iTXt", name + b"\0\0\0\0" + words.encode())
        elif kind == "zTXt":
            chunks += chunk(b"zTXt", name + b"\0" + zlib.compress(words.encode("latin-1")))
        else:
            chunks += chunk(b"tEXt", name + words.encode("latin-1"))
    return whole[:-12] + chunks + whole[-12:] if last else whole[:33] + chunks + whole[33:]


def raw_profile_of_xmp(xmp):
    """XMP as ImageMagick writes it to PNGs."""
    text = f"\nxmp\n{len(xmp):8}\n{xmp.hex()}\n"
    whole = encode(PIXELS, "PNG")
    return (
        whole[:33] + chunk(b"zTXt", b"Raw profile type xmp\0\0" + zlib.compress(text.encode())) + whole[33:]
    )


def comment(words, order="be"):
    """EXIF's user comment in UTF-16, whose byte order no program agrees on."""
    return b"UNICODE\0" + words.encode(f"utf-16-{order}")


def as_pixels(content):
    """Images whose pixels, uncompressed, are these bytes again and again."""
    width, height = 1024, 8
    content = (content * (width * height * 3 // len(content) + 1))[: width * height * 3]
    rows = [content[at : at + 3 * width] for at in range(0, len(content), 3 * width)]
    image = Image.frombytes("RGB", (width, height), content)
    # Pillow compresses what it writes as PNG.
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return [encode(image, "TIFF"), encode(image, "PPM"), b"\x89PNG\r\n\x1a\n" + b"".join(parts)]
