"""What files declare of their origin: every label in every container, and what only looks like one."""

import json
import random
import time

import psutil
import pytest
from dgsnet.data.declared import Declared, read_declared
from PIL import Image

from tests.fuzz.targets import changed_headers
from tests.support.declarations import (
    EXIF_CONTAINERS,
    XMP_CONTAINERS,
    as_pixels,
    comment,
    packet,
    raw_profile_of_xmp,
    source_type,
    with_exif,
    with_text,
    with_xmp,
)
from tests.support.pictures import encode, picture

TRAINED = "trainedAlgorithmicMedia"
RECIPE = "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
GRAPH = {"3": {"class_type": "KSampler", "inputs": {"seed": 5}}}
NOVEL = {"prompt": "a cat", "steps": 28, "uc": "a dog", "seed": 5, "sampler": "k_euler"}
DRAW_THINGS = {"c": "a cat", "uc": "", "seed": 5, "steps": 8, "sampler": "DPM++", "scale": 4.5, "model": "x"}
LABEL = {"Label": "1", "ContentProducer": "001", "ProduceID": "a", "ContentPropagator": "", "PropagateID": ""}
JOB = "a cat --v 6 Job ID: 01234567-89ab-cdef-0123-456789abcdef"
IPTC_NS = 'xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
EXIF_NS = 'xmlns:exif="http://ns.adobe.com/exif/1.0/"'
TC = 'xmlns:T="http://www.tc260.org.cn/ns/AIGC/1.0/"'


@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize("container", XMP_CONTAINERS)
def test_a_source_type_in_every_container(container, element):
    found = read_declared(with_xmp(source_type(TRAINED, element, prefix="q"), container))
    assert found == ("generated", f"{TRAINED} (XMP DigitalSourceType)")
    assert read_declared(with_xmp(packet(), container)) == Declared("none")


@pytest.mark.parametrize("container", EXIF_CONTAINERS)
@pytest.mark.parametrize("order", ["be", "le"])
def test_a_recipe_in_exif_in_every_container(container, order):
    found = read_declared(with_exif({"comment": comment(RECIPE, order), 0x10F: "Maker"}, container))
    assert found == ("generated", "Stable Diffusion settings (EXIF UserComment)")
    assert read_declared(with_exif({"comment": comment("a cat"), 0x10F: "Maker"}, container)) == ("none", "")


@pytest.mark.parametrize(
    "term, value",
    [
        ("algorithmicMedia", "generated"),
        ("compositeWithTrainedAlgorithmicMedia", "partly"),
        ("compositeSynthetic", "partly"),
        ("algorithmicallyEnhanced", "partly"),
        ("digitalCapture", "captured"),
        ("computationalCapture", "captured"),
        ("negativeFilm", "captured"),
        ("humanEdits", "none"),
        ("digitalCreation", "none"),
        ("trainedAlgorithmicMediaOfMine", "none"),
    ],
)
def test_what_each_term_of_iptc_means(term, value):
    assert read_declared(with_xmp(source_type(term), "JPEG")) == (value, f"{term} (XMP DigitalSourceType)")


