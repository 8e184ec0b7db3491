"""How the fuzzers change a file: documents value by value, everything else byte by byte."""

from __future__ import annotations

import copy
import io
import json
import math
import struct

import torch

# What a text, a number, a list or an object may be replaced by, as JSON.
WORDS = """null true [] {} "" -1 0 1.5 3 1e9 1000000000 1e400 -1e400 NaN Infinity -Infinity
[[1]] [{"name":3}] "\\u0000" "\\ud800" "../../x" "ViT-B-32" "timm/vit_x" "builtin" "none.pt"
"/dev/zero" "." \xff"""
VALUES = WORDS.split()
VALUES += ["1" * 30, "1" * 400, "1" * 5000, f'"{"x" * 9999}"', "[" * 100_000 + "]" * 100_000]
VALUES += ['{"a":' * 5000 + "1" + "}" * 5000]


def paths_in(value, path=()):
    """The path of every value in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def changed_json(text, rng):
    """A JSON document with one value replaced, removed, added, or put in another's place."""
    document = json.loads(text)
    *outer, last = rng.choice([path for path in paths_in(document) if path])
    owner = document
    for key in outer:
        owner = owner[key]
    kind = rng.randrange(8)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, dict):
        owner["more"] = owner[last]
    elif kind == 2:
        owner[last] = copy.deepcopy(
            rng.choice([*(document.values() if isinstance(document, dict) else document)])
        )
    else:
        owner[last] = "PLACE"
    return json.dumps(document).replace('"PLACE"', rng.choice(VALUES)).encode("utf-8", "surrogatepass")


def changed_bytes(data, rng):
    """Bytes flipped, cut off, repeated or replaced by digits."""
    data, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at : at + rng.randrange(1, 64)]
    else:
        data[at : at + 1] = rng.choice([b"9" * 15, b"-1", b"(", b"\0", b"\xff\xff\xff\xff"])
    return bytes(data)


def changed_header(data, rng):
    """Weights whose header is another document."""
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        return changed_bytes(data[: 8 + size], rng) + data[8 + size :]
    header = changed_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def changed_numbers(data, rng):
    """NumPy's file with another header."""
    if rng.random() < 0.5:
        return changed_bytes(data[:128], rng) + data[128:]
    shape = rng.choice(
        ["(3, 1)", "(10000000000000,)", "(-3,)", "()", "(" * 500, "(3.0,)", "('a',)", "[3]", "None"]
    )
    kind = rng.choice(["<i8", "|O", "<f8", "<U99999999", "V8", "no", "<i4"])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + data[128:]


def changed_any(data, rng):
    return changed_json(data, rng) if rng.random() < 0.8 else changed_bytes(data, rng)


def changed_state(data, rng):
    """A resume state with one value replaced, removed or of another shape; or its bytes changed."""
    if rng.random() < 0.2:
        return changed_bytes(data, rng)
    state = torch.load(io.BytesIO(data), weights_only=True)
    *outer, last = rng.choice([path for path in paths_in(state) if path])
    owner = state
    for key in outer:
        owner = owner[key]
    value = owner[last]
    if isinstance(value, torch.Tensor) and rng.random() < 0.6:
        others = (
            value[..., None].expand(*value.shape, 3),
            value.flatten()[:1],
            value.bool(),
            -value,
            value * 0,
        )
        owner[last] = rng.choice([*others, torch.full_like(value, 3), value.to(torch.complex64)])
    elif rng.random() < 0.2:
        del owner[last]
    else:
        owner[last] = rng.choice([None, -1, 0, 3, 10**18, 10**30, 1.5, math.nan, "x", [], {}, True, [[1.0]]])
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
