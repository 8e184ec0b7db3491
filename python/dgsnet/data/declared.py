"""What an image's file declares of its origin, unsigned: labels that generators, cameras and editors leave.

docs/provenance.md says what each means. Everybody can write them and remove them: that there are none says
nothing, and that there are some is a statement and no proof.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dgsnet.data.images import ImageError, answering, one_line_errors, opened, read_apart, read_file
from dgsnet.data.items import Item
from dgsnet.data.metadata import MAX_TEXT, Text, texts
from dgsnet.files import one_line

GENERATED, PARTLY, CAPTURED, NONE = "generated", "partly", "captured", "none"
# Most letters that are shown of a name that a file chose.
MOST_WORDS = 80
# Most statements that are shown of one image.
MOST_FOUND = 8

# Terms of http://cv.iptc.org/newscodes/digitalsourcetype/; the others say neither that a machine made the
# image nor that a camera did.
SOURCE_TYPES = {
    **dict.fromkeys(("trainedAlgorithmicMedia", "algorithmicMedia"), GENERATED),
    **dict.fromkeys(
        ("compositeWithTrainedAlgorithmicMedia", "compositeSynthetic", "algorithmicallyEnhanced"), PARTLY
    ),
    **dict.fromkeys(
        (
            *("digitalCapture", "computationalCapture", "compositeCapture"),
            *("negativeFilm", "positiveFilm", "print"),
        ),
        CAPTURED,
    ),
}
# What the AI label of China's GB 45438-2025 says; the latter two are guesses of a platform.
AIGC = {"1": "generated", "2": "possibly generated", "3": "suspected to be generated"}
# Names of what generates images, as it writes them where others write a camera or an editor.
TOOLS = re.compile(
    r"\b(NovelAI|Midjourney|DALL[\W_]?E|Stable Diffusion|ComfyUI|InvokeAI|Fooocus|SwarmUI|Draw Things"
    r"|DiffusionBee|Adobe Firefly|Ideogram|Leonardo\.?AI|Imagen \d|Seedream|Jimeng|Grok Imagine)\b",
    re.IGNORECASE,
)
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_TC260 = "http://www.tc260.org.cn/ns/AIGC/1.0/"
_CREDIT = "http://ns.adobe.com/photoshop/1.0/ Credit"
_COMMENT = "http://ns.adobe.com/exif/1.0/ UserComment"
_CREATOR = "http://ns.adobe.com/xap/1.0/ CreatorTool"
_AI_FIELDS = ("AISystemUsed", "AISystemVersionUsed", "AIPromptInformation", "AIPromptWriterName")
_INVOKE = ("invokeai_metadata", "invokeai_graph", "invokeai_workflow", "sd-metadata")
# Settings of a sampler, of which a recipe has two at least beside its prompt.
_PROMPTS = {"prompt", "c", "positive_prompt", "Prompt", "sd_prompt"}
_SETTINGS = {"seed", "steps", "sampler", "scale", "cfg_scale", "uc", "model", "base_model", "negative_prompt"}
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class Declared(NamedTuple):
    """What an image's file says of its origin, which nobody has signed.

    Attributes:
        declared: "generated", "partly", "captured", or "none" where it says none of these; "" where the image
            cannot be read.
        declared_by: what says so and where, such as "trainedAlgorithmicMedia (XMP DigitalSourceType)".
    """

    declared: str
    declared_by: str = ""


class _Found(NamedTuple):
    # One of GENERATED and the others.
    value: str
    what: str
    text: Text
    # Whether it says how much was generated, and not only by what.
    extent: bool = False


def read_declared(source: str | os.PathLike | bytes, *, name: str | None = None) -> Declared:
    """Read what an image's file declares, in a process of its own.

    Args:
        source: path, or encoded bytes.
        name: what errors call the image; its path, or "image", if not given.

    Example:
        >>> import io
        >>> from PIL import Image, PngImagePlugin
        >>> from dgsnet.data.declared import read_declared
        >>> file, text = io.BytesIO(), PngImagePlugin.PngInfo()
        >>> text.add_text("parameters", "a cat\\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1")
        >>> Image.new("RGB", (4, 2)).save(file, "PNG", pnginfo=text)
        >>> read_declared(file.getvalue())
        Declared(declared='generated', declared_by='Stable Diffusion settings (PNG parameters)')
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else os.fsdecode(source)
    try:
        with one_line_errors(name):
            data = source if isinstance(source, bytes) else read_file(source)
        return Declared(*read_apart("dgsnet.data.declared:answer", data, name)[0])
    except ImageError as error:
        return Declared("", one_line(error))


def of_item(item: Item) -> Declared:
    """The same of an item."""
    try:
        return read_declared(item.read_bytes(), name=item.path)
    except ImageError as error:
        return Declared("", one_line(error))


@answering
def answer(data: bytes) -> tuple[Declared, int, tuple[()]]:
    """The part of `read_declared` that its process does."""
    with opened(data) as image:
        return declared(texts(data, image)), 0, ()


def declared(found: Iterable[Text]) -> Declared:
    """What the texts of an image's metadata say together.

    What says how much was generated decides where anything does, and the most of it; what only names a
    generator decides elsewhere.
    """
    found = list(found)
    artists = [text.words.strip() for text in found if (text.where, text.key) == ("EXIF", "Artist")]
    is_xai = any(re.fullmatch(_UUID, words) for words in artists)
    statements = [one for text in found for one in (*_statements(text), *(_xai(text) if is_xai else ()))]
    extents = [statement.value for statement in statements if statement.extent]
    values = [value for value in extents if value != NONE] or [statement.value for statement in statements]
    value = next((one for one in (GENERATED, PARTLY, CAPTURED) if one in values), NONE)
    reasons = dict.fromkeys(f"{one.what} ({_place(one.text)})" for one in statements)
    return Declared(value, "; ".join(list(reasons)[:MOST_FOUND]))