XMP = {
    "IPTC's AI fields": (
        packet(
            IPTC_NS,
            "<e:AISystemUsed>A model</e:AISystemUsed>",
        ),
        "A model (XMP AISystemUsed)",
    ),
    "Google": (
        packet('xmlns:p="http://ns.adobe.com/photoshop/1.0/" p:Credit="Made with Google AI"'),
        "Made with Google AI (XMP Credit)",
    ),
    "Draw Things": (
        packet(
            EXIF_NS,
            "<exif:UserComment><rdf:Alt><rdf:li xml:lang='x-default'>"
            f"{json.dumps(DRAW_THINGS)}</rdf:li></rdf:Alt></exif:UserComment>",
        ),
        "settings of a generator (XMP UserComment)",
    ),
    "a creator tool": (
        packet('xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="Adobe Firefly 3"'),
        "Adobe Firefly (XMP CreatorTool)",
    ),
    "China, as an attribute": (
        packet(f"{TC} T:AIGC='{json.dumps(LABEL)}'"),
        "AIGC label: generated (XMP AIGC)",
    ),
    "China, as an element": (
        packet(TC, f"<T:AIGC>{json.dumps({'AIGC': LABEL})}</T:AIGC>"),
        "AIGC label: generated (XMP AIGC)",
    ),
}
PNG = {
    "the web UI": ({"parameters": RECIPE}, "Stable Diffusion settings (PNG parameters)"),
    "SwarmUI": (
        {"parameters": json.dumps({"sui_image_params": {"prompt": "a"}})},
        "SwarmUI (PNG parameters)",
    ),
    "ComfyUI's prompt": ({"prompt": json.dumps(GRAPH)}, "ComfyUI (PNG prompt)"),
    "ComfyUI's workflow": (
        {"workflow": json.dumps({"nodes": [{"type": "KSampler"}]})},
        "ComfyUI (PNG workflow)",
    ),
    "InvokeAI": ({"invokeai_metadata": "{}"}, "InvokeAI (PNG invokeai_metadata)"),
    "InvokeAI of old": ({"sd__metadata": "{}"}, "InvokeAI (PNG sd-metadata)"),
    "InvokeAI's first": ({"Dream": '"a cat" -s 50 -S 12'}, "InvokeAI (PNG Dream)"),
    "NovelAI's name": ({"Software": "NovelAI"}, "NovelAI (PNG Software)"),
    "NovelAI's settings": ({"Comment": json.dumps(NOVEL)}, "settings of a generator (PNG Comment)"),
    "Fooocus": ({"fooocus_scheme": "fooocus"}, "Fooocus (PNG fooocus_scheme)"),
    "Midjourney": ({"Author": "me", "Description": JOB}, "Midjourney (PNG Description)"),
    "Hugging Face": ({"hf__job__id": "1"}, "a job of Hugging Face (PNG hf-job-id)"),
    "China": ({"AIGC": json.dumps(LABEL)}, "AIGC label: generated (PNG AIGC)"),
}
EXIF = {
    "ComfyUI's prompt": ({0x110: f"prompt:{json.dumps(GRAPH)}"}, "ComfyUI (EXIF Model)"),
    "ComfyUI's workflow": ({0x10F: 'workflow:{"nodes": [{"type": "x"}]}'}, "ComfyUI (EXIF Make)"),
    "Ideogram": ({0x10F: "Ideogram AI"}, "Ideogram (EXIF Make)"),
    "a program": ({0x131: "Fooocus v2.5"}, "Fooocus (EXIF Software)"),
    "xAI": (
        {0x10E: f"Signature: {'QUJD' * 20}=", 0x13B: "01234567-89ab-cdef-0123-456789abcdef"},
        "a signature as xAI writes it (EXIF ImageDescription)",
    ),
    "China": (
        {"comment": b"ASCII\0\0\0" + json.dumps(LABEL).encode()},
        "AIGC label: generated (EXIF UserComment)",
    ),
}


@pytest.mark.parametrize("kind", XMP)
def test_labels_in_xmp(kind):
    xmp, words = XMP[kind]
    assert read_declared(with_xmp(xmp, "JPEG")) == ("generated", words)
    assert read_declared(raw_profile_of_xmp(xmp)) == ("generated", words)


@pytest.mark.parametrize("how", [("tEXt", False), ("zTXt", True), ("iTXt", True)])
@pytest.mark.parametrize("kind", PNG)
def test_labels_in_texts_of_png(kind, how):
    texts, words = PNG[kind]
    assert read_declared(with_text(*how, **texts)) == ("generated", words)


@pytest.mark.parametrize("kind", EXIF)
def test_labels_in_exif(kind):
    tags, words = EXIF[kind]
    assert read_declared(with_exif(tags, "WEBP")) == ("generated", words)


def test_upscaling_is_a_part():
    found = read_declared(with_text(postprocessing="Postprocess upscale by: 4, Postprocess upscaler: x"))
    assert found == ("partly", "Stable Diffusion web UI's upscaler (PNG postprocessing)")
    edited = packet('xmlns:p="http://ns.adobe.com/photoshop/1.0/" p:Credit="Edited with Google AI"')
    assert read_declared(with_xmp(edited, "JPEG")).declared == "partly"


def test_what_a_platform_only_suspects_is_told_and_not_counted():
    for number, said in (("2", "possibly generated"), ("3", "suspected to be generated")):
        found = read_declared(with_text(AIGC=json.dumps(LABEL | {"Label": number})))
        assert found == ("none", f"AIGC label: {said} (PNG AIGC)")


def test_several_statements_are_told_and_what_says_how_much_decides():
    xmp = f'{IPTC_NS} e:AISystemUsed="A model" e:DigitalSourceType="{{}}"'
    partly = read_declared(with_xmp(packet(xmp.format("compositeSynthetic")), "JPEG"))
    assert partly == ("partly", "A model (XMP AISystemUsed); compositeSynthetic (XMP DigitalSourceType)")
    assert read_declared(with_xmp(packet(xmp.format("humanEdits")), "JPEG")).declared == "generated"
    element = f"<e:DigitalSourceType>{TRAINED}</e:DigitalSourceType>"
    both = packet(xmp.format("digitalCapture"), element)
    assert read_declared(with_xmp(both, "PNG")).declared == "generated"