def _place(text: Text) -> str:
    return f"{text.where} {_plain(text.key.rpartition(' ')[2])}"


def _plain(words: str) -> str:
    """Words of strangers: one line of printable letters, and few."""
    return "".join(filter(str.isprintable, one_line(words[: 4 * MOST_WORDS])))[:MOST_WORDS]


def _statements(text: Text) -> Iterator[_Found]:
    """What one text declares."""
    if text.where == "XMP":
        yield from _in_xmp(text)
    elif text.where == "EXIF":
        yield from _in_exif(text)
    else:
        yield from _in_png(text)


def _in_xmp(text: Text) -> Iterator[_Found]:
    space, _, name = text.key.rpartition(" ")
    if space == _IPTC and name == "DigitalSourceType":
        term = _plain(text.words.strip().rstrip("/").rpartition("/")[2])
        yield _Found(SOURCE_TYPES.get(term, NONE), term, text, True)
    elif space == _IPTC and name in _AI_FIELDS:
        yield _Found(GENERATED, _plain(text.words), text)
    elif space == _TC260 and name == "AIGC":
        yield from _aigc(text)
    elif text.key == _CREDIT and "Google AI" in text.words:
        yield _Found(PARTLY if "Edited" in text.words else GENERATED, _plain(text.words), text)
    elif text.key == _COMMENT:
        yield from _recipe(text)
    elif text.key == _CREATOR:
        yield from _tool(text)


def _in_exif(text: Text) -> Iterator[_Found]:
    if text.key == "UserComment":
        yield from _recipe(text)
    elif text.key in ("Make", "Model") and text.words.startswith(("prompt:{", "workflow:{")):
        yield from _comfy(Text(text.where, text.key, text.words.partition(":")[2]))
    elif text.key in ("Make", "Model", "Software"):
        yield from _tool(text)


def _xai(text: Text) -> Iterator[_Found]:
    """A signature, beside a number for an artist."""
    signed = r"Signature: [A-Za-z0-9+/]{16,}={0,2}"
    if text.key == "ImageDescription" and re.fullmatch(signed, text.words.strip()):
        yield _Found(GENERATED, "a signature as xAI writes it", text)


def _in_png(text: Text) -> Iterator[_Found]:
    if text.key == "Software" or text.key == "Source":
        yield from _tool(text)
    elif text.key in ("prompt", "workflow"):
        yield from _comfy(text)
    elif text.key in _INVOKE:
        if isinstance(_json(text.words), dict):
            yield _Found(GENERATED, "InvokeAI", text)
    elif text.key == "Dream":
        if re.search(r" -s ?\d+", text.words[:MAX_TEXT]):
            yield _Found(GENERATED, "InvokeAI", text)
    elif text.key == "fooocus_scheme":
        yield _Found(GENERATED, "Fooocus", text)
    elif text.key == "postprocessing":
        if "Postprocess" in text.words:
            yield _Found(PARTLY, "Stable Diffusion web UI's upscaler", text)
    elif text.key == "Description" and re.search(rf"Job ID: {_UUID}\s*$", text.words[-200:]):
        yield _Found(GENERATED, "Midjourney", text)
    elif text.key == "hf-job-id":
        yield _Found(GENERATED, "a job of Hugging Face", text)
    elif text.key in ("parameters", "Comment", "AIGC", "Description"):
        yield from _recipe(text)


def _recipe(text: Text) -> Iterator[_Found]:
    """The settings that an image was generated with, as text or as JSON; or China's label, as bare JSON."""
    words = text.words.lstrip()
    if words.startswith("{"):
        found = _json(words)
        if not isinstance(found, dict):
            return
        if "sui_image_params" in found:
            yield _Found(GENERATED, "SwarmUI", text)
        elif found.keys() & _PROMPTS and len(found.keys() & _SETTINGS) >= 2:
            yield _Found(GENERATED, "settings of a generator", text)
        else:
            yield from _aigc(text)
    elif re.search(r"\bSteps: \d+", words) and re.search(r"\b(?:Sampler|Seed|CFG scale): ", words):
        yield _Found(GENERATED, "Stable Diffusion settings", text)


def _comfy(text: Text) -> Iterator[_Found]:
    """A graph of ComfyUI: nodes by number, or a list of them."""
    found = _json(text.words)
    if not isinstance(found, dict):
        return
    listed = found.get("nodes")
    nodes = listed if isinstance(listed, list) else list(found.values())
    names = ("class_type", "type")
    if any(
        isinstance(node, dict) and any(isinstance(node.get(name), str) for name in names) for node in nodes
    ):
        yield _Found(GENERATED, "ComfyUI", text)


def _aigc(text: Text) -> Iterator[_Found]:
    """China's label: by its keys, alone or in an object named AIGC."""
    found = _json(text.words)
    if isinstance(found, dict) and isinstance(found.get("AIGC"), dict):
        found = found["AIGC"]
    if (
        not isinstance(found, dict)
        or not {"ContentProducer", "ProduceID", "ContentPropagator"} & found.keys()
    ):
        return
    if (said := AIGC.get(str(found.get("Label"))[:2])) is not None:
        value = GENERATED if said == GENERATED else NONE
        yield _Found(value, f"AIGC label: {said}", text, True)


def _tool(text: Text) -> Iterator[_Found]:
    if found := TOOLS.search(text.words[:1000]):
        yield _Found(GENERATED, _plain(found[0]), text)


def _json(words: str) -> Any:
    """A JSON value; None of what is none, or is nested beyond what Python reads."""
    try:
        return json.loads(words)
    except (ValueError, RecursionError):
        return None