ORDINARY = {
    "parameters of another program": {"parameters": "alpha=3, beta=4"},
    "a prompt": {"prompt": "a cat"},
    "a prompt in JSON": {"prompt": '{"text": "a cat"}'},
    "a comment": {"Comment": '{"prompt": "a cat"}'},
    "a workflow": {"workflow": '{"nodes": 3}'},
    "a description": {"Description": "Job ID: 5"},
    "a subject": {"Title": "Midjourney", "Author": "Stable Diffusion"},
    "deep JSON": {"prompt": '{"a":' * 5000 + "1" + "}" * 5000},
    "no JSON": {"invokeai_metadata": "{"},
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_texts_declare_nothing(kind):
    assert read_declared(with_text(**ORDINARY[kind])) == ("none", "")


@pytest.mark.parametrize("words", ['p:Credit="A photographer"', 'p:Headline="Made with Google AI"'])
def test_ordinary_texts_of_xmp_declare_nothing(words):
    photoshop = 'xmlns:p="http://ns.adobe.com/photoshop/1.0/"'
    assert read_declared(with_xmp(packet(f"{photoshop} {words}"), "JPEG")) == ("none", "")


def test_bytes_in_pixels_and_behind_the_end_are_no_label():
    """As a search through the file would find them."""
    for content in (source_type(TRAINED), b"parameters\0" + RECIPE.encode(), b"Software\0NovelAI"):
        for data in as_pixels(content):
            assert content in data
            assert read_declared(data) == Declared("none")
        for format in ("JPEG", "PNG", "WEBP", "GIF"):
            assert read_declared(encode(picture(40, 50), format) + content) == Declared("none")


def test_entities_are_not_expanded():
    """Nor is anything read that a document type could say."""
    rows = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi"))
    bomb = f'<!DOCTYPE x [<!ENTITY a "{TRAINED}">{rows}]>'
    element = "<e:DigitalSourceType>&{};</e:DigitalSourceType>"
    for name in "ai":
        begin = time.process_time()
        assert read_declared(with_xmp(packet(IPTC_NS, element.format(name), bomb), "JPEG")).declared == "none"
        assert time.process_time() - begin < 1
    deep = packet("", "<rdf:a>" * 5000 + "</rdf:a>" * 5000)
    assert read_declared(with_xmp(deep, "PNG")) == Declared("none")


def test_long_texts_are_left_out():
    """And the label behind them is found."""
    long = "x" * 2**23
    for kind, last in (("tEXt", False), ("zTXt", True), ("iTXt", True)):
        assert read_declared(with_text(kind, last, parameters=f"{RECIPE}{long}")) == Declared("none")
        assert read_declared(with_text(kind, last, Comment=long, parameters=RECIPE)).declared == "generated"
    one, bare = with_text("zTXt", True, Comment=long), with_text("zTXt", True)
    many = one[:-12] + one[len(bare) - 12 : -12] * 900 + one[-12:]
    begin = time.monotonic()
    assert read_declared(many) == Declared("none")
    assert time.monotonic() - begin < 5
    words = read_declared(with_xmp(source_type("x\u202e" * 5000), "PNG")).declared_by
    assert len(words) < 150 and words.isprintable()


def test_what_cannot_be_read_declares_nothing(tmp_path):
    found = read_declared(b"no image", name="a.png")
    assert found.declared == "" and found.declared_by.startswith("a.png: not an image")
    missing = read_declared(tmp_path / "b.png")
    assert missing.declared == "" and "b.png" in missing.declared_by


@pytest.mark.slow
def test_changed_headers_cost_no_process_and_no_memory():
    """Each is an answer of four."""
    rng, process = random.Random(0), psutil.Process()
    seeds = [with_xmp(source_type(TRAINED), container) for container in XMP_CONTAINERS]
    seeds += [
        with_exif({"comment": comment(RECIPE), 0x10F: "x" * 40}, container) for container in EXIF_CONTAINERS
    ]
    seeds += [with_text(kind, **texts) for kind in ("zTXt", "iTXt") for texts, _ in PNG.values()]
    values, before = set(), process.memory_info().rss
    for _ in range(600):
        found = read_declared(changed_headers(rng.choice(seeds), rng))
        assert "process" not in found.declared_by and "\n" not in found.declared_by, found
        values.add(found.declared)
    assert values >= {"generated", "none", ""}
    assert process.memory_info().rss - before < 50 * 2**20


def test_images_without_a_place_for_labels():
    for format in ("BMP", "JPEG2000", "PPM"):
        assert read_declared(encode(Image.new("RGB", (40, 30)), format)) == Declared("none")
